"""Routed scan on the CPU: the plain composition, channels-last throughout, with its backward written out."""

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..recurrence import softplus
from ..selective_scan.cpu import scan, scan_backward


def _gather(m: Tensor, index: Tensor) -> Tensor:
    """Cells in the order of each route: (b, cells, c), (k, l) -> (b, k, l, c)."""
    return m.index_select(1, index.flatten()).unflatten(1, tuple(index.shape))


def _merge(y: Tensor, index: Tensor, cells: int) -> Tensor:
    """Steps back on their cells, added up: (b, k, l, c), (k, l) -> (b, cells, c)."""
    merged = y.new_zeros(y.shape[0], cells, y.shape[3])
    for route, order in enumerate(index):
        merged.index_add_(1, order, y[:, route])
    return merged


def _sequences(
    x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, state: int, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, low-rank Δ, Δ before softplus, B and C along each route, (b, k, l, ·)."""
    routes, _, rank = dt_weight.shape
    maps = low_rank.unflatten(2, (-1, rank + 2 * state)).transpose(1, 2).expand(-1, routes, -1, -1)  # (b, k, cells, ·)
    steps = torch.stack([maps[:, route].index_select(1, order) for route, order in enumerate(index)], dim=1)
    dt, B, C = steps.split([rank, state, state], dim=-1)
    raw = dt @ dt_weight.transpose(1, 2) + dt_bias[:, None]
    return _gather(x, index), dt, raw, B, C


def forward(
    x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, index: Tensor
) -> Tensor:
    """See :func:`vision_ssm.kernels.routed_scan.op.routed_scan`; the grid is flat and ``index`` (k, l) its routes."""
    dtype = compute_dtype(x, A)
    wide, low_rank, dt_weight, dt_bias, A, D = (m.to(dtype) for m in (x, low_rank, dt_weight, dt_bias, A, D))
    u, _, raw, B, C = _sequences(wide, low_rank, dt_weight, dt_bias, A.shape[-1], index)
    y, _ = scan(u, softplus(raw), A, B, C, None)
    return _merge(y.addcmul_(u, D[:, None]), index, x.shape[1]).to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, index: Tensor
) -> tuple[Tensor, ...]:
    """Gradients by x, low_rank, dt_weight, dt_bias, A and D, in the dtype that the scan computes in."""
    dtype = compute_dtype(x, A)
    dy, x, low_rank, dt_weight, dt_bias, A, D = (m.to(dtype) for m in (dy, x, low_rank, dt_weight, dt_bias, A, D))
    u, dt, raw, B, C = _sequences(x, low_rank, dt_weight, dt_bias, A.shape[-1], index)
    dy = _gather(dy, index)
    dlast = dy.new_zeros(dy.shape[0], *A.shape)
    du, ddelta, dA, dB, dC, _ = scan_backward(dy, dlast, u, softplus(raw), A, B, C, None)
    du.addcmul_(dy, D[:, None])
    draw = ddelta * torch.sigmoid(raw)

    dsteps = torch.cat([draw @ dt_weight, dB, dC], dim=-1)
    dmaps = dsteps.new_zeros(low_rank.shape).unflatten(2, (-1, dsteps.shape[-1]))
    for route, order in enumerate(index):
        dmaps[:, order, route % dmaps.shape[2]] = dsteps[:, route]
    return (
        _merge(du, index, x.shape[1]),
        dmaps.flatten(2),
        torch.einsum("bklc,bklr->kcr", draw, dt),
        draw.sum((0, 2)),
        dA,
        (dy * u).sum((0, 2)),
    )
