"""Scalar-decay scan on the GPU: launches the Triton kernels of ``gpu_kernels.py``."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import compute_dtype
from .gpu_kernels import carry_kernel, decay_kernel, gradient_kernel, scan_kernel

_PROGRAMS = 1024
"""Programs that fill a GPU; with fewer, sequences are cut into runs that are walked side by side."""

_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}

_BLOCKS = {
    torch.bfloat16: ((64, 64, 64, 4), (64, 64, 64, 4)),
    torch.float16: ((64, 64, 64, 4), (32, 64, 64, 4)),
    torch.float32: ((32, 64, 64, 8), (16, 32, 64, 8)),
    torch.float64: ((16, 16, 16, 4), (16, 16, 16, 4)),
}
"""Steps of a chunk, channels and states of a tile, and warps, forward and backward: as large as registers hold."""


def block_sizes(dtype: torch.dtype, width: int, state: int, backward: bool) -> dict[str, int]:
    """Tile sizes and warps for operands of ``dtype``; never by the length, so that no length compiles anew."""
    block_l, most_p, most_n, warps = _BLOCKS[dtype][backward]
    block_p, block_n = (max(16, triton.next_power_of_2(size)) for size in (width, state))  # tensor cores take 16
    return {
        "BLOCK_L": block_l,
        "BLOCK_P": min(most_p, block_p),
        "BLOCK_N": min(most_n, block_n),
        "num_warps": warps,
        "num_stages": 2,
    }


class _Sizes(NamedTuple):
    """The sizes that the kernels take, by their names there."""

    batch: int
    length: int
    heads: int
    groups: int
    width: int
    state: int
    runs: int
    chunks: int
    reverse: int


class _Call:
    """What the launches of one forward or backward share.

    Attributes:
        dtype: of states and sums.
        kept: of the states before each chunk, which serve as operands of products.
        blocks_p, blocks_n: blocks of channels, and of states.
        decays: see ``decay_kernel``.
    """

    def __init__(self, inputs: tuple[Tensor, ...], initial_state: Tensor | None, reverse: bool, *, backward: bool):
        self.x, dt, A, self.B, self.C = inputs
        self.initial_state = None if initial_state is None else initial_state.contiguous()
        (batch, length, heads, width), (groups, state) = self.x.shape, self.B.shape[2:]
        self.dtype = compute_dtype(self.x, A, initial_state)
        operands = torch.float64 if self.dtype == torch.float64 else self.x.dtype
        self.kept = torch.bfloat16 if operands == torch.bfloat16 else self.dtype
        blocks = block_sizes(operands, width, state, backward)
        block_l = blocks["BLOCK_L"]
        self.blocks_p, self.blocks_n = triton.cdiv(width, blocks["BLOCK_P"]), triton.cdiv(state, blocks["BLOCK_N"])
        self.chunks = triton.cdiv(length, block_l)
        rows = batch * heads * self.blocks_p * self.blocks_n
        chunks = triton.cdiv(self.chunks, min(self.chunks, triton.cdiv(_PROGRAMS, rows)))
        runs = triton.cdiv(self.chunks, chunks)
        self.sizes = _Sizes(batch, length, heads, groups, width, state, runs, chunks, int(reverse))
        self.grid = (rows * runs,)
        self.constants: dict[str, Any] = {"ACC": _DTYPE[self.dtype], "OPERAND": _DTYPE[self.kept], **blocks}

        self.decays = self.x.new_empty(3, batch, heads, self.chunks * block_l, dtype=self.dtype)
        grid = (batch * self.chunks * triton.cdiv(heads, 16),)
        decay_kernel[grid](
            dt, A, self.decays, batch, length, heads, int(reverse), ACC=_DTYPE[self.dtype], BLOCK_L=block_l, BLOCK_H=16
        )

    def states(self, count: int, dtype: torch.dtype) -> Tensor:
        """Room for ``count`` states of each head."""
        size = self.sizes
        return self.x.new_empty(size.batch, size.heads, count, size.width, size.state, dtype=dtype)

    def scan(
        self,
        entering: Tensor | None,
        *,
        y: Tensor | None = None,
        carries: Tensor | None = None,
        leaving: Tensor | None = None,
    ) -> None:
        """Writes the given tensors; see ``scan_kernel``."""
        scan_kernel[self.grid](
            self.x, self.B, self.C, self.decays, entering, y, carries, leaving, *self.sizes, **self.constants
        )

    def carry(self, states: Tensor, first: Tensor | None, last: Tensor, *, back: bool) -> None:
        """Turns what runs make of zeros into what comes into them, in place; see ``carry_kernel``."""
        size, block = self.sizes, 256
        grid = (size.batch * size.heads * triton.cdiv(size.width * size.state, block),)
        carry_kernel[grid](
            states, self.decays, first, last,
            size.batch, size.length, size.heads, size.runs, size.chunks, size.width * size.state, int(back),
            ACC=self.constants["ACC"], BLOCK_L=self.constants["BLOCK_L"], BLOCK=block,
        )  # fmt: skip

    def entering(self, last: Tensor) -> Tensor | None:
        """The state that enters each run, None for zeros; with several runs, also writes the last state."""
        if self.sizes.runs == 1:
            return self.initial_state
        states = self.states(self.sizes.runs, self.dtype)
        self.scan(None, leaving=states)
        self.carry(states, self.initial_state, last, back=False)
        return states

    def parts(self, like: Tensor, count: int) -> Tensor:
        """Room for ``count`` summands of a tensor; in the tensor's own dtype if there is but one."""
        return like.new_empty(count, *like.shape, dtype=like.dtype if count == 1 else self.dtype)


