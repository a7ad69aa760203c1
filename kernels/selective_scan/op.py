"""``selective_scan``: the input-dependent diagonal recurrence of Mamba (S6) as a torch.library operator."""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import gpu_module
from ..checks import check_dtype, check_shape, check_tensors, compute_dtype
from . import cpu

__all__ = ["selective_scan"]

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, bool delta_softplus, "
    "Tensor? initial_state"
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan, h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,  y_t = C_t h_t + D u_t  (arXiv:2312.00752, algorithm 2).

    Differentiable in every tensor. States accumulate in float32, or in float64 if ``u``, ``A`` or the state is. Under
    autocast, u, delta, B and C are brought to the widest dtype among them; otherwise they must share one.

    Args:
        u: input, (b, d, l).
        delta: step sizes Δ before bias and softplus, (b, d, l), in u's dtype.
        A: negative decay rates, (d, n).
        B, C: input and output maps, (b, n, l), (b, g, n, l) with channel i in group i // (d / g), or constant (d, n).
        D: skip weights, (d,).
        z: gate, (b, d, l); the output is multiplied by SiLU(z) after the D term.
        delta_bias: added to ``delta``, (d,).
        delta_softplus: apply softplus to the biased ``delta``.
        initial_state: h before the first step, (b, d, n); zeros by default.
        return_last_state: also return h after the last step, (b, d, n), in the dtype of the accumulation.

    Returns:
        y (b, d, l) in u's dtype, and the last state if asked for.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    B, C = (_grouped(name, m, u) for name, m in (("B", B), ("C", C)))
    if B.dim() == 4 and C.dim() == 4 and B.shape[1] != C.shape[1]:
        groups = max(B.shape[1], C.shape[1])
        B, C = (m.expand(-1, groups, -1, -1) if m.shape[1] == 1 else m for m in (B, C))
    if u.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(u.device.type):
        wide = reduce(torch.promote_types, (m.dtype for m in (u, delta, B, C)))
        u, delta, B, C = (m.to(wide) for m in (u, delta, B, C))
    y, last = torch.ops.vision_ssm.selective_scan(u, delta, A, B, C, D, delta_bias, bool(delta_softplus), initial_state)
    if z is not None:
        check_shape("selective_scan", "z", z, {"batch": u.shape[0], "dim": u.shape[1], "length": u.shape[2]})
        y = y * F.silu(z)
    return (y, last) if return_last_state else y


def _grouped(name: str, m: Tensor, u: Tensor) -> Tensor:
    """B or C with its group axis, (b, g, n, l)."""
    if m.dim() == 2 and u.dim() == 3:
        check_shape("selective_scan", name, m, {"dim": u.shape[1], "state": m.shape[1]})
        return m.to(u.dtype)[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
    return m.unsqueeze(1) if m.dim() == 3 else m


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> None:
    op = "selective_scan"
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    check_tensors(op, {**tensors, "initial_state": initial_state})
    check_dtype(op, {"u": u, "delta": delta, "B": B, "C": C})
    if u.dim() != 3:
        raise ValueError(f"{op}: u must have shape (batch, dim, length); got {tuple(u.shape)}")
    if A.dim() != 2:
        raise ValueError(f"{op}: A must have shape (dim, state); got {tuple(A.shape)}")
    if B.dim() != 4 or u.shape[1] % B.shape[1]:
        raise ValueError(
            f"{op}: B must have shape (batch, state, length), (batch, groups, state, length) with groups dividing "
            f"dim={u.shape[1]}, or (dim, state); got {tuple(B.shape)}"
        )
    (batch, dim, length), state = u.shape, A.shape[1]
    sequences = {"batch": batch, "groups": B.shape[1], "state": state, "length": length}
    check_shape(op, "delta", delta, {"batch": batch, "dim": dim, "length": length})
    check_shape(op, "A", A, {"dim": dim, "state": state})
    check_shape(op, "B", B, sequences)
    check_shape(op, "C", C, sequences)
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            check_shape(op, name, vector, {"dim": dim})
    if initial_state is not None:
        check_shape(op, "initial_state", initial_state, {"batch": batch, "dim": dim, "state": state})


@torch.library.custom_op(
    "vision_ssm::selective_scan", mutates_args=(), device_types="cpu", schema=f"({_INPUTS}) -> (Tensor, Tensor)"
)
def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs)
    with torch.autocast("cpu", enabled=False):
        return cpu.forward(*inputs)


@_forward.register_kernel("cuda")
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs)
    with torch.cuda.device(inputs[0].device):
        return gpu_module("selective_scan").forward(*inputs)


@_forward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    _check(*inputs)
    u, _, A, *_, initial_state = inputs
    last = u.new_empty(u.shape[0], u.shape[1], A.shape[1], dtype=compute_dtype(u, A, initial_state))
    return torch.empty_like(u, memory_format=torch.contiguous_format), last


@torch.library.custom_op(
    "vision_ssm::selective_scan_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor dy, Tensor dlast, {_INPUTS}) -> (" + ", ".join(["Tensor"] * 8) + ")",
)
def _backward(*inputs: Any) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", enabled=False):
        return cpu.backward(*inputs)


@_backward.register_kernel("cuda")
def _(*inputs: Any) -> tuple[Tensor, ...]:
    with torch.cuda.device(inputs[0].device):
        return gpu_module("selective_scan").backward(*inputs)


@_backward.register_fake
def _(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    vectors = u.shape[1:2], u.shape[1:2]  # D and delta_bias, given or not
    shapes = (*(m.shape for m in (u, delta, A, B, C)), *vectors, dlast.shape)
    return tuple(u.new_empty(shape, dtype=compute_dtype(u, A, rest[-1])) for shape in shapes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, initial_state = inputs
    ctx.save_for_backward(*tensors, initial_state)


def _gradients(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, initial_state = ctx.saved_tensors
    grads = torch.ops.vision_ssm.selective_scan_backward(dy, dlast, *tensors, ctx.softplus, initial_state)
    inputs = (*tensors, initial_state)
    *grads, dinitial = (None if m is None else grad.to(m.dtype) for m, grad in zip(inputs, grads, strict=True))
    return *grads, None, dinitial


_forward.register_autograd(_gradients, setup_context=_setup_context)
