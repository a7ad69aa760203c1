"""``routed_scan``: the selective scan of a map along several routes, fused into one torch.library operator."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import gpu_module
from ..checks import check_shape, check_tensors
from ..routes import Routes, check_routes, decode, disjoint, encode, index_table
from . import cpu

__all__ = ["routed_scan"]

# A map may come as a list of cells (b, cells, c) with its grid beside it: torch.compile takes every tensor of four axes
# for channels-first, and would lay a channels-last map out anew where a convolution is near. No grid: x has its axes.
_INPUTS = "Tensor x, Tensor low_rank, Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D, int[] routes, SymInt[] grid"


def routed_scan(
    x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: Routes
) -> Tensor:
    """Selective scan of a channels-last map along each route, outputs added cell by cell (arXiv:2401.10166, sec. 4.2).

    Per route, with u, Δ's low-rank part, B and C read in the route's order::

        Δ = softplus(dt_weight · dt + dt_bias),   h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,   y_t = C_t h_t + D u_t

    The projections are per cell, so they commute with the order of visiting: compute them for all routes by one matrix
    product on the map. States accumulate in float32, or in float64 if ``x`` or ``A`` is.

    Args:
        x: map, (b, *grid, c), such as (b, h, w, c).
        low_rank: projections of the map, (b, *grid, k*(r + 2n)); per route Δ (r), B (n), C (n). Where no cell is
            visited by two routes, (b, *grid, r + 2n) will do: each cell's for the route that visits it.
        dt_weight: Δ from its low-rank part, (k, c, r).
        dt_bias: (k, c).
        A: negative decay rates, (k, c, n).
        D: skip weights, (k, c).
        routes: k routes over the grid, equally long. Cells that no route visits are 0.

    Returns:
        Map (b, *grid, c) in x's dtype.

    Raises:
        ValueError: shapes or devices do not fit, or the routes do not fit the grid.
    """
    if x.dim() < 3:
        raise ValueError(f"routed_scan: x must have shape (batch, *grid, channels); got {tuple(x.shape)}")
    grid = x.shape[1:-1]
    check_routes(routes, grid)
    code = encode(routes)
    if not torch.compiler.is_compiling():
        return torch.ops.vision_ssm.routed_scan(x, low_rank, dt_weight, dt_bias, A, D, code, [])
    # Inductor takes every map for one with its channels in front, and may lay it out anew; a list of cells it does not.
    if low_rank.shape[1:-1] != grid:
        raise ValueError(
            "routed_scan: low_rank must have the grid of x, shape "
            f"{(*x.shape[:-1], 'routes*(rank+2*state)')}; got {tuple(low_rank.shape)}"
        )
    flat = x.flatten(1, -2), low_rank.flatten(1, -2)
    return torch.ops.vision_ssm.routed_scan(*flat, dt_weight, dt_bias, A, D, code, grid).view(x.shape)


def _grid(x: Tensor, grid: Sequence[int]) -> tuple[int, ...]:
    return tuple(grid) or tuple(x.shape[1:-1])


def _check(
    x: Tensor,
    low_rank: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    routes: Sequence[int],
    grid: Sequence[int],
) -> None:
    op = "routed_scan"
    tensors = {"x": x, "low_rank": low_rank, "dt_weight": dt_weight, "dt_bias": dt_bias, "A": A, "D": D}
    check_tensors(op, tensors)
    for name, tensor, axes in (("dt_weight", dt_weight, "routes, channels, rank"), ("A", A, "routes, channels, state")):
        if tensor.dim() != 3:
            raise ValueError(f"{op}: {name} must have shape ({axes}); got {tuple(tensor.shape)}")
    if x.dim() < 3 or (grid and x.dim() != 3):
        raise ValueError(f"{op}: x must have shape (batch, *grid, channels); got {tuple(x.shape)}")
    decoded = decode(routes, len(_grid(x, grid)))
    on_grid = {f"grid{axis}": size for axis, size in enumerate(x.shape[1:-1])}
    cells = {"batch": x.shape[0], **({"cells": math.prod(grid)} if grid else on_grid)}
    count, rank, state, channels = len(decoded), dt_weight.shape[-1], A.shape[-1], x.shape[-1]
    check_shape(op, "x", x, {**cells, "channels": channels})
    if low_rank.shape[-1] == rank + 2 * state and disjoint(decoded):
        check_shape(op, "low_rank", low_rank, {**cells, "rank+2*state": rank + 2 * state})
    else:
        check_shape(op, "low_rank", low_rank, {**cells, "routes*(rank+2*state)": count * (rank + 2 * state)})
    check_shape(op, "dt_weight", dt_weight, {"routes": count, "channels": channels, "rank": rank})
    check_shape(op, "A", A, {"routes": count, "channels": channels, "state": state})
    for name, tensor in (("dt_bias", dt_bias), ("D", D)):
        check_shape(op, name, tensor, {"routes": count, "channels": channels})


@torch.library.custom_op(
    "vision_ssm::routed_scan", mutates_args=(), device_types="cpu", schema=f"({_INPUTS}) -> Tensor"
)
def _forward(*inputs: Any) -> Tensor:
    _check(*inputs)
    x, low_rank, *weights, routes, grid = inputs
    grid = _grid(x, grid)
    index = index_table(decode(routes, len(grid)), grid, x.device)
    flat = [x.flatten(1, -2), low_rank.flatten(1, -2), *weights, index]
    with torch.autocast("cpu", enabled=False):
        return cpu.forward(*flat).view(x.shape)


@_forward.register_kernel("cuda")
def _(*inputs: Any) -> Tensor:
    _check(*inputs)
    x, *tensors, routes, grid = inputs
    maps = x.unflatten(1, grid) if grid else x
    with torch.cuda.device(x.device):
        y: Tensor = gpu_module("routed_scan").forward(maps, *tensors, decode(routes, maps.dim() - 2))
    return y.view(x.shape)


@_forward.register_fake
def _(*inputs: Any) -> Tensor:
    _check(*inputs)
    return torch.empty_like(inputs[0], memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "vision_ssm::routed_scan_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    dy, x, low_rank, *weights, routes, grid = inputs
    grid = _grid(x, grid)
    index = index_table(decode(routes, len(grid)), grid, x.device)
    flat = [*(m.flatten(1, -2) for m in (dy, x, low_rank)), *weights, index]
    with torch.autocast("cpu", enabled=False):
        grads = cpu.backward(*flat)
    inputs = x, low_rank, *weights
    return tuple(reshaped(grad, m.shape).to(m.dtype) for grad, m in zip(grads, inputs, strict=True))


@_backward.register_kernel("cuda")
def _(*inputs: Any) -> tuple[Tensor, ...]:
    dy, x, *tensors, routes, grid = inputs
    maps = x.unflatten(1, grid) if grid else x
    with torch.cuda.device(x.device):
        dx, *grads = gpu_module("routed_scan").backward(dy, maps, *tensors, decode(routes, maps.dim() - 2))
    return reshaped(dx, x.shape), *grads


def reshaped(grad: Tensor, shape: torch.Size) -> Tensor:
    """A gradient that does not count as a view of one that nobody holds: what else is to be added by autograd is added
    in its place, where for a view it would make a new map."""
    result: Tensor = torch.ops.aten._unsafe_view(grad, shape)
    return result


@_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    _, *tensors, _, _ = inputs
    return tuple(torch.empty_like(m, memory_format=torch.contiguous_format) for m in tensors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.routes, ctx.grid = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # read once: checkpointing recomputes them at the first reading and forbids a second
    return *torch.ops.vision_ssm.routed_scan_backward(dy, *tensors, ctx.routes, ctx.grid), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
