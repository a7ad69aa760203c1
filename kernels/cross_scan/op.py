"""``cross_scan`` and ``cross_merge``: cells of a grid to the sequences of its routes, and the adjoint."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import gpu_module
from ..checks import check_shape, check_tensors
from ..routes import Routes, check_routes, decode, encode, index_table
from . import cpu

__all__ = ["cross_merge", "cross_scan"]


def cross_scan(x: Tensor, routes: Routes) -> Tensor:
    """Reads the cells of a map in the order of each route.

    Args:
        x: map, (b, c, *grid), such as (b, c, h, w).
        routes: k routes over the grid, equally long.

    Returns:
        Sequences (b, k, c, l).

    Raises:
        ValueError: a route does not fit the grid, or the routes visit different numbers of cells.
    """
    check_routes(routes, x.shape[2:])
    return torch.ops.vision_ssm.cross_scan(x, encode(routes))


def cross_merge(y: Tensor, routes: Routes, grid: Sequence[int]) -> Tensor:
    """Puts every step of every route back on its cell and adds them up: the adjoint of :func:`cross_scan`.

    Args:
        y: sequences, (b, k, c, l).
        routes: the k routes.
        grid: sizes of the map, such as (h, w). Cells that no route visits are 0.

    Returns:
        Map (b, c, *grid).

    Raises:
        ValueError: ``y`` does not hold ``routes`` over ``grid``.
    """
    check_routes(routes, grid)
    return torch.ops.vision_ssm.cross_merge(y, encode(routes), list(grid))


def _check_scan(x: Tensor) -> None:
    check_tensors("cross_scan", {"x": x})
    if x.dim() < 3:
        raise ValueError(f"cross_scan: x must have shape (batch, channels, *grid); got {tuple(x.shape)}")


def _check_merge(y: Tensor, code: Sequence[int], grid: Sequence[int]) -> None:
    check_tensors("cross_merge", {"y": y})
    routes = decode(code, len(grid))
    if y.dim() != 4:
        raise ValueError(f"cross_merge: y must have shape (batch, routes, channels, length); got {tuple(y.shape)}")
    sizes = {"batch": y.shape[0], "routes": len(routes), "channels": y.shape[2], "length": routes[0].length(grid)}
    check_shape("cross_merge", "y", y, sizes)


@torch.library.custom_op(
    "vision_ssm::cross_scan", mutates_args=(), device_types="cpu", schema="(Tensor x, int[] routes) -> Tensor"
)
def _scan(x: Tensor, routes: Sequence[int]) -> Tensor:
    _check_scan(x)
    grid = x.shape[2:]
    return cpu.cross_scan(x.flatten(2), index_table(decode(routes, len(grid)), tuple(grid), x.device))


@_scan.register_kernel("cuda")
def _(x: Tensor, routes: Sequence[int]) -> Tensor:
    _check_scan(x)
    with torch.cuda.device(x.device):
        return gpu_module("cross_scan").cross_scan(x, decode(routes, x.dim() - 2))


@_scan.register_fake
def _(x: Tensor, routes: Sequence[int]) -> Tensor:
    _check_scan(x)
    decoded = decode(routes, x.dim() - 2)
    return x.new_empty(x.shape[0], len(decoded), x.shape[1], decoded[0].length(x.shape[2:]))


@torch.library.custom_op(
    "vision_ssm::cross_merge",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor y, int[] routes, SymInt[] grid) -> Tensor",
)
def _merge(y: Tensor, routes: Sequence[int], grid: Sequence[int]) -> Tensor:
    _check_merge(y, routes, grid)
    index = index_table(decode(routes, len(grid)), tuple(grid), y.device)
    return cpu.cross_merge(y, index, math.prod(grid)).unflatten(2, tuple(grid))


@_merge.register_kernel("cuda")
def _(y: Tensor, routes: Sequence[int], grid: Sequence[int]) -> Tensor:
    _check_merge(y, routes, grid)
    with torch.cuda.device(y.device):
        return gpu_module("cross_scan").cross_merge(y, decode(routes, len(grid)), tuple(grid))


@_merge.register_fake
def _(y: Tensor, routes: Sequence[int], grid: Sequence[int]) -> Tensor:
    _check_merge(y, routes, grid)
    return y.new_empty(y.shape[0], y.shape[2], *grid)


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.routes = inputs
    ctx.grid = x.shape[2:]


def _scan_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return torch.ops.vision_ssm.cross_merge(dy.contiguous(), ctx.routes, ctx.grid), None


def _keep_merge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.routes, _ = inputs


def _merge_gradient(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.vision_ssm.cross_scan(dx.contiguous(), ctx.routes), None, None


_scan.register_autograd(_scan_gradient, setup_context=_keep_scan)
_merge.register_autograd(_merge_gradient, setup_context=_keep_merge)
