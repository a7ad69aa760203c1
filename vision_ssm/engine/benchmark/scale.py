"""How training scales over processes: whole steps of the engine, optimizer included, of replicas and of shards.

Each process has the same batch, so that the work grows with their number. All take the same number of steps, since each
waits for the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor, nn
from torch.optim import AdamW

from vision_ssm.engine.tasks import Classification, Segmentation
from vision_ssm.engine.training.device import device, join_group
from vision_ssm.engine.training.parallel import replicated, sharded
from vision_ssm.engine.training.runner import AutocastOptimWrapper
from vision_ssm.segmentation import SegMamba

from .jobs import create
from .rows import Row, write_rows
from .timing import describe, measure_steps

__all__ = ["SCALES", "STEP", "ScaleJob", "efficiencies", "measure"]

STEP = "training step"


@dataclass(frozen=True, kw_only=True)
class ScaleJob:
    """Training steps of one model on random samples.

    Args:
        subject: the model's name in the rows.
        make: its task.
        sample: sizes of an image (c, h, w) or a volume (c, d, h, w).
        batch: samples of each process.
        wrapper: how processes share the model; one process has it to itself.
        mixed: bfloat16 autocast, else float32.
        steps: how many are timed.
    """

    subject: str
    make: Callable[[], BaseModel]
    sample: tuple[int, ...]
    batch: int
    wrapper: Callable[[BaseModel], nn.Module]
    mixed: bool = True
    steps: int = 50

    def fields(self) -> dict[str, Any]:
        """Fields of the row, all but the suite and the environment."""
        processes = get_world_size()
        torch.manual_seed(0)
        model: nn.Module = self.make().to(device()).train()
        if processes > 1:
            model = self.wrapper(model)
        optimizer = AdamW(model.parameters(), lr=1e-4)
        wrapper = AutocastOptimWrapper(optimizer) if self.mixed else OptimWrapper(optimizer)
        batch = self.samples()
        step: Any = model.train_step
        return {
            "subject": self.subject,
            "case": f"{self.sample[-1]} px, {self.wrapper.__name__}",
            "processes": processes,
            "batch": processes * self.batch,
            "direction": STEP,
            "dtype": "bfloat16" if self.mixed else "float32",
            "layout": "contiguous",
            "timing": measure_steps(lambda: step(batch, wrapper), device(), self.steps),
            "accuracy": None,
        }

    def samples(self) -> dict[str, Tensor]:
        """Images with a class each, volumes with a class for every voxel."""
        image = torch.randn(self.batch, *self.sample, device=device())
        label = torch.zeros(self.batch, dtype=torch.long, device=image.device)
        return {"image": image, "label": label if len(self.sample) == 3 else torch.zeros_like(image[:, :1])}


def classifier(name: str, size: int) -> BaseModel:
    return Classification(create(name, size))


def segmenter(**options: Any) -> BaseModel:
    net = SegMamba(spatial_dims=3, in_channels=4, out_channels=4, deep_supervision=True, **options)
    loss = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True, batch=True))
    return Segmentation(net, loss, inferer=lambda image, network: network(image))


SCALES: dict[str, tuple[ScaleJob, ...]] = {
    "scale": (
        ScaleJob(
            subject="vmamba_tiny",
            make=lambda: classifier("vmamba_tiny", 224),
            sample=(3, 224, 224),
            batch=128,
            wrapper=replicated,
        ),
        *(
            ScaleJob(subject="SegMamba", make=segmenter, sample=(4, 96, 96, 96), batch=2, wrapper=wrapper)
            for wrapper in (replicated, sharded)
        ),
    ),
    "scale_smoke": (
        ScaleJob(
            subject="test_vmamba",
            make=lambda: classifier("test_vmamba", 32),
            sample=(3, 32, 32),
            batch=2,
            wrapper=replicated,
            mixed=False,
            steps=3,
        ),
        ScaleJob(
            subject="SegMamba",
            make=lambda: segmenter(dims=(4, 8), depths=(1, 1), hidden=8, state=2),
            sample=(4, 16, 16, 16),
            batch=1,
            wrapper=sharded,
            steps=3,
        ),
    ),
}


def measure(suite: str, out: Path) -> Iterator[Row]:
    """Rows of a suite, in every process that torchrun started, each with its own times; the main one writes its rows.

    Raises:
        ValueError: there is no such suite.
        FileExistsError: ``out`` exists.
    """
    if suite not in SCALES:
        raise ValueError(f"unknown suite {suite!r}; suites are {', '.join(SCALES)}")
    join_group()
    rows = measured(suite)
    return write_rows(rows, out) if is_main_process() else rows


def measured(suite: str) -> Iterator[Row]:
    environment = describe(device())
    for job in SCALES[suite]:
        yield Row(suite=suite, environment=environment, **job.fields())


def efficiencies(rows: Sequence[Row]) -> Iterator[tuple[Row, float]]:
    """Rows of several processes with their efficiency: samples/s by those of one process times their number.

    Raises:
        ValueError: the same was not measured in one process, on the same device by the same commit.
    """

    def alike(row: Row) -> tuple[Any, ...]:
        return row.subject, row.case, row.dtype, row.environment

    single = {alike(row): row for row in rows if row.processes == 1}
    for row in rows:
        if row.processes is not None and row.processes > 1:
            if alike(row) not in single:
                raise ValueError(
                    f"{row.subject}, {row.case} has no row of one process with the same environment; measure it on the "
                    "same machine and commit, and give both files"
                )
            yield row, row.samples_per_s / single[alike(row)].samples_per_s / row.processes
