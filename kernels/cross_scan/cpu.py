"""Cross scan and merge on the CPU: gathers along the routes."""

import torch
from torch import Tensor


def cross_scan(x: Tensor, index: Tensor) -> Tensor:
    """(b, c, cells), (k, l) -> (b, k, c, l)"""
    return x[:, :, index].transpose(1, 2).contiguous()


def cross_merge(y: Tensor, index: Tensor, cells: int) -> Tensor:
    """(b, k, c, l), (k, l) -> (b, c, cells)"""
    merged = y.new_zeros(y.shape[0], y.shape[2], cells, dtype=torch.promote_types(y.dtype, torch.float32))
    for route, order in enumerate(index):
        merged.index_add_(2, order, y[:, route].to(merged.dtype))
    return merged.to(y.dtype)
