"""``linear_scan``: the linear recurrence over time, real or complex, as a torch.library operator."""

from typing import Any

import torch
from torch import Tensor

from ..backends import gpu_module
from ..checks import check_shape, check_tensors, compute_dtype
from . import cpu

__all__ = ["linear_scan", "linear_step"]

_INPUTS = "Tensor? initial_state, Tensor? resets, bool pairs"


def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    pairs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Linear recurrence over time, h_t = a_t h_{t-1} + b_t, number by number.

    Differentiable in a, b and the initial state. States accumulate in float32, or in float64 if an input is. Gradients
    take the states as ``h`` holds them, in b's dtype.

    Complex numbers are pairs of real ones in a last axis of 2 (``pairs``), as ``torch.view_as_real`` lays them out:
    PyTorch has no complex number of two bfloat16, and neither Triton nor autocast has complex numbers at all.

    Args:
        a: decays, of any shape that broadcasts against b's. With b's number of axes and its length they vary with time;
            with fewer axes, or a first one of 1, they are the same at every step. The kernels read them as they are;
            only where axes of b that a lacks lie between three or more that it has are they expanded first.
        b: what enters, (t, n, ...): time, samples, then any axes.
        initial_state: h before the first step, (n, ...); zeros by default.
        resets: bool, (t, n): whether the state is zero before step t, so that clips which share a row stay apart.
        pairs: the last axis of a, b and the states is that of real and imaginary part.

    Returns:
        h like b, and the state after the last step, (n, ...), in the dtype of the accumulation.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    h, last = torch.ops.vision_ssm.linear_scan(a, b, initial_state, resets, bool(pairs))
    return h, last


def linear_step(
    a: Tensor, b: Tensor, state: Tensor | None = None, *, reset: Tensor | None = None, pairs: bool = False
) -> Tensor:
    """One step of :func:`linear_scan`: the next state, (n, ...), from b (n, ...), the state, and reset (n).

    It is what ``linear_scan`` gives for the step within a sequence, in the dtype of its last state.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    resets = None if reset is None else reset.unsqueeze(0)
    return linear_scan(a, b.unsqueeze(0), initial_state=state, resets=resets, pairs=pairs)[1]


def _check(a: Tensor, b: Tensor, initial_state: Tensor | None, resets: Tensor | None, pairs: bool) -> None:
    op = "linear_scan"
    tensors = {"a": a, "b": b, "initial_state": initial_state}
    for name, m in tensors.items():
        if m is not None and m.is_complex():
            raise ValueError(f"{op}: {name} is {m.dtype}; give torch.view_as_real of all complex tensors, pairs=True")
    check_tensors(op, tensors)
    if b.dim() < 2 + pairs:
        raise ValueError(f"{op}: b must have shape (time, batch, ...{', 2' * pairs}); got {tuple(b.shape)}")
    for name, m in (("a", a), ("b", b)):
        if pairs and (m.dim() == 0 or m.shape[-1] != 2):
            raise ValueError(f"{op}: with pairs, the last axis of {name} must be 2; got {tuple(m.shape)}")
    if a.dim() > b.dim() or any(
        size not in (1, whole) for size, whole in zip(reversed(a.shape), reversed(b.shape), strict=False)
    ):
        raise ValueError(
            f"{op}: a must broadcast against b of shape {tuple(b.shape)}: from the last, every axis the same or 1; "
            f"got {tuple(a.shape)}"
        )
    if initial_state is not None and initial_state.shape != b.shape[1:]:
        raise ValueError(
            f"{op}: initial_state must have the shape of one step of b, {tuple(b.shape[1:])}; "
            f"got {tuple(initial_state.shape)}"
        )
    if resets is not None:
        if resets.dtype != torch.bool:
            raise ValueError(f"{op}: resets must be bool; got {resets.dtype}. Compare it with zero first")
        if resets.device != b.device:
            raise ValueError(f"{op}: all tensors must be on one device; got b on {b.device}, resets on {resets.device}")
        check_shape(op, "resets", resets, {"time": b.shape[0], "batch": b.shape[1]})


@torch.library.custom_op(
    "vision_ssm::linear_scan",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor a, Tensor b, {_INPUTS}) -> (Tensor, Tensor)",
)
def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs)
    with torch.autocast("cpu", enabled=False):
        return cpu.forward(*inputs)


@_forward.register_kernel("cuda")
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs)
    with torch.cuda.device(inputs[1].device):
        return gpu_module("linear_scan").forward(*inputs)


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs)
    a, b, initial_state, *_ = inputs
    last = b.new_empty(b.shape[1:], dtype=compute_dtype(a, b, initial_state))
    return torch.empty_like(b, memory_format=torch.contiguous_format), last


@torch.library.custom_op(
    "vision_ssm::linear_scan_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dh, Tensor dlast, Tensor a, Tensor h, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", enabled=False):
        grads = cpu.backward(*inputs)
    return tuple(grad.to(m.dtype).contiguous() for grad, m in zip(grads, _differentiated(*inputs), strict=True))


@_backward.register_kernel("cuda")
def _(*inputs: Any) -> tuple[Tensor, ...]:
    with torch.cuda.device(inputs[0].device):
        return gpu_module("linear_scan").backward(*inputs)


@_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(m, memory_format=torch.contiguous_format) for m in _differentiated(*inputs))


def _differentiated(
    dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """What the gradients are like: a, b as its states are, and the initial state, or the last for want of it."""
    return a, h, dlast if initial_state is None else initial_state


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, _, initial_state, resets, ctx.pairs = inputs
    ctx.save_for_backward(a, output[0], initial_state, resets)


def _gradients(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    a, h, initial_state, resets = ctx.saved_tensors
    grads = torch.ops.vision_ssm.linear_scan_backward(dh, dlast, a, h, initial_state, resets, ctx.pairs)
    da, db, dinitial = grads
    return da, db, None if initial_state is None else dinitial, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
