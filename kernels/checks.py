"""The checks that every operator shares, and the one wording of their errors."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_shape(op: str, name: str, tensor: Tensor, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless ``tensor`` has exactly the named ``sizes``."""
    if tuple(tensor.shape) != tuple(sizes.values()):
        wanted = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"{op}: {name} must have shape ({wanted}); got {tuple(tensor.shape)}")


def check_tensors(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raises ValueError unless all given tensors are real floating point, on one device and not empty."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be real floating point; got {tensor.dtype}. Convert it first")
        if 0 in tensor.shape:
            raise ValueError(f"{op}: {name} is empty, shape {tuple(tensor.shape)}; every size must be at least 1")
    devices = {name: tensor.device for name, tensor in given.items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device; got {where}")


def check_dtype(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raises ValueError unless the given tensors share one dtype."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(dtypes.values())) > 1:
        what = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{op}: these tensors must share one dtype; got {what}. Cast them to one")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that a scan accumulates in: float64 if any input is, float32 otherwise."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
