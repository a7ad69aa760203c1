"""Linear recurrence on the GPU: launches the Triton kernels of ``gpu_kernels.py``."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import compute_dtype
from .gpu_kernels import carry_kernel, gradient_kernel, scan_kernel

_PROGRAMS = 512
"""Programs that keep a GPU's memory busy; with half as many, time is cut into runs that are walked side by side.

That reads what enters twice, so that it must not be done for less.
"""

_THREADS = 128
_BYTES = 16  # that a thread reads at once

_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def block_size(dtype: torch.dtype, pairs: bool) -> int:
    """Numbers of a program, by the dtype of what enters; never by the sizes, so that none compiles anew."""
    return _THREADS * _BYTES // dtype.itemsize // (2 if pairs else 1)


class _Layout(NamedTuple):
    """How the decays of a step lie beside its numbers; see ``read_decays``."""

    channels: int
    span: int
    rows: int


def find_layout(decay: tuple[int, ...], step: tuple[int, ...]) -> _Layout | None:
    """The layout of decays whose shape broadcasts against that of a step; None if they take three runs of axes."""
    decay = (1,) * (len(step) - len(decay)) + decay
    axes = [(size, has != 1) for size, has in zip(step, decay, strict=True) if size != 1]

    def take(present: bool) -> int:
        size = 1
        while axes and axes[-1][1] == present:
            size *= axes.pop()[0]
        return size

    channels = take(True)
    span = channels * take(False)
    rows = take(True)
    take(False)
    return None if axes else _Layout(channels, span, rows)


class _Sizes(NamedTuple):
    """The sizes that the kernels take, by their names there."""

    width: int
    length: int
    batch: int
    steps: int
    runs: int
    channels: int
    span: int
    rows: int


class _Call:
    """What the launches of one forward or backward share; ``b`` is what enters, or its gradient."""

    def __init__(self, a: Tensor, b: Tensor, initial_state: Tensor | None, resets: Tensor | None, pairs: bool):
        self.b = b.contiguous()
        self.initial_state = None if initial_state is None else initial_state.contiguous()
        self.resets = None if resets is None else resets.contiguous().view(torch.uint8)
        self.dtype = compute_dtype(a, b, initial_state)
        numbers = b.shape[: b.dim() - pairs]
        width = math.prod(numbers[1:])
        decay = a.shape[: a.dim() - pairs]
        self.varies = len(decay) == len(numbers) and decay[0] > 1
        step = decay[1:] if len(decay) == len(numbers) else decay
        layout = find_layout(tuple(step), tuple(numbers[1:]))
        if layout is None:
            a = a.expand(len(b) if self.varies else 1, *b.shape[1:])
            layout = _Layout(width, width, 1)
        self.a = a.contiguous()
        whole = layout.channels * layout.rows == width

        block = block_size(b.dtype, pairs)
        self.blocks = triton.cdiv(width, block)
        runs = max(1, min(len(b), _PROGRAMS // self.blocks))
        steps = triton.cdiv(len(b), runs)
        runs = triton.cdiv(len(b), steps)
        self.sizes = _Sizes(width, len(b), numbers[1], steps, runs, *layout)
        self.grid = (self.blocks * runs,)
        self.shared: dict[str, Any] = {
            "ACC": _DTYPE[self.dtype], "PAIRS": pairs, "BLOCK": block, "num_warps": _THREADS // 32
        }  # fmt: skip
        alone = math.prod(numbers[2:]) % block == 0
        self.constants: dict[str, Any] = {**self.shared, "VARIES": self.varies, "WHOLE": whole, "ALONE": alone}

    def states(self) -> Tensor:
        """Room for a state of each run."""
        return self.b.new_empty(self.sizes.runs, *self.b.shape[1:], dtype=self.dtype)

    def carry(self, states: Tensor, decays: Tensor, first: Tensor | None, last: Tensor, *, back: bool) -> None:
        """Turns what runs make of zeros into what comes into them, in place; see ``carry_kernel``."""
        carry_kernel[(self.blocks,)](
            states, decays, first, last, self.sizes.width, self.sizes.runs, BACK=back, **self.shared
        )


def forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, resets: Tensor | None, pairs: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`vision_ssm.kernels.linear_scan.op.linear_scan`."""
    call = _Call(a, b, initial_state, resets, pairs)
    h = torch.empty_like(call.b)
    last = b.new_empty(b.shape[1:], dtype=call.dtype)
    inputs, entering = (call.a, call.b), call.initial_state
    leaving: Tensor | None = last
    if call.sizes.runs > 1:
        states, decays = call.states(), call.states()
        scan_kernel[call.grid](*inputs, None, call.resets, None, states, decays, *call.sizes, **call.constants)
        call.carry(states, decays, call.initial_state, last, back=False)
        entering, leaving = states, None
    scan_kernel[call.grid](*inputs, entering, call.resets, h, leaving, None, *call.sizes, **call.constants)
    return h, last


def backward(
    dh: Tensor,
    dlast: Tensor,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    pairs: bool,
) -> tuple[Tensor, ...]:
    """Gradients by a, b and the initial state, each in the dtype of its tensor, from the states ``h``."""
    call = _Call(a, dh, initial_state, resets, pairs)
    h, dlast = h.contiguous(), dlast.contiguous()
    db = torch.empty_like(h)
    dinitial = torch.empty_like(dlast)
    summands = len(dh) if call.varies else call.sizes.runs
    one_each = a.shape == (summands, *dh.shape[1:])
    da = dh.new_empty(summands, *dh.shape[1:], dtype=a.dtype if one_each else call.dtype)
    leaving = dlast
    entering: Tensor | None = dinitial
    if call.sizes.runs > 1:
        leaving, decays = call.states(), call.states()
        gradient_kernel[call.grid](
            call.b, call.a, None, None, call.resets, None, None, None, leaving, decays, *call.sizes, **call.constants
        )
        call.carry(leaving, decays, dlast, dinitial, back=True)
        entering = None
    gradient_kernel[call.grid](
        call.b, call.a, h, call.initial_state, call.resets, leaving, da, db, entering, None,
        *call.sizes, **call.constants,
    )  # fmt: skip
    if not one_each:
        da = da.sum_to_size((1,) * (dh.dim() - a.dim()) + tuple(a.shape)).view(a.shape).to(a.dtype)
    if initial_state is not None:
        dinitial = dinitial.to(initial_state.dtype)
    return da, db, dinitial
