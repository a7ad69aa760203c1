"""Complex numbers as pairs of real ones in the last axis, as torch.view_as_real makes them."""

import torch
from torch import Tensor

__all__ = ["multiply"]


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product of complex tensors: (..., 2) twice, whose other axes broadcast, -> (..., 2)."""
    (a_re, a_im), (b_re, b_im) = a.unbind(-1), b.unbind(-1)
    return torch.stack([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], dim=-1)
