"""``ssd_scan``: the scalar-decay selective scan of Mamba-2 as a torch.library operator."""

from typing import Any

import torch
from torch import Tensor

from ..backends import gpu_module
from ..checks import check_dtype, check_shape, check_tensors, compute_dtype
from . import chunked

__all__ = ["ssd_scan"]

_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_state, bool reverse"


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """State-space duality scan: each head's state decays by one scalar (Mamba-2, arXiv:2405.21060, section 6).

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_tᵀ,  y_t = S_t C_t

    States accumulate in float32, or in float64 if ``x`` or ``A`` is.

    Args:
        x: (b, l, h, p): h heads of width p.
        dt: step sizes, positive: (b, l, h).
        A: negative decay rates, (h).
        B: (b, l, g, n): g groups, each for h / g heads side by side.
        C: (b, l, g, n).
        initial_state: (b, h, p, n); zeros by default.
        reverse: from the last step to the first. ``initial_state`` is then what comes after the last step.

    Returns:
        y (b, l, h, p) in x's dtype, and the state after the last step visited, (b, h, p, n).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return torch.ops.vision_ssm.ssd_scan(x, dt, A, B, C, initial_state, bool(reverse))


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, reverse: bool) -> None:
    op = "ssd_scan"
    check_tensors(op, {"x": x, "dt": dt, "A": A, "B": B, "C": C, "initial_state": initial_state})
    check_dtype(op, {"x": x, "B": B, "C": C})
    if x.dim() != 4:
        raise ValueError(f"{op}: x must have shape (batch, length, heads, width); got {tuple(x.shape)}")
    batch, length, heads, width = x.shape
    if B.dim() != 4 or heads % B.shape[2]:
        raise ValueError(
            f"{op}: B must have shape (batch, length, groups, state) with groups dividing heads={heads}; "
            f"got {tuple(B.shape)}"
        )
    sequences = {"batch": batch, "length": length, "groups": B.shape[2], "state": B.shape[3]}
    check_shape(op, "dt", dt, {"batch": batch, "length": length, "heads": heads})
    check_shape(op, "A", A, {"heads": heads})
    check_shape(op, "B", B, sequences)
    check_shape(op, "C", C, sequences)
    if initial_state is not None:
        sizes = {"batch": batch, "heads": heads, "width": width, "state": B.shape[3]}
        check_shape(op, "initial_state", initial_state, sizes)


@torch.library.custom_op("vision_ssm::ssd_scan", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs)
    with torch.autocast(inputs[0].device.type, enabled=False):
        return chunked.forward(*inputs)


@_forward.register_kernel("cuda")
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs)
    with torch.cuda.device(inputs[0].device):
        return gpu_module("ssd_scan").forward(*inputs)


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs)
    x, _, A, B, *_, initial_state, _ = inputs
    batch, _, heads, width = x.shape
    last = x.new_empty(batch, heads, width, B.shape[3], dtype=compute_dtype(x, A, initial_state))
    return torch.empty_like(x, memory_format=torch.contiguous_format), last


@torch.library.custom_op(
    "vision_ssm::ssd_scan_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor dlast, {_INPUTS}) -> (" + ", ".join(["Tensor"] * 6) + ")",
)
def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    with torch.autocast(inputs[0].device.type, enabled=False):
        grads = chunked.backward(*inputs)
    return tuple(grad.to(m.dtype).contiguous() for grad, m in zip(grads, _differentiated(*inputs), strict=True))


@_backward.register_kernel("cuda")
def _(*inputs: Any) -> tuple[Tensor, ...]:
    with torch.cuda.device(inputs[0].device):
        return gpu_module("ssd_scan").backward(*inputs)


@_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(m, memory_format=torch.contiguous_format) for m in _differentiated(*inputs))


def _differentiated(dy: Tensor, dlast: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The inputs that have a gradient; where there is no initial state, what its gradient is like."""
    *tensors, initial_state, _ = inputs
    return *tensors, dlast if initial_state is None else initial_state


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = torch.ops.vision_ssm.ssd_scan_backward(dy, dlast, *tensors, ctx.reverse)
    return *(None if m is None else grad for m, grad in zip(tensors, grads, strict=True)), None


_forward.register_autograd(_gradients, setup_context=_setup_context)