def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`vision_ssm.kernels.ssd_scan.op.ssd_scan`."""
    inputs = tuple(m.contiguous() for m in (x, dt, A, B, C))
    call = _Call(inputs, initial_state, reverse, backward=False)
    size = call.sizes
    y = call.parts(x, call.blocks_n)
    last = x.new_empty(size.batch, size.heads, size.width, size.state, dtype=call.dtype)
    entering = call.entering(last)
    call.scan(entering, y=y, leaving=last if size.runs == 1 else None)
    return _added(y, x.dtype), last


def backward(
    dy: Tensor,
    dlast: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Gradients by x, dt, A, B, C and the initial state, each in the dtype of its tensor."""
    dy, dlast = dy.contiguous(), dlast.contiguous()
    x, dt, A, B, C = inputs = tuple(m.contiguous() for m in (x, dt, A, B, C))
    call = _Call(inputs, initial_state, reverse, backward=True)
    size = call.sizes
    dinitial = torch.empty_like(dlast)

    carries = call.entering(dinitial)  # the last state is of no use here
    if size.runs < call.chunks or carries is None:
        entering, carries = carries, call.states(call.chunks, call.kept)
        call.scan(entering, carries=carries)

    leaving = dlast
    if size.runs > 1:
        leaving = call.states(size.runs, call.dtype)
        gradient_kernel[call.grid](
            dy, x, A, B, C, call.decays, None, None, None, None, None, None, None, leaving, *size, **call.constants
        )
        call.carry(leaving, dlast, dinitial, back=True)

    dx, ddt = call.parts(x, call.blocks_n), call.parts(dt, call.blocks_n * call.blocks_p)
    dA = call.parts(A, call.grid[0] // size.heads)
    per_head = call.blocks_p, size.batch, size.length, size.groups, size.heads // size.groups, size.state
    dB, dC = (m.new_empty(per_head, dtype=call.dtype) for m in (B, C))
    entering = dinitial if size.runs == 1 else None
    gradient_kernel[call.grid](
        dy, x, A, B, C, call.decays, leaving, carries, dx, ddt, dA, dB, dC, entering, *size, **call.constants
    )
    dB, dC = (m.sum((0, 4)).to(B.dtype) for m in (dB, dC))
    if initial_state is not None:
        dinitial = dinitial.to(initial_state.dtype)
    return _added(dx, x.dtype), _added(ddt, dt.dtype), _added(dA, A.dtype), dB, dC, dinitial
