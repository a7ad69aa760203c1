"""Cross scan and merge, written to be read: the definition that every backend is tested against."""

import torch
from torch import Tensor


def cross_scan_ref(x: Tensor, index: Tensor) -> Tensor:
    """Reads the cells of x in the order of each route: (b, c, cells), (k, l) -> (b, k, c, l)."""
    return torch.stack([x[:, :, order] for order in index], dim=1)


def cross_merge_ref(y: Tensor, index: Tensor, cells: int) -> Tensor:
    """Puts every step back on its cell and adds the routes: (b, k, c, l), (k, l) -> (b, c, cells)."""
    merged = y.new_zeros(y.shape[0], y.shape[2], cells)
    for route, order in enumerate(index):
        merged[:, :, order] += y[:, route]
    return merged
