"""FLOP formulas of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Additions, multiplications and exponentials count one each. Per step, channel and state the recurrence takes nine: Δ A
and its exponential, Δ B u (three, as peers count them), the update of h (two), and C h (two); D u adds one per step and
channel. Published tables count like this (9 b l d n), so that they compare. A backward counts twice its forward, as
matrix products do: that kernels compute states anew is not work of the model.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .routes import decode

_RECURRENCE = 9
_DUALITY = 5  # S decays (one), dt x Bᵀ enters (two), S C (two)


def selective_scan_flops(u: Sequence[int], delta: Sequence[int], A: Sequence[int], *rest: Any, **options: Any) -> int:
    """From the shapes (b, d, l) of u and (d, n) of A."""
    return math.prod(u) * (_RECURRENCE * A[1] + 1)


def routed_scan_flops(
    x: Sequence[int],
    low_rank: Sequence[int],
    dt_weight: Sequence[int],
    dt_bias: Sequence[int],
    A: Sequence[int],
    D: Sequence[int],
    routes: Sequence[int],
    grid: Sequence[int],
    **options: Any,
) -> int:
    """The selective scan of every route, and the projection of Δ: two for each of its r columns."""
    batch, *axes, channels = x
    grid = grid or axes
    steps = sum(route.length(grid) for route in decode(routes, len(grid)))
    return batch * steps * channels * (2 * dt_weight[2] + _RECURRENCE * A[2] + 1)


def ssd_scan_flops(
    x: Sequence[int], dt: Sequence[int], A: Sequence[int], B: Sequence[int], *rest: Any, **options: Any
) -> int:
    """From the shapes (b, l, h, p) of x and (b, l, g, n) of B; dt x is one for each channel, exp(dt A) two a head."""
    batch, length, heads, width = x
    return batch * length * heads * (width * (_DUALITY * B[3] + 1) + 2)


def linear_scan_flops(
    a: Sequence[int], b: Sequence[int], initial_state: Any, resets: Any, pairs: bool, **options: Any
) -> int:
    """From the shape of b: a product and a sum for each number, of which a pair takes eight and a real number two."""
    return math.prod(b) * (4 if pairs else 2)


def _twice(formula: Any, gradients: int) -> Any:
    """The formula of a backward, which takes ``gradients`` tensors before the inputs."""
    return lambda *shapes, **options: 2 * formula(*shapes[gradients:], **options)


def _moves_only(*shapes: Any, **options: Any) -> int:
    return 0


def _merges(y: Sequence[int], routes: Any, grid: Any, **options: Any) -> int:
    """One addition for each step of every route after the first."""
    batch, count, channels, length = y
    return batch * (count - 1) * channels * length


_ops = torch.ops.vision_ssm
for _op, _formula in (
    (_ops.cross_scan, _moves_only),
    (_ops.cross_merge, _merges),
    (_ops.selective_scan, selective_scan_flops),
    (_ops.selective_scan_backward, _twice(selective_scan_flops, 2)),
    (_ops.routed_scan, routed_scan_flops),
    (_ops.routed_scan_backward, _twice(routed_scan_flops, 1)),
    (_ops.linear_scan, linear_scan_flops),
    (_ops.linear_scan_backward, _twice(linear_scan_flops, 2)),
    (_ops.ssd_scan, ssd_scan_flops),
    (_ops.ssd_scan_backward, _twice(ssd_scan_flops, 2)),
):
    register_flop_formula(_op)(_formula)
