"""Routed scan of half-precision maps on NVIDIA GPUs: launches the Gluon kernels, which walk routes in blocks.

``gpu.py`` asks :func:`serves` and takes its own kernels for all else. With enough samples, channels and routes a route
is one walk; with fewer it is cut into segments, which are walked side by side and joined by a scan of what they carry.
"""

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..routes import Route, Routes, index_table
from .gpu_plan import ceil_div, kept, launches

try:
    from .gpu_block_kernels import carry_kernel, gradient_kernel, merge_kernel, walk_kernel
    from .gpu_block_parts import STEPS
    from .gpu_pair_kernels import pair_gradient_kernel, pair_kernel, pair_walk_kernel

    HAS_GLUON = True
except (ImportError, AttributeError):  # a Triton before 3.6
    HAS_GLUON = False

_SCRATCH = {"forward": 320 * 2**20, "backward": 512 * 2**20, "backward, pairs": 112 * 2**20, "sums": 160 * 2**20}
"""Bytes of scratch memory, twice as many for several states; a batch that needs more is done in parts. Sums of pairs
are made in parts of their own, smaller ones: their blocks are independent, so that few samples fill the device."""

_WALKS = 4
"""Warps per multiprocessor from which on routes are not cut; with fewer, they are cut to have twice as many."""

_PIECE = 25
"""Blocks of a pair at most that a program does one after the other; fewer while a multiprocessor has not 8 warps."""

_ROWS = 1024
"""Rows of partial gradients of the weights, one of each program: where segments are more, programs do several each."""

_SHORTEST = 64
"""Steps of a segment at least."""

_KEPT = 16
"""Blocks at most whose states programs of pairs keep in shared memory."""

_ALIGNED = 8
"""Samples that a part of a batch is a multiple of, so that half-precision maps of any size begin at 16 bytes."""


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def serves(x: Tensor, low_rank: Tensor, dt_weight: Tensor, A: Tensor) -> bool:
    """Whether these kernels take such a call. Half-precision maps that they do not take are told of, once a reason.

    Raises:
        RuntimeError: VSSM_STRICT_BACKEND=1 is set, and a half-precision map is not taken.
    """
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    obstacle = _obstacle(
        x.dtype == low_rank.dtype and A.dtype != torch.float64,
        (x.shape[-1], dt_weight.shape[-1], A.shape[-1]),
        max(x[0].numel(), low_rank[0].numel()) < 2**31,
        x.device,
    )
    if obstacle:
        _tell(obstacle)
    return obstacle is None


@cache
def _obstacle(same_dtype: bool, sizes: tuple[int, int, int], small: bool, device: torch.device) -> str | None:
    """What keeps a half-precision map from these kernels, and what to do; None if nothing does."""
    channels, rank, state = sizes
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is not an NVIDIA GPU of compute capability 8.0 or higher"
    if not HAS_GLUON:
        return f"Triton {triton.__version__} has no Gluon; install Triton 3.6 or newer, which torch 2.11 brings"
    if not same_dtype:
        return "the projections are not in the map's dtype, or A is in float64; cast them"
    if channels % 8:
        return f"{channels} channels are no multiple of 8"
    if state > 1 and state % 2:
        return f"the state size {state} is odd"
    if rank + 2 * (state == 1) > 64 or state > 64:
        return f"the rank {rank} of Δ is over 62, or the state size {state} over 64"
    return None if small else "a sample has 2^31 or more values"


@cache
def _tell(obstacle: str) -> None:
    text = f"routed_scan takes its slower Triton kernels for a half-precision map: {obstacle}"
    if os.environ.get("VSSM_STRICT_BACKEND") == "1":
        raise RuntimeError(f"{text} (an error because VSSM_STRICT_BACKEND=1 is set)")
    warnings.warn(text, stacklevel=2)


_captured: list[Tensor] = []
"""Tables whose addresses CUDA graphs hold: they outlive the cache, which is bounded."""


