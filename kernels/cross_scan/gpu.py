"""Cross scan and merge on the GPU, in Triton: addresses are arithmetic in the step (``Route.affine``).

Hilbert curves, which are no arithmetic, are left to PyTorch's indexing.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routes import Route, Routes, index_table

_AXES = 3
_BLOCK = 256
_RUNTIME = ["CELLS", "LENGTH", "CHANNELS", "ROUTES", "ROUTE", "SIZE1", "SIZE2", "STEP0", "STEP1", "STEP2", "FIRST"]


@triton.jit(do_not_specialize=_RUNTIME)
def route_kernel(
    x, y,
    CELLS, LENGTH, CHANNELS, ROUTES, ROUTE, SIZE1, SIZE2, STEP0, STEP1, STEP2, FIRST,
    MERGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies one route of the map x (b, c, cells) to y (b, k, c, l), or, for MERGE, adds it from y to x.

    A program owns BLOCK steps of one channel of one sample. Within a launch every cell is visited at most once.
    """
    blocks = tl.cdiv(LENGTH, BLOCK)
    program = tl.program_id(0).to(tl.int64)  # offsets pass 2**31
    row = program // blocks
    sample, channel = row // CHANNELS, row % CHANNELS
    step = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = step < LENGTH
    cell = FIRST + step // SIZE2 // SIZE1 * STEP0 + step // SIZE2 % SIZE1 * STEP1 + step % SIZE2 * STEP2
    at_x = x + row * CELLS + cell
    at_y = y + ((sample * ROUTES + ROUTE) * CHANNELS + channel) * LENGTH + step
    if MERGE:
        tl.store(at_x, tl.load(at_x, mask) + tl.load(at_y, mask), mask)
    else:
        tl.store(at_y, tl.load(at_x, mask), mask)


def cross_scan(x: Tensor, routes: Routes) -> Tensor:
    """(b, c, *grid) -> (b, k, c, l)"""
    batch, channels, *grid = x.shape
    x = x.contiguous()
    y = x.new_empty(batch, len(routes), channels, routes[0].length(grid))
    for k, route in enumerate(routes):
        _launch(x, y, route, k, grid, merge=False)
    return y


def cross_merge(y: Tensor, routes: Routes, grid: tuple[int, ...]) -> Tensor:
    """(b, k, c, l) -> (b, c, *grid)"""
    wide = torch.promote_types(y.dtype, torch.float32)
    x = y.new_zeros(y.shape[0], y.shape[2], *grid, dtype=wide)
    y, dtype = y.contiguous().to(wide), y.dtype
    for k, route in enumerate(routes):  # in order, so that two runs agree bit for bit
        _launch(x, y, route, k, grid, merge=True)
    return x.to(dtype)


def _launch(x: Tensor, y: Tensor, route: Route, k: int, grid: tuple[int, ...] | list[int], *, merge: bool) -> None:
    if len(grid) > _AXES:
        raise ValueError(f"cross scan on a GPU takes grids of up to {_AXES} axes; got {tuple(grid)}")
    batch, routes, channels, length = y.shape
    if route.hilbert:
        cells, index = x.view(batch, channels, -1), index_table((route,), tuple(grid), x.device)[0]
        if merge:
            cells[..., index] += y[:, k]
        else:
            y[:, k] = cells[..., index]
        return
    order = route.affine(grid)
    _, size1, size2 = (1,) * (_AXES - len(grid)) + order.sizes
    steps = (0,) * (_AXES - len(grid)) + order.steps
    programs = batch * channels * triton.cdiv(length, _BLOCK)
    route_kernel[(programs,)](
        x, y, math.prod(grid), length, channels, routes, k, size1, size2, *steps, order.first, MERGE=merge, BLOCK=_BLOCK
    )
