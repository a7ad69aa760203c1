"""Routed scan on the GPU: launches the Triton kernels of ``gpu_kernels.py`` over the plan of ``gpu_plan.py``.

What a call needs besides its tensors is worked out once for each signature and kept, since small maps are done faster
than a CPU works it out.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..checks import compute_dtype
from ..routes import Routes
from ..selective_scan.gpu import TRITON_DTYPE
from . import gpu_blocks
from .gpu_kernels import apply_kernel, carry_kernel, gradient_kernel, summary_kernel
from .gpu_plan import AXES, FIELDS, Plan, ceil_div, curved, launches, plan

_PROGRAMS = 4096
"""Programs that fill a GPU; with fewer, runs are cut shorter."""

_SCRATCH = {"forward": 160 * 2**20, "backward": 96 * 2**20}
"""Bytes of scratch memory; a batch that needs more is done in parts."""


def block_sizes(channels: int, state: int, rank: int, backward: bool) -> dict[str, int]:
    """Tile sizes and warps, as measured on an H200: a thread holds 8 or 16 channels of a step, or of their states."""
    block_n = min(8 if backward else 16, triton.next_power_of_2(state))
    block_r = max(16, triton.next_power_of_2(rank + 2))  # two columns of B and C, or of ones, beside those of Δ
    if block_n > 1:
        block_d, warps = 16 if backward or channels <= 16 else 32, 4
    elif channels <= 16:
        block_d, warps = 16, 1
    elif block_r > (16 if backward else 32) and channels % 64 == 0:
        block_d, warps = 64, 4
    else:
        block_d, warps = 32, 2 if backward else 1
    return {"BLOCK_M": 16, "BLOCK_D": block_d, "BLOCK_N": block_n, "BLOCK_R": block_r, "num_warps": warps}


class _Part(NamedTuple):
    """A part of the batch: its samples, its plan, its tiles of runs and where they begin in the whole batch."""

    samples: slice
    plan: Plan
    runs: int
    tiles: int
    first_tile: int
    sizes: tuple[int, ...]


class _Call:
    """What a forward or a backward needs besides its tensors."""

    def __init__(
        self,
        shape: torch.Size,
        map_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        rank: int,
        state: int,
        columns: int,
        routes: Routes,
        backward: bool,
    ):
        batch, *grid, channels = shape
        if len(grid) > AXES:
            raise ValueError(f"routed_scan on a GPU takes grids of at most {AXES} axes; got the grid {tuple(grid)}")
        width = rank + 2 * state
        self.count, self.state, self.channels, self.dtype = len(routes), state, channels, dtype
        self.kept = dtype if dtype == torch.float64 else map_dtype  # the states that backward keeps on its way
        self.weights = [self.count * channels * size for size in (rank, 1, state, 1)]  # of dt_weight, dt_bias, A, D
        self.blocks = block_sizes(channels, state, rank, backward)
        self.tiles_d = ceil_div(channels, self.blocks["BLOCK_D"])
        self.constants = {
            "FIELDS": FIELDS,
            "ALIGN": next(factor for factor in (8, 2, 1) if width % factor == 0),  # each is compiled anew
            "COARSE": map_dtype.itemsize == 2,
            "ACC": TRITON_DTYPE[dtype],
            **self.blocks,
        }

        found = launches(routes, tuple(grid))
        self.groups = max(launch.groups for launch in found)
        self.full = all(launch.full for launch in found)
        self.once = routes[0].length(grid) == math.prod(grid)
        whole_state = state <= self.blocks["BLOCK_N"]
        # Where each cell is visited once, programs store the result itself; else they add up on a partial map.
        self.direct = len(found) == 1 and found[0].routes == 1 and whole_state
        self.direct_low_rank = self.tiles_d == 1 and whole_state
        self.launches = [
            (
                launch.groups,
                (launch.first, launch.routes, int(position > 0 or not (self.full or self.direct))),
                int(self.direct or (self.full and position == len(found) - 1)),
            )
            for position, launch in enumerate(found)
        ]

        cells = math.prod(grid)
        line = cells if curved(routes) else max(grid)
        lines = batch * cells // line
        pieces = ceil_div(_PROGRAMS, ceil_div(lines, self.blocks["BLOCK_M"]) * self.tiles_d)
        per_cell = channels * dtype.itemsize
        if backward:
            history = self.blocks["BLOCK_N"] * self.kept.itemsize * self.groups
            per_cell += channels * history + columns * self.tiles_d * dtype.itemsize
        carried = self.count * channels * ((2 if backward else 1) * state + 1) * dtype.itemsize
        needed = batch * (cells * per_cell + plan(routes, tuple(grid), pieces, device).runs * carried)
        scratch = _SCRATCH["backward" if backward else "forward"]
        size = ceil_div(batch, min(batch, ceil_div(needed, scratch)))
        self.parts: list[_Part] = []
        self.tiles = 0
        for start in range(0, batch, size):
            samples = slice(start, min(start + size, batch))
            count = samples.stop - samples.start
            lines = count * cells // line
            pieces = ceil_div(_PROGRAMS, ceil_div(lines, self.blocks["BLOCK_M"]) * self.tiles_d)
            walk = plan(routes, tuple(grid), pieces, device)
            runs = count * walk.runs
            sizes = count, cells, runs, channels, state, rank, columns
            self.parts.append(_Part(samples, walk, runs, ceil_div(runs, self.blocks["BLOCK_M"]), self.tiles, sizes))
            self.tiles += self.parts[-1].tiles

    def operand(self, low_rank: Tensor) -> Tensor:
        """The low-rank maps as the product with dt_weight takes them: float64 goes with an accumulation in it."""
        return low_rank.to(self.dtype) if torch.float64 in (low_rank.dtype, self.dtype) else low_rank

    def cut(self, maps: Sequence[Tensor], part: _Part) -> Sequence[Tensor]:
        """A part of each map; the maps themselves if it is all of them."""
        return maps if len(self.parts) == 1 else tuple(m[part.samples] for m in maps)

    def result(self, like: Tensor) -> Tensor:
        return torch.empty_like(like) if self.full else torch.zeros_like(like)

    def partial(self, out: Tensor) -> Tensor:
        """The map that routes add up on."""
        if self.direct:
            return out
        return (out.new_empty if self.full else out.new_zeros)(out.shape, dtype=self.dtype)

    def carries(
        self,
        part: _Part,
        x: Tensor,
        dy: Tensor | None,
        low_rank: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        dweights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The states after each run, (k, runs, n, c), and, if ``dy`` is given, the gradients that each sends back."""
        state = x.new_empty(self.count, part.runs, self.state, self.channels, dtype=self.dtype)
        adjoint = state if dy is None else torch.empty_like(state)
        if part.plan.runs == 1 and dy is None:
            return state, adjoint
        total = x.new_empty(self.count, part.runs, self.channels, dtype=self.dtype)
        grid = part.tiles * self.tiles_d, self.count, ceil_div(self.state, self.blocks["BLOCK_N"])
        summary_kernel[grid](
            x, dy, low_rank, dt_weight, dt_bias, A, part.plan.table, part.plan.order, total, state, adjoint, dweights,
            *part.sizes, **self.constants,
        )  # fmt: skip
        if part.plan.runs > 1:
            block_l = 16 if part.plan.runs <= 512 else 128
            grid = part.sizes[0] * self.state * ceil_div(self.channels, 32), self.count, 1 if dy is None else 2
            carry_kernel[grid](
                total, state, adjoint, A, part.plan.table, part.runs, self.channels, self.state,
                FIELDS=FIELDS, ACC=self.constants["ACC"], BLOCK_L=block_l, BLOCK_D=32, num_warps=max(1, block_l // 16),
            )  # fmt: skip
        return state, adjoint


_cached_call = lru_cache(maxsize=1024)(_Call)


def _call(x: Tensor, low_rank: Tensor, dt_weight: Tensor, A: Tensor, routes: Routes, *, backward: bool) -> _Call:
    sizes = dt_weight.shape[-1], A.shape[-1], low_rank.shape[-1]
    return _cached_call(x.shape, x.dtype, compute_dtype(x, A), x.device, *sizes, routes, backward)


def forward(
    x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: Routes
) -> Tensor:
    """See :func:`vision_ssm.kernels.routed_scan.op.routed_scan`."""
    x, low_rank, dt_weight, dt_bias, A, D = (m.contiguous() for m in (x, low_rank, dt_weight, dt_bias, A, D))
    if gpu_blocks.serves(x, low_rank, dt_weight, A):
        return gpu_blocks.forward(x, low_rank, dt_weight, dt_bias, A, D, routes)
    call = _call(x, low_rank, dt_weight, A, routes, backward=False)
    low_rank = call.operand(low_rank)
    y = call.result(x)
    for part in call.parts:
        _forward(call, part, call.cut((x, low_rank, y), part), dt_weight, dt_bias, A, D)
    return y


def _forward(
    call: _Call, part: _Part, maps: Sequence[Tensor], dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> None:
    """Writes a part of the batch; ``maps`` are x, low_rank and y of it."""
    x, low_rank, y = maps
    state, _ = call.carries(part, x, None, low_rank, dt_weight, dt_bias, A, None)
    partial = call.partial(y)
    for groups, flags, last in call.launches:
        apply_kernel[part.tiles * call.tiles_d, groups](
            x, low_rank, dt_weight, dt_bias, A, D, part.plan.table, part.plan.order, state, partial, y,
            *part.sizes, *flags, last, **call.constants,
        )  # fmt: skip
    if not call.launches[-1][-1]:
        y.copy_(partial)


def backward(
    dy: Tensor, x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: Routes
) -> tuple[Tensor, ...]:
    """Gradients by x, low_rank, dt_weight, dt_bias, A and D, each in the dtype of its tensor."""
    dy, x, low_rank, dt_weight, dt_bias, A, D = (m.contiguous() for m in (dy, x, low_rank, dt_weight, dt_bias, A, D))
    if gpu_blocks.serves(x, low_rank, dt_weight, A):
        return gpu_blocks.backward(dy, x, low_rank, dt_weight, dt_bias, A, D, routes)
    weights = dt_weight, dt_bias, A, D
    call = _call(x, low_rank, dt_weight, A, routes, backward=True)
    dx, dlow_rank = call.result(x), torch.empty_like(low_rank)
    low_rank = call.operand(low_rank)
    dweights = x.new_empty(call.tiles, sum(call.weights), dtype=call.dtype)
    for part in call.parts:
        maps = call.cut((dy, x, low_rank, dx, dlow_rank), part)
        _backward(call, part, maps, dweights[part.first_tile :] if part.first_tile else dweights, *weights)
    grads: Sequence[Tensor] = torch.ops.aten.split_with_sizes_copy(dweights.sum(0), call.weights)
    return dx, dlow_rank, *(grad.view(m.shape).to(m.dtype) for grad, m in zip(grads, weights, strict=True))


def _backward(
    call: _Call,
    part: _Part,
    maps: Sequence[Tensor],
    dweights: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
) -> None:
    """Writes a part of the batch, and its rows of the parameters' gradients; ``maps`` are dy, x, low_rank, dx, dlow."""
    dy, x, low_rank, dx, dlow_rank = maps
    state, adjoint = call.carries(part, x, dy, low_rank, dt_weight, dt_bias, A, dweights)
    partial = call.partial(dx)
    tile = call.blocks["BLOCK_M"] * call.blocks["BLOCK_D"] * call.blocks["BLOCK_N"]
    history = x.new_empty(call.groups * part.tiles * call.tiles_d * part.plan.steps * tile, dtype=call.kept)
    dlow = dlow_rank
    if not call.direct_low_rank:
        dlow = x.new_empty(call.tiles_d, *low_rank.shape, dtype=call.dtype)
    if not call.once:  # cells that a route skips have no gradient from it
        dlow.zero_()
    for groups, flags, last in call.launches:
        gradient_kernel[part.tiles * call.tiles_d, groups](
            dy, x, low_rank, dt_weight, dt_bias, A, D, part.plan.table, part.plan.order, state, adjoint, history,
            partial, dx, dlow, dweights, *part.sizes, call.count, part.plan.steps, *flags, last, **call.constants,
        )  # fmt: skip
    if not call.launches[-1][-1]:
        dx.copy_(partial)
    if dlow is not dlow_rank:
        dlow_rank.copy_(dlow.sum(0))
