"""Initial values of state-space parameters."""

import math

import torch
from torch import Tensor


def s4d_real_(A_log: Tensor) -> Tensor:
    """A = -(1, ..., n) in every channel, as log(-A): S4D-real (arXiv:2206.11893). Shape (..., n)."""
    with torch.no_grad():
        return A_log.copy_(torch.log(torch.arange(1, A_log.shape[-1] + 1, dtype=A_log.dtype)).expand_as(A_log))


def dt_bias_(bias: Tensor, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """softplus(bias) is log-uniform in [low, high] and at least ``floor`` (Mamba, arXiv:2312.00752, section 3.6)."""
    with torch.no_grad():
        dt = bias.uniform_(math.log(low), math.log(high)).exp_().clamp_(min=floor)
        return bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
