"""Which backend runs the operators on which device, and why."""

from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

import torch

from .recurrence import HAS_NUMBA


def backend_report() -> str:
    """A table of operators, devices and backends on this machine, to print or to put into a bug report."""
    numba = f"PyTorch with numba {version('numba')}" if HAS_NUMBA else "PyTorch alone (numba, extra [cpu], is faster)"
    cpu = {
        "cross_scan, cross_merge": "PyTorch",
        "selective_scan": numba,
        "routed_scan": numba,
        "linear_scan": "PyTorch, in chunks of time",
        "ssd_scan": "PyTorch, as matrix products in chunks",
        "group_norm_act": "PyTorch",
    }
    rows = [f"vision_ssm operators, torch {torch.__version__}"]
    for operator, backend in cpu.items():
        rows.append(f"  {operator:<24} cpu   {backend}")
        gluon = "; half-precision maps in Gluon where it is there" if operator == "routed_scan" else ""
        rows.append(f"  {'':<24} cuda  {_gpu()}{gluon}")
    return "\n".join(rows)


@lru_cache
def gpu_module(operator: str) -> ModuleType:
    """The Triton module of an operator, imported on the first call: a machine without a GPU need not have Triton.

    Its functions are called with the tensors' device current. They leave nothing to autocast: what they compute in
    torch is in float32 or float64, which autocast keeps.

    Raises:
        RuntimeError: Triton is not installed.
    """
    try:
        return import_module(f".{operator}.gpu", __package__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f"{operator} on a GPU needs Triton, which is not installed; run `pip install triton` "
            "(`triton-windows` on Windows), or move the tensors to the CPU"
        ) from error


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "not used: torch sees no CUDA device"
    if find_spec("triton") is None:
        return f"unavailable on {torch.cuda.get_device_name()}: Triton is not installed"
    try:
        return f"Triton {version('triton')} on {torch.cuda.get_device_name()}"
    except PackageNotFoundError:
        return f"Triton on {torch.cuda.get_device_name()}"
