"""Timings of operators and models, each operator with its error against the float64 reference of the same run."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .jobs import RUNS, ModelJob, OperatorJob
from .rows import Row
from .timing import describe

__all__ = ["SUITES", "Suite", "run"]


@dataclass(frozen=True)
class Suite:
    """What to measure, and for how many seconds each row; ``device`` is where, if it matters."""

    jobs: tuple[OperatorJob | ModelJob, ...]
    seconds: float
    device: str | None = None


_BOTH_WIDTHS = (torch.float32, torch.bfloat16)
_TINY = ("vmamba_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny", "mambaout_tiny", "vit_small_patch16_224")
_FAMILIES = ("efficient_vmamba_small", "vim_small", "hydra_vit_base", "vim2_tiny")
_LINEAR_AND_QUADRATIC = ("vmamba_tiny", "vit_small_patch16_224")

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
                for models in (_TINY, _FAMILIES)
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


def run(suite: str, device: torch.device | str | None = None) -> Iterator[Row]:
    """Rows of a suite, each as soon as it is measured; bad arguments raise at once.

    Args:
        suite: a name in ``SUITES``.
        device: where to measure; by default the suite's own device, else CUDA if there is one, else the CPU.

    Raises:
        ValueError: unknown suite, or a device other than the one the suite is for.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; suites are {', '.join(SUITES)}")
    plan = SUITES[suite]
    place = torch.device(device or plan.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if plan.device not in (None, place.type):
        raise ValueError(f"suite {suite!r} is for {plan.device}; got device {str(place)!r}")
    return _rows(suite, place)


def _rows(suite: str, device: torch.device) -> Iterator[Row]:
    environment = describe(device)
    for job in SUITES[suite].jobs:
        for fields in job.rows(device, SUITES[suite].seconds):
            yield Row(suite=suite, environment=environment, **fields)
