"""Timings of operators and models, each operator with its error against the float64 reference of the same run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch

from .jobs import RUNS, ModelJob, OperatorJob
from .rows import Row
from .timing import describe
from .video import RUNS as VIDEO_RUNS
from .video import GenerationJob, TrainingJob
from .volumes import VolumeJob

__all__ = ["SUITES", "Suite", "run"]

Job = OperatorJob | ModelJob | VolumeJob | TrainingJob | GenerationJob


@dataclass(frozen=True)
class Suite:
    """What to measure, and for how many seconds each row; ``device`` is where, if it matters."""

    jobs: tuple[Job, ...]
    seconds: float
    device: str | None = None


_BOTH_WIDTHS = (torch.float32, torch.bfloat16)
_TINY = ("vmamba_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny", "mambaout_tiny", "vit_small_patch16_224")
_FAMILIES = ("efficient_vmamba_small", "vim_small", "hydra_vit_base", "vim2_tiny")
_VOLUMES = ("ssm_unet", "umamba", "segmamba", "dynunet", "segresnet", "swin_unetr")
_TWINS = tuple(f"{name}_identity" for name in _VOLUMES[:3])
_LINEAR_AND_QUADRATIC = ("vmamba_tiny", "vit_small_patch16_224")

_CONVS5, _CONV_LSTM = "convs5_moving_mnist_300", "conv_lstm_moving_mnist"
_TRANSFORMER, _RECOMPUTED = "transformer_moving_mnist", "transformer_recomputed_moving_mnist"
_UNCAPTURED = [name for name, run in VIDEO_RUNS.items() if not run.captured]
_GROWTH = (10, 100, 300, 600, 1000)

SUITES: dict[str, Suite] = {
    "cpu": Suite(
        (ModelJob(("vmamba_tiny", "swin_tiny_patch4_window7_224"), batch=1),),
        seconds=10,
        device="cpu",
    ),
    "ops": Suite(
        (
            OperatorJob("ss2d core", ("stage*",), (torch.float16, torch.bfloat16)),
            OperatorJob("selective_scan", ("vim_tiny",), _BOTH_WIDTHS),
            OperatorJob("ssd_scan", ("hydra_vit_*", "long"), _BOTH_WIDTHS),
            OperatorJob("linear_scan", ("convs5_300",), _BOTH_WIDTHS),
        ),
        seconds=0.5,
    ),
    "models": Suite(
        (
            *(
                ModelJob(models, batch=128, autocast=torch.bfloat16, run=run)
                for models in (_TINY, *((name,) for name in _FAMILIES))
                for run in reversed(RUNS)
            ),
        ),
        seconds=1,
    ),
    "resolution": Suite(
        (
            *(
                ModelJob(_TINY, batch=batch, size=size, autocast=torch.bfloat16)
                for size, batch in ((224, 128), (384, 32), (512, 32), (768, 8), (1024, 8), (1536, 2), (2048, 2))
            ),
            *(
                ModelJob(_LINEAR_AND_QUADRATIC, batch=batch, size=size, autocast=torch.bfloat16, run="compiled")
                for size, batch in ((1024, 8), (1536, 2))
            ),
        ),
        seconds=0.5,
    ),
    "volumes": Suite((VolumeJob(_VOLUMES + _TWINS),), seconds=1),
    "video": Suite(
        (
            OperatorJob("linear_scan", ("convs5_300",), _BOTH_WIDTHS, beside_copy=True),
            *(
                TrainingJob(model, run, batch=8, frames=300, checkpointing="maps")
                for run in VIDEO_RUNS
                for model in (_CONVS5, _CONV_LSTM, _TRANSFORMER)
            ),
            # No graph can capture layers that are checkpointed: it keeps the state of generators.
            *(
                TrainingJob(model, run, batch=8, frames=600, checkpointing="all")
                for run in _UNCAPTURED
                for model in (_CONVS5, _CONV_LSTM, _TRANSFORMER, "convs5_moving_mnist_600")
            ),
            *(GenerationJob(model, run) for model in (_CONVS5, _CONV_LSTM) for run in VIDEO_RUNS),
            # As long as its state grows, no graph serves for the next frame.
            *(
                GenerationJob(model, run, contexts=_GROWTH, summed=True)
                for model in (_TRANSFORMER, _RECOMPUTED)
                for run in _UNCAPTURED
            ),
        ),
        seconds=1,
    ),
    "smoke": Suite(
        (
            OperatorJob("routed_scan", ("prime_grid", "atrous", "volume"), _BOTH_WIDTHS),
            OperatorJob("selective_scan", ("prime_length", "state_16"), _BOTH_WIDTHS),
            OperatorJob("ssd_scan", ("two_chunks", "groups"), _BOTH_WIDTHS),
            OperatorJob("linear_scan", ("by_channel", "by_element"), _BOTH_WIDTHS),
            ModelJob(("vmamba_tiny",), batch=32, autocast=torch.bfloat16),
        ),
        seconds=0.3,
    ),
}


def run(
    suite: str, device: torch.device | str | None = None, *, only: Sequence[str] = (), seconds: float | None = None
) -> Iterator[Row]:
    """Rows of a suite, each as soon as it is measured; bad arguments raise at once.

    Args:
        suite: a name in ``SUITES``.
        device: where to measure; by default the suite's own device, else CUDA if there is one, else the CPU.
        only: patterns of labels, as of file names; other jobs are left out, so that a suite runs in pieces.
        seconds: for each row; by default the suite's own. What takes longer is run a few times all the same.

    Raises:
        ValueError: unknown suite, a device other than the one the suite is for, no job with such a label, or no time.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; suites are {', '.join(SUITES)}")
    plan = SUITES[suite]
    place = torch.device(device or plan.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if plan.device not in (None, place.type):
        raise ValueError(f"suite {suite!r} is for {plan.device}; got device {str(place)!r}")
    if seconds is not None and seconds <= 0:
        raise ValueError(f"seconds must be more than 0; got {seconds}")
    jobs = [job for job in plan.jobs if not only or any(fnmatch(job.label, pattern) for pattern in only)]
    if not jobs:
        labels = dict.fromkeys(job.label for job in plan.jobs)
        raise ValueError(f"no job of suite {suite!r} is {' or '.join(only)}; jobs are: {'; '.join(labels)}")
    return _rows(suite, jobs, place, seconds or plan.seconds)


def _rows(suite: str, jobs: Sequence[Job], device: torch.device, seconds: float) -> Iterator[Row]:
    environment = describe(device)
    for job in jobs:
        for fields in job.rows(device, seconds):
            yield Row(suite=suite, environment=environment, **fields)
