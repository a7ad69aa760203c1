"""Where a run computes: its device, and the processes that were started together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from mmengine.dist import init_dist

__all__ = ["device", "group_left", "join_group"]


def join_group(launcher: str | None = None) -> str:
    """Joins the processes that were started together: gloo on CPUs, NCCL on GPUs.

    Args:
        launcher: as mmengine calls it; by default "pytorch" under torchrun, else "none".

    Returns:
        The launcher.

    Raises:
        ValueError: it is not what started this process.
    """
    launched = torch.distributed.is_torchelastic_launched()
    launcher = launcher or ("pytorch" if launched else "none")
    if launcher in ("none", "pytorch") and launched != (launcher == "pytorch"):
        started = "torchrun started this process" if launched else "torchrun did not start this process"
        raise ValueError(f"launcher={launcher!r}, but {started}; leave launcher out, it is known by itself")
    if launcher != "none" and not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            init_dist(launcher)
        else:  # mmengine would set a CUDA device
            torch.distributed.init_process_group("gloo")
    return launcher


@contextmanager
def group_left() -> Iterator[None]:
    """Whatever group is joined within is left at the end; after an error, without a wait for the other processes.

    What a process joined before is left alone. Who leaves cannot join again: it is for the end of a command.
    """
    before = torch.distributed.is_initialized()
    try:
        yield
    except BaseException:
        if (joined := torch.distributed.group.WORLD) is not None and not before:
            joined.abort()  # to destroy it, others would have to answer, and they may be waiting
        raise
    if torch.distributed.is_initialized() and not before:
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
