"""Selective scan, written to be read: the definition that every backend is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,   y_t = C_t h_t + D u_t   (Mamba, arXiv:2312.00752, algorithm 2).

    Shapes: u, delta (b, g*w, l); A (g*w, n); B, C (b, g, n, l); D, delta_bias (g*w,); initial_state (b, g*w, n).
    Returns y (b, g*w, l) in u's dtype and the last state (b, g*w, n), computed in float32 or, if an input is, float64.
    """
    dtype = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    width = u.shape[1] // B.shape[1]
    x, dt = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    B, C = (m.to(dtype).repeat_interleave(width, dim=1) for m in (B, C))  # (b, g*w, n, l)

    h = x.new_zeros(*x.shape[:2], A.shape[1]) if initial_state is None else initial_state.to(dtype)
    y = []
    for t in range(x.shape[-1]):
        step = dt[..., t, None]
        h = torch.exp(step * A.to(dtype)) * h + step * B[..., t] * x[..., t, None]
        y.append((h * C[..., t]).sum(-1))
    skip = 0 if D is None else D.to(dtype)[:, None] * x
    return (torch.stack(y, dim=-1) + skip).to(u.dtype), h
