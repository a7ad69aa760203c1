"""Group norm and an activation on the GPU, in Triton, on maps that have their channels last.

A program holds some whole groups of channels of one map and walks a run of its cells, a tile of rows of them at a time.
Two launches forward: moments of each run, then the output, for which each program puts the moments of all runs of its
map together. Two backward likewise, with sums of gradients for moments. Sums go in a fixed order, so that two calls
agree bit for bit.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import compute_dtype

_TILE = 4096
"""Numbers of a tile: 32 for each thread."""

_CHANNELS = 64
"""Channels of a program, or one group if it has more: 128 bytes in half precision."""

_PROGRAMS = 1024
"""Programs from which runs are made longer, as there are enough to keep a GPU's memory busy."""

_TILES = 8
"""Tiles of a run at most."""

_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}
_SIZES = ["CELLS", "GROUPS", "RUNS", "TILES"]
"""No kernel is compiled for them. It is for CHANNELS: whether 16 divides it decides how wide memory is read."""


@triton.jit
def channels_of_program(CHANNELS, SIZE: tl.constexpr, ROOM: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of a program, each group in ROOM places, and which of them there are."""
    o = tl.arange(0, WIDTH)
    if SIZE == ROOM:  # said so that they are known to follow each other, and are read at once
        c = tl.program_id(1) * WIDTH + o
        there = c < CHANNELS
    else:
        c = (tl.program_id(1) * (WIDTH // ROOM) + o // ROOM) * SIZE + o % ROOM
        there = (o % ROOM < SIZE) & (c < CHANNELS)
    return c, there


@triton.jit
def tile_of_run(i, CELLS, CHANNELS, RUNS, TILES, c, there, ROWS: tl.constexpr):
    """Offsets of the i-th tile of a program's run, which of its numbers there are, and how many rows."""
    place = tl.program_id(0)
    cell = (place % RUNS * TILES + i) * ROWS + tl.arange(0, ROWS)
    row = tl.cast(place // RUNS, tl.int64) * CELLS + cell
    rows = tl.minimum(tl.maximum(CELLS - (place % RUNS * TILES + i) * ROWS, 0), ROWS)
    return row[:, None] * CHANNELS + c[None, :], (cell < CELLS)[:, None] & there[None, :], rows


@triton.jit
def sum_groups(m, ROOM: tl.constexpr, WIDTH: tl.constexpr):
    return tl.sum(tl.reshape(m, [WIDTH // ROOM, ROOM]), 1)


@triton.jit
def spread(m, ROOM: tl.constexpr, WIDTH: tl.constexpr):
    """What groups have, for each of their channels."""
    return tl.reshape(tl.broadcast_to(m[:, None], [WIDTH // ROOM, ROOM]), [WIDTH])


@triton.jit
def sigmoid(x):
    """Without an overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def activate(z, ELU: tl.constexpr):
    """ELU, or else GELU by tanh: (1 + tanh(u)) / 2 is the sigmoid of 2 u."""
    if ELU:
        y = tl.where(z > 0, z, tl.exp(tl.minimum(z, 0.0)) - 1.0)
    else:
        y = z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return y


@triton.jit
def slope(z, ELU: tl.constexpr):
    """The derivative of ``activate``."""
    if ELU:
        d = tl.where(z > 0, 1.0, tl.exp(tl.minimum(z, 0.0)))
    else:
        s = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        d = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    return d


@triton.jit
def merge_moments(count, mean, squares, more, its_mean, its_squares):
    """Mean and sum of squared deviations of two sets of numbers, without subtracting large sums."""
    delta = its_mean - mean
    share = more / tl.maximum(count + more, 1.0)
    return count + more, mean + delta * share, squares + its_squares + delta * delta * count * share


@triton.jit(do_not_specialize=_SIZES)
def moments_kernel(
    x, means, squares, CELLS, CHANNELS, GROUPS, RUNS, TILES,
    SIZE: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each group in each run, (n, runs, groups)."""
    c, there = channels_of_program(CHANNELS, SIZE, ROOM, WIDTH)
    count = tl.full([WIDTH], 0.0, ACC)
    mean, square = tl.zeros([WIDTH], ACC), tl.zeros([WIDTH], ACC)
    for i in range(TILES):
        o, mask, rows = tile_of_run(i, CELLS, CHANNELS, RUNS, TILES, c, there, ROWS)
        v = tl.load(x + o, mask, 0.0).to(ACC)
        more = tl.full([WIDTH], 0.0, ACC) + rows
        own = tl.sum(v, 0) / tl.maximum(more, 1.0)
        off = tl.where(mask, v - own[None, :], 0.0)
        count, mean, square = merge_moments(count, mean, square, more, own, tl.sum(off * off, 0))
    middle = sum_groups(mean, ROOM, WIDTH) / SIZE
    off = tl.where(there, mean - spread(middle, ROOM, WIDTH), 0.0)
    g = tl.program_id(1) * (WIDTH // ROOM) + tl.arange(0, WIDTH // ROOM)
    at = tl.cast(tl.program_id(0), tl.int64) * GROUPS + g
    tl.store(means + at, middle, g < GROUPS)
    tl.store(squares + at, sum_groups(square + off * off * count, ROOM, WIDTH), g < GROUPS)


@triton.jit(do_not_specialize=_SIZES)
def output_kernel(
    x, weight, bias, means, squares, y, mean_out, rstd_out, CELLS, CHANNELS, GROUPS, RUNS, TILES,
    EPS: tl.constexpr, ELU: tl.constexpr,
    SIZE: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Puts the moments of a map's runs together and writes a run of the output; the first, mean and 1 / deviation."""
    c, there = channels_of_program(CHANNELS, SIZE, ROOM, WIDTH)
    g = tl.program_id(1) * (WIDTH // ROOM) + tl.arange(0, WIDTH // ROOM)
    n = tl.cast(tl.program_id(0) // RUNS, tl.int64)
    count = tl.full([WIDTH // ROOM], 0.0, ACC)
    mean, square = tl.zeros([WIDTH // ROOM], ACC), tl.zeros([WIDTH // ROOM], ACC)
    for run in range(RUNS):
        at = (n * RUNS + run) * GROUPS + g
        more = tl.full([WIDTH // ROOM], 0.0, ACC) + tl.minimum(CELLS - run * TILES * ROWS, TILES * ROWS) * SIZE
        its_mean, its_square = tl.load(means + at, g < GROUPS, 0.0), tl.load(squares + at, g < GROUPS, 0.0)
        count, mean, square = merge_moments(count, mean, square, more, its_mean, its_square)
    rstd = 1.0 / tl.sqrt(square / count + EPS)
    if tl.program_id(0) % RUNS == 0:
        tl.store(mean_out + n * GROUPS + g, mean, g < GROUPS)
        tl.store(rstd_out + n * GROUPS + g, rstd, g < GROUPS)
    middle = spread(mean, ROOM, WIDTH)
    scale = spread(rstd, ROOM, WIDTH) * tl.load(weight + c, there, 0.0).to(ACC)
    shift = tl.load(bias + c, there, 0.0).to(ACC)
    for i in range(TILES):
        o, mask, _rows = tile_of_run(i, CELLS, CHANNELS, RUNS, TILES, c, there, ROWS)
        v = tl.load(x + o, mask, 0.0).to(ACC)
        z = (v - middle[None, :]) * scale[None, :] + shift[None, :]
        tl.store(y + o, activate(z, ELU).to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_SIZES)
def sums_kernel(
    dy, x, weight, bias, means, rstds, dweight, dbias, CELLS, CHANNELS, GROUPS, RUNS, TILES,
    ELU: tl.constexpr,
    SIZE: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients by weight and bias of each run, (n, runs, channels)."""
    c, there = channels_of_program(CHANNELS, SIZE, ROOM, WIDTH)
    n = tl.cast(tl.program_id(0) // RUNS, tl.int64)
    mean = tl.load(means + n * GROUPS + c // SIZE, there, 0.0)
    rstd = tl.load(rstds + n * GROUPS + c // SIZE, there, 0.0)
    scale, shift = tl.load(weight + c, there, 0.0).to(ACC), tl.load(bias + c, there, 0.0).to(ACC)
    by_weight, by_bias = tl.zeros([WIDTH], ACC), tl.zeros([WIDTH], ACC)
    for i in range(TILES):
        o, mask, _rows = tile_of_run(i, CELLS, CHANNELS, RUNS, TILES, c, there, ROWS)
        normed = (tl.load(x + o, mask, 0.0).to(ACC) - mean[None, :]) * rstd[None, :]
        dz = tl.load(dy + o, mask, 0.0).to(ACC) * slope(normed * scale[None, :] + shift[None, :], ELU)
        by_weight += tl.sum(dz * normed, 0)
        by_bias += tl.sum(dz, 0)
    at = tl.cast(tl.program_id(0), tl.int64) * CHANNELS + c
    tl.store(dweight + at, by_weight, there)
    tl.store(dbias + at, by_bias, there)


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    dy, x, weight, bias, means, rstds, dweight, dbias, dx, CELLS, CHANNELS, GROUPS, RUNS, TILES,
    ELU: tl.constexpr,
    SIZE: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient by x, for which the sums of a map's runs are put together."""
    c, there = channels_of_program(CHANNELS, SIZE, ROOM, WIDTH)
    n = tl.cast(tl.program_id(0) // RUNS, tl.int64)
    mean = tl.load(means + n * GROUPS + c // SIZE, there, 0.0)
    rstd = tl.load(rstds + n * GROUPS + c // SIZE, there, 0.0)
    scale, shift = tl.load(weight + c, there, 0.0).to(ACC), tl.load(bias + c, there, 0.0).to(ACC)
    by_weight, by_bias = tl.zeros([WIDTH], ACC), tl.zeros([WIDTH], ACC)
    for run in range(RUNS):
        at = (n * RUNS + run) * CHANNELS + c
        by_weight += tl.load(dweight + at, there, 0.0)
        by_bias += tl.load(dbias + at, there, 0.0)
    numbers = tl.full([WIDTH], 0.0, ACC) + CELLS * SIZE
    along = spread(sum_groups(by_weight * scale, ROOM, WIDTH), ROOM, WIDTH) / numbers
    level = spread(sum_groups(by_bias * scale, ROOM, WIDTH), ROOM, WIDTH) / numbers
    for i in range(TILES):
        o, mask, _rows = tile_of_run(i, CELLS, CHANNELS, RUNS, TILES, c, there, ROWS)
        normed = (tl.load(x + o, mask, 0.0).to(ACC) - mean[None, :]) * rstd[None, :]
        dz = tl.load(dy + o, mask, 0.0).to(ACC) * slope(normed * scale[None, :] + shift[None, :], ELU)
        by_x = (dz * scale[None, :] - level[None, :] - normed * along[None, :]) * rstd[None, :]
        tl.store(dx + o, by_x.to(dx.dtype.element_ty), mask)


class _Sizes(NamedTuple):
    """The sizes that the kernels take, in their order there."""

    cells: int
    channels: int
    groups: int
    runs: int
    tiles: int


class _Call:
    """What the two launches of a forward or a backward share."""

    def __init__(self, x: Tensor, groups: int, dtype: torch.dtype, activation: str) -> None:
        maps, channels, *grid = x.shape
        cells, size = grid[0] * grid[1], channels // groups
        room = triton.next_power_of_2(size)
        width = max(room, min(_CHANNELS, triton.next_power_of_2(groups) * room))
        rows = max(1, _TILE // width)
        programs = triton.cdiv(groups * room, width)
        tiles = triton.cdiv(cells, rows)
        tiles = min(tiles, max(1, min(_TILES, maps * programs * tiles // _PROGRAMS)))
        runs = triton.cdiv(cells, rows * tiles)
        self.sizes = _Sizes(cells, channels, groups, runs, tiles)
        self.grid = (maps * runs, programs)
        self.tile: dict[str, Any] = {
            "SIZE": size, "ROOM": room, "ROWS": rows, "WIDTH": width, "ACC": _DTYPE[dtype], "num_warps": 4
        }  # fmt: skip
        self.elu = activation == "elu"


def forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and means and inverse deviations (n, groups)."""
    dtype = compute_dtype(x, weight, bias)
    call = _Call(x, groups, dtype, activation)
    x, weight, bias = x.contiguous(memory_format=torch.channels_last), weight.contiguous(), bias.contiguous()
    means, squares = (x.new_empty(call.grid[0], groups, dtype=dtype) for _ in range(2))
    moments_kernel[call.grid](x, means, squares, *call.sizes, **call.tile)
    mean, rstd = (x.new_empty(len(x), groups, dtype=dtype) for _ in range(2))
    y = torch.empty_like(x, memory_format=torch.channels_last)
    output_kernel[call.grid](
        x, weight, bias, means, squares, y, mean, rstd, *call.sizes, EPS=eps, ELU=call.elu, **call.tile
    )
    return y, mean, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias, each in the dtype of its tensor."""
    call = _Call(x, mean.shape[1], mean.dtype, activation)
    dy, x = (m.contiguous(memory_format=torch.channels_last) for m in (dy, x))
    inputs = dy, x, weight.contiguous(), bias.contiguous(), mean, rstd
    sums = [x.new_empty(call.grid[0], x.shape[1], dtype=mean.dtype) for _ in range(2)]
    sums_kernel[call.grid](*inputs, *sums, *call.sizes, ELU=call.elu, **call.tile)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    gradient_kernel[call.grid](*inputs, *sums, dx, *call.sizes, ELU=call.elu, **call.tile)
    dweight, dbias = (m.sum(dim=0) for m in sums)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)