@lru_cache(maxsize=256)
def order_table(routes: Routes, grid: tuple[int, ...], steps: int, device: torch.device) -> Tensor:
    """The cell of each step, (k, steps) int32; -1 where there is none: at the end, or in front of a reversed route."""
    index = index_table(routes, grid, torch.device("cpu"))
    table = torch.full((len(routes), steps), -1, dtype=torch.int32)
    for row, order, route in zip(table, index, routes, strict=True):
        row[slice(steps - len(order), None) if route.reverse else slice(len(order))] = order
    return kept(table, device)


def pairs(routes: Routes, grid: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """Each route with its reverse, by index, if all have one and each pair visits the whole grid; None otherwise."""
    paths: dict[Route, dict[bool, int]] = {}
    for k, route in enumerate(routes):
        paths.setdefault(replace(route, reverse=False), {})[route.reverse] = k
    if 2 * len(paths) != len(routes) or any(len(path) != 2 for path in paths.values()):
        return None
    return [(path[False], path[True]) for path in paths.values()] if _whole(routes[0], grid) else None


def _whole(route: Route, grid: tuple[int, ...]) -> bool:
    return route.length(grid) == math.prod(grid)


class _Part(NamedTuple):
    """Samples that go together, and the routes cut for them. Programs of pairs take ``piece`` blocks each, of ``group``
    samples at a time, or segments in a backward."""

    samples: slice
    batch: int
    segments: int
    segment: int
    piece: int
    group: int
    order: Tensor


class _Launcher:
    """Launches one kernel with arguments that differ in their tensors only, all of them aligned to 16 bytes.

    Triton works out at each launch which of its compiled programs fits the arguments, and asks the driver about each
    tensor, which takes longer than the kernels of small maps. Here all that it looks at is fixed, so the program of the
    first launch is kept and handed addresses.
    """

    def __init__(self, function: Any, grid: tuple[int, ...], numbers: Sequence[int], constants: Mapping[str, Any]):
        self.function, self.numbers, self.constants = function, numbers, constants
        self.grid = grid + (1,) * (3 - len(grid))
        self.program: Any = None

    def __call__(self, *tensors: Tensor) -> None:
        if self.program is None:
            program = self.function[self.grid](*tensors, *self.numbers, **self.constants)
            names = self.function.arg_names[len(tensors) + len(self.numbers) :]
            self.program, self.rest = program[self.grid], (*self.numbers, *map(self.constants.__getitem__, names))
        else:
            self.program(*map(Tensor.data_ptr, tensors), *self.rest)


class _Call:
    """What a forward or a backward needs besides its tensors."""

    def __init__(
        self,
        shape: torch.Size,
        dtypes: tuple[torch.dtype, ...],
        device: torch.device,
        rank: int,
        state: int,
        columns: int,
        routes: Routes,
        backward: bool,
    ) -> None:
        self.launchers: dict[tuple[object, ...], _Launcher] = {}
        batch, *axes, channels = shape
        grid = tuple(axes)
        self.routes, self.channels, self.rank, self.state = len(routes), channels, rank, state
        self.cells, self.length, self.columns = math.prod(grid), routes[0].length(grid), columns
        self.weights = [self.routes * channels * size for size in (rank, 1, state, 1)]  # of dt_weight, dt_bias, A, D

        found = launches(routes, grid)
        self.direct = len(found) == 1 and found[0].routes == 1  # no cell is visited twice
        self.full = all(launch.full for launch in found)
        self.whole = _whole(routes[0], grid)
        self.pairs = pairs(routes, grid) if state == 1 else None

        self.warps = 2 if state == 1 and channels % 64 == 0 else 1
        block_d = 32 * self.warps
        self.blocks = ceil_div(channels, block_d)
        self.constants = {
            "RANK": rank,
            "STATE": state,
            "R": max(16, triton.next_power_of_2(rank + 2 * (state == 1))),
            "N": 1 if state == 1 else max(16, triton.next_power_of_2(state)),
            "D": block_d,
            "ALIGN": math.gcd(8, rank + 2 if state == 1 else math.gcd(rank, state)),
            "BLOCKS": _KEPT,
            "W": self.warps,
        }
        self.parts = list(self._cut(batch, grid, routes, device, backward))

    def _cut(
        self, batch: int, grid: tuple[int, ...], routes: Routes, device: torch.device, backward: bool
    ) -> Iterator[_Part]:
        """Parts of the batch within the scratch memory, and for each the segments that fill the device."""
        units, steps = multiprocessors(device), ceil_div(self.length, STEPS)
        gradient = backward and bool(self.pairs)
        kind = "backward, pairs" if gradient else "backward" if backward else "forward"
        needed = self._scratch(backward, steps)
        size = ceil_div(batch, min(batch, max(1, ceil_div(needed * batch, _SCRATCH[kind] * min(2, self.state)))))
        if size < batch:
            size = ceil_div(size, _ALIGNED) * _ALIGNED
        for first in range(0, batch, size):
            samples = slice(first, min(first + size, batch))
            count = samples.stop - samples.start
            warps = count * self.blocks * self.warps
            walks, wanted = warps * self.routes, _WALKS * units
            pieces = 1 if walks >= wanted else min(ceil_div(2 * wanted, walks), ceil_div(self.length, _SHORTEST))
            if gradient:
                pieces = max(pieces, ceil_div(steps, _KEPT))
                pieces = min(range(pieces, pieces + ceil_div(pieces, 4)), key=lambda n: n * ceil_div(steps, n))
            segment = ceil_div(steps, pieces) * STEPS
            segments = ceil_div(self.length, segment)
            group = count
            if self.pairs and len(self.pairs) > 1 and not gradient:
                group = min(count, max(1, _SCRATCH["sums"] // (4 * self.cells * self.channels)))
                group = ceil_div(count, ceil_div(count, group))
            if gradient:
                piece = min(segments, ceil_div(count * segments, _ROWS))
            else:
                blocks = segments * segment // STEPS
                piece = min(_PIECE, max(4, blocks * group * self.blocks * self.warps // (8 * units)))
                piece = ceil_div(blocks, ceil_div(blocks, piece))  # alike, so that all end together
            order = order_table(routes, grid, segments * segment, device)
            yield _Part(samples, count, segments, segment, piece, group, order)

    def _scratch(self, backward: bool, steps: int) -> int:
        """Bytes of scratch memory that a sample needs: partial maps, states before each block, partial gradients."""
        columns = self.blocks * self.cells * self.columns if backward and self.blocks > 1 else 0
        if backward and self.pairs:
            return 2 * columns + 4 * sum(self.weights) * ceil_div(steps, _KEPT)
        maps = 0 if self.direct or self.pairs else self.routes
        floats = maps * self.cells * self.channels + columns
        if backward or self.pairs:
            floats += self.routes * steps * self.state * self.channels
        return 4 * floats

    def launch(
        self, part: _Part, kernel: Any, grid: tuple[int, ...], *tensors: Tensor, numbers: tuple[int, ...] = (),
        **flags: bool,
    ) -> None:  # fmt: skip
        """``flags`` are the kernel's own constants, in a fixed order; the call's are known."""
        key = (kernel, part.samples.start, numbers, *flags.values())
        launcher = self.launchers.get(key)
        if launcher is None:
            constants = {name: value for name, value in self.constants.items() if name in kernel.arg_names}
            constants.update(flags, num_warps=self.warps)
            sizes = self.cells, self.channels, self.columns, part.segment, part.segments
            launcher = self.launchers[key] = _Launcher(kernel, grid, sizes + numbers, constants)
        launcher(*tensors)

    def merge(self, part: _Part, parts: Tensor, out: Tensor) -> None:
        """The sum of ``parts`` over their first axis."""
        key = merge_kernel, part.samples.start, parts.dtype, parts.shape, out.dtype
        launcher = self.launchers.get(key)
        if launcher is None:
            grid, numbers = (ceil_div(out.numel(), 1024),), (parts.shape[0], out.numel())
            launcher = _Launcher(merge_kernel, grid, numbers, {"BLOCK": 1024, "num_warps": 4})
            self.launchers[key] = launcher
        launcher(parts, out)

    def cut(self, maps: Sequence[Tensor], part: _Part) -> Sequence[Tensor]:
        """A part of each map; the maps themselves if it is all of them."""
        return maps if len(self.parts) == 1 else tuple(m[part.samples] for m in maps)

    def walks(self, part: _Part) -> tuple[int, int]:
        return part.batch * part.segments * self.blocks, self.routes

    def per_segment(self, part: _Part, like: Tensor, *sizes: int) -> Tensor:
        """Scratch memory for each segment of each route; where routes are not cut, kernels do not look at it."""
        if part.segments == 1:
            return like
        return like.new_empty(self.routes, part.batch * part.segments, *sizes, self.channels)

    def carry(self, part: _Part, total: Tensor, state: Tensor, A: Tensor, *, back: bool) -> None:
        """What comes into each segment, in the place of what each leaves."""
        key = carry_kernel, part.samples.start, back
        launcher = self.launchers.get(key)
        if launcher is None:
            block_s = min(128, max(2, triton.next_power_of_2(part.segments)))
            grid = (self.routes * part.batch * self.state * ceil_div(self.channels, 32),)
            numbers = part.segments, self.channels, self.state, part.batch, self.routes
            warps = 4 if block_s > 32 else 1
            constants = {"BACK": back, "BLOCK_S": block_s, "BLOCK_D": 32, "num_warps": warps}
            launcher = self.launchers[key] = _Launcher(carry_kernel, grid, numbers, constants)
        launcher(total, state, A)


_cached_call = lru_cache(maxsize=256)(_Call)


def _call(x: Tensor, low_rank: Tensor, weights: tuple[Tensor, ...], routes: Routes, *, backward: bool) -> _Call:
    dt_weight, dt_bias, A, D = weights
    dtypes = x.dtype, dt_weight.dtype, dt_bias.dtype, D.dtype
    sizes = dt_weight.shape[-1], A.shape[-1], low_rank.shape[-1]
    call = _cached_call(x.shape, dtypes, x.device, *sizes, routes, backward)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.extend(part.order for part in call.parts)
    return call


def _aligned(m: Tensor) -> Tensor:
    """A tensor that begins at a multiple of 16 bytes: maps are copied in such pieces, and programs are kept for it."""
    return m if m.data_ptr() % 16 == 0 else m.clone()


def _by_state(A: Tensor) -> Tensor:
    """A as float32, laid out (n, k, c)."""
    A = A.float()
    return A if A.shape[-1] == 1 else A.permute(2, 0, 1).contiguous()


def _even(low_rank: Tensor, dt_weight: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Both with one rank more, of zeros, if the rank of Δ is odd: rows are copied in pieces of two columns."""
    rank, state = dt_weight.shape[-1], A.shape[-1]
    if rank % 2 == 0:
        return low_rank, dt_weight
    columns = low_rank.unflatten(-1, (-1, rank + 2 * state))
    padded = columns.new_zeros(*columns.shape[:-1], rank + 1 + 2 * state)
    padded[..., :rank] = columns[..., :rank]
    padded[..., rank + 1 :] = columns[..., rank:]
    return padded.flatten(-2), F.pad(dt_weight, (0, 1))


def _odd(dlow_rank: Tensor, dt_weight: Tensor, A: Tensor) -> Tensor:
    """Undo ``_even`` for the gradient of its first result."""
    rank, state = dt_weight.shape[-1], A.shape[-1]
    columns = dlow_rank.unflatten(-1, (-1, rank + 1 + 2 * state))
    return torch.cat((columns[..., :rank], columns[..., rank + 1 :]), dim=-1).flatten(-2)


def forward(
    x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: Routes
) -> Tensor:
    """See :func:`vision_ssm.kernels.routed_scan.op.routed_scan`; all tensors contiguous."""
    low_rank, dt_weight = _even(low_rank, dt_weight, A)
    call = _call(x, low_rank, (dt_weight, dt_bias, A, D), routes, backward=False)
    y = torch.empty_like(x) if call.full else torch.zeros_like(x)
    x, low_rank, dt_weight, dt_bias, A, D = map(_aligned, (x, low_rank, dt_weight, dt_bias, _by_state(A), D))
    for part in call.parts:
        maps = call.cut((x, low_rank, y), part)
        (_forward_pairs if call.pairs else _forward)(call, part, maps, dt_weight, dt_bias, A, D)
    return y


def _forward(
    call: _Call, part: _Part, maps: Sequence[Tensor], dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> None:
    """Every route by itself."""
    x, low_rank, y = maps
    total, state = call.per_segment(part, A), call.per_segment(part, A, call.state)
    partial = y if call.direct else x.new_empty(call.routes, *y.shape, dtype=torch.float32)
    if not (call.direct or call.whole):
        partial.zero_()
    split = part.segments > 1
    for output in (False, True) if split else (True,):
        call.launch(
            part, walk_kernel, call.walks(part),
            x, x, low_rank, dt_weight, dt_bias, A, D, part.order, state, total, state, state, state, state, partial,
            OUTPUT=output, TRACE=False, ADJOINT=False, PARTIAL=not call.direct, SPLIT=split,
        )  # fmt: skip
        if not output:
            call.carry(part, total, state, A, back=False)
    if not call.direct:
        call.merge(part, partial, y)


def _forward_pairs(
    call: _Call, part: _Part, maps: Sequence[Tensor], dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> None:
    """Each route and its reverse together, pair after pair: small maps in a walk ahead and back, others from the states
    before each block."""
    x, low_rank, y = maps
    assert call.pairs is not None
    blocks = part.segments * part.segment // STEPS
    small = part.segments == 1 and blocks <= _KEPT
    partial = A
    if len(call.pairs) > 1:
        partial = x.new_empty(part.batch if small else part.group, *x.shape[1:], dtype=torch.float32)
    pairs = [(pair, {"ADD": i > 0, "LAST": i == len(call.pairs) - 1}) for i, pair in enumerate(call.pairs)]
    if small:
        for pair, flags in pairs:
            call.launch(
                part, pair_walk_kernel, (part.batch * call.blocks,),
                x, low_rank, dt_weight, dt_bias, A, D, part.order, partial, y, numbers=pair, **flags,
            )  # fmt: skip
        return
    history, prefix, state, _ = _trace(call, part, x, None, low_rank, dt_weight, dt_bias, A, D)
    for first in range(0, part.batch, part.group):
        programs = min(part.group, part.batch - first) * ceil_div(blocks, part.piece) * call.blocks
        for pair, flags in pairs:
            call.launch(
                part, pair_kernel, (programs,),
                x, low_rank, dt_weight, dt_bias, A, D, part.order, state, history, prefix, partial, y,
                numbers=(*pair, part.piece, first, part.batch), **flags, SPLIT=part.segments > 1,
            )  # fmt: skip


def _trace(
    call: _Call, part: _Part, x: Tensor, dy: Tensor | None, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor,
    A: Tensor, D: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The state that a segment of its own has before each block, and ΣΔ up to it; what comes into each segment: the
    state and, given ``dy``, the gradient from behind."""
    split = part.segments > 1
    rows, blocks = part.batch * part.segments, part.segment // STEPS
    history = x.new_empty(call.routes, rows, blocks, call.state, call.channels, dtype=torch.float32)
    prefix = call.per_segment(part, A, blocks)
    total, state = call.per_segment(part, A), call.per_segment(part, A, call.state)
    adjoint = state if dy is None else call.per_segment(part, A, call.state)
    call.launch(
        part, walk_kernel, call.walks(part),
        x, x if dy is None else dy, low_rank, dt_weight, dt_bias, A, D, part.order, state, total, state, adjoint,
        history, prefix, x, OUTPUT=False, TRACE=True, ADJOINT=split and dy is not None,
        PARTIAL=False, SPLIT=split,
    )  # fmt: skip
    if split:
        call.carry(part, total, state, A, back=False)
        if dy is not None:
            call.carry(part, total, adjoint, A, back=True)
    return history, prefix, state, adjoint


def backward(
    dy: Tensor, x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: Routes
) -> tuple[Tensor, ...]:
    """Gradients by x, low_rank, dt_weight, dt_bias, A and D, each in the dtype of its tensor; all contiguous."""
    if dt_weight.shape[-1] % 2:
        dx, dlow_rank, ddt_weight, *grads = backward(dy, x, *_even(low_rank, dt_weight, A), dt_bias, A, D, routes)
        return dx, _odd(dlow_rank, dt_weight, A), ddt_weight[..., :-1].contiguous(), *grads
    weights = dt_weight, dt_bias, A, D
    call = _call(x, low_rank, weights, routes, backward=True)
    dx = torch.empty_like(x) if call.full else torch.zeros_like(x)
    dlow_rank = torch.empty_like(low_rank) if call.whole else torch.zeros_like(low_rank)
    dy, x, low_rank = map(_aligned, (dy, x, low_rank))
    dt_weight, dt_bias, A, D = map(_aligned, (dt_weight, dt_bias, _by_state(A), D))
    sums = x.new_empty(len(call.parts), sum(call.weights), dtype=torch.float32)
    for row, part in zip(sums, call.parts, strict=True):
        maps = call.cut((dy, x, low_rank, dx, dlow_rank), part)
        dweights = (_backward_pairs if call.pairs else _backward)(call, part, maps, dt_weight, dt_bias, A, D)
        torch.sum(dweights, 0, out=row)
    grads = torch.ops.aten.split_with_sizes_copy(sums.sum(0) if len(sums) > 1 else sums[0], call.weights)
    return dx, dlow_rank, *(grad.view(m.shape).to(m.dtype) for grad, m in zip(grads, weights, strict=True))


def _backward(
    call: _Call, part: _Part, maps: Sequence[Tensor], dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> Tensor:
    """Writes a part of the batch; returns the gradients of the weights, one row for each segment."""
    dy, x, low_rank, dx, dlow_rank = maps
    history, prefix, state, adjoint = _trace(call, part, x, dy, low_rank, dt_weight, dt_bias, A, D)
    partial = dx if call.direct else x.new_empty(call.routes, *dx.shape, dtype=torch.float32)
    dlow = dlow_rank
    if call.blocks > 1:
        dlow = x.new_empty(call.blocks, *low_rank.shape, dtype=torch.float32)
    if not call.whole:
        if not call.direct:
            partial.zero_()
        dlow.zero_()
    dweights = x.new_empty(part.batch * part.segments, sum(call.weights), dtype=torch.float32)
    call.launch(
        part, gradient_kernel, call.walks(part),
        dy, x, low_rank, dt_weight, dt_bias, A, D, part.order, state, history, prefix, adjoint, partial, dlow, dweights,
        PARTIAL=not call.direct, SPLIT=part.segments > 1,
    )  # fmt: skip
    if not call.direct:
        call.merge(part, partial, dx)
    if dlow is not dlow_rank:
        call.merge(part, dlow, dlow_rank)
    return dweights


def _backward_pairs(
    call: _Call, part: _Part, maps: Sequence[Tensor], dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> Tensor:
    """As ``_backward``, each route and its reverse together, one pair after the other on the result itself: sums of
    pairs are rounded to the map's dtype."""
    dy, x, low_rank, dx, dlow_rank = maps
    assert call.pairs is not None
    total = call.per_segment(part, A)
    state, adjoint = call.per_segment(part, A, call.state), call.per_segment(part, A, call.state)
    split = part.segments > 1
    if split:
        call.launch(
            part, walk_kernel, call.walks(part),
            x, dy, low_rank, dt_weight, dt_bias, A, D, part.order, state, total, state, adjoint, state, state, x,
            OUTPUT=False, TRACE=False, ADJOINT=True, PARTIAL=False, SPLIT=True,
        )  # fmt: skip
        call.carry(part, total, state, A, back=False)
        call.carry(part, total, adjoint, A, back=True)
    dlow = low_rank.new_empty(call.blocks, *low_rank.shape) if call.blocks > 1 else dlow_rank
    pieces = ceil_div(part.segments, part.piece)
    dweights = x.new_empty(part.batch * pieces, sum(call.weights), dtype=torch.float32)
    for place, (ahead, back) in enumerate(call.pairs):
        call.launch(
            part, pair_gradient_kernel, (part.batch * pieces * call.blocks,),
            dy, x, low_rank, dt_weight, dt_bias, A, D, part.order, state, adjoint, dx, dlow, dweights,
            numbers=(ahead, back, part.piece), ADD=place > 0, SPLIT=split,
        )  # fmt: skip
    if dlow is not dlow_rank:
        call.merge(part, dlow, dlow_rank)
    return dweights
