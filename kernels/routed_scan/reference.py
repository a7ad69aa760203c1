"""Routed scan, written to be read: cross scan, projection of Δ, selective scan and merge, one after the other."""

import torch
from torch import Tensor

from ..cross_scan.reference import cross_merge_ref, cross_scan_ref
from ..selective_scan.reference import selective_scan_ref


def routed_scan_ref(
    x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, index: Tensor
) -> Tensor:
    """The selective scan of a map along each route, outputs added cell by cell (VMamba, arXiv:2401.10166, section 4.2).

    Shapes: x (b, cells, c); low_rank (b, cells, k*(r + 2n)), per route Δ (r), B (n), C (n), or (b, cells, r + 2n) for
    all routes; dt_weight (k, c, r); dt_bias, D (k, c); A (k, c, n); index (k, l). Returns (b, cells, c) in x's dtype.
    """
    batch, cells, width = x.shape
    routes, state, rank = index.shape[0], A.shape[-1], dt_weight.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)

    u = cross_scan_ref(x.to(dtype).transpose(1, 2), index)  # (b, k, c, l)
    maps = low_rank.to(dtype).reshape(batch, cells, -1, rank + 2 * state).expand(-1, -1, routes, -1)
    steps = torch.stack([maps[:, order, route] for route, order in enumerate(index)], dim=1)  # (b, k, l, r + 2n)
    dt, B, C = (part.transpose(2, 3) for part in steps.split([rank, state, state], dim=-1))
    delta = torch.einsum("kcr,bkrl->bkcl", dt_weight.to(dtype), dt)

    y, _ = selective_scan_ref(
        u.flatten(1, 2), delta.flatten(1, 2), A.flatten(0, 1), B, C, D.flatten(), dt_bias.flatten(), delta_softplus=True
    )
    return cross_merge_ref(y.unflatten(1, (routes, width)), index, cells).transpose(1, 2).to(x.dtype)
