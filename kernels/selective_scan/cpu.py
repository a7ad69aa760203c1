"""Selective scan on the CPU: vectorised over channels, one state at a time, so that memory does not grow with n.

:func:`scan` and :func:`scan_backward` work channels-last, on sequences (b, g, l, w) of g groups of w channels;
``routed_scan`` calls them as well. Backward recomputes the states and keeps nothing between the passes.
"""

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..recurrence import adjoint_scan_, scan_, softplus


def _states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, initial: Tensor | None, i: int) -> tuple[Tensor, Tensor]:
    """Decay exp(Δ A_i) and states h_i, both (b, g, l, w); ``x`` is Δ u."""
    decay = torch.exp(delta * A[:, None, :, i])
    h = x * B[..., i, None]
    start = None if initial is None else initial[..., i].flatten(0, 1)
    scan_(decay.flatten(0, 1), h.view(-1, *h.shape[2:]), start)
    return decay, h


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_t = C_t h_t with h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t.

    Shapes: u, delta (b, g, l, w); A (g, w, n); B, C (b, g, l, n); initial (b, g, w, n). Returns y like u and the last
    state (b, g, w, n).
    """
    x, y, last = delta * u, torch.zeros_like(u), []
    for i in range(A.shape[-1]):
        _, h = _states(x, delta, A, B, initial, i)
        last.append(h[:, :, -1].clone())
        y.addcmul_(h, C[..., i, None])
    return y, torch.stack(last, dim=-1)


def scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of :func:`scan` by u, delta, A, B, C and the initial state, from those of y and the last state."""
    x, du, ddelta = delta * u, torch.zeros_like(u), torch.zeros_like(delta)
    dA, dB, dC, dinitial = [], [], [], []
    for i in range(A.shape[-1]):
        decay, h = _states(x, delta, A, B, initial, i)
        dC.append((dy * h).sum(-1))
        g = dy * C[..., i, None]
        g[:, :, -1] += dlast[..., i]
        adjoint_scan_(decay.flatten(0, 1), g.view(-1, *g.shape[2:]))
        dx = g * B[..., i, None]
        dB.append((g * x).sum(-1))
        du.addcmul_(dx, delta)
        ddelta.addcmul_(dx, u)

        carried = decay.mul_(g)  # gradient by h_{t-1}
        dinitial.append(carried[:, :, 0].clone())
        carried[:, :, 1:] *= h[:, :, :-1]
        carried[:, :, 0] *= 0 if initial is None else initial[..., i]
        ddelta.addcmul_(carried, A[:, None, :, i])
        dA.append(carried.mul_(delta).sum((0, 2)))
    return du, ddelta, *(torch.stack(m, dim=-1) for m in (dA, dB, dC, dinitial))


def _channels_last(m: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(b, g*w, l) -> (b, g, l, w)"""
    return m.to(dtype).unflatten(1, (groups, -1)).transpose(2, 3).contiguous()


def _channels_first(m: Tensor) -> Tensor:
    """(b, g, l, w) -> (b, g*w, l)"""
    return m.transpose(2, 3).flatten(1, 2).contiguous()


def _step_size(delta: Tensor, bias: Tensor | None, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """Δ before and after softplus, from (b, g, l, w) and (g*w,)."""
    raw = delta if bias is None else delta + bias.to(delta.dtype).view(delta.shape[1], 1, -1)
    return raw, softplus(raw) if delta_softplus else raw


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`vision_ssm.kernels.selective_scan.op.selective_scan`."""
    groups, dtype = B.shape[1], compute_dtype(u, A, initial_state)
    x, delta = (_channels_last(m, groups, dtype) for m in (u, delta))
    _, dt = _step_size(delta, delta_bias, delta_softplus)
    A = A.to(dtype).unflatten(0, (groups, -1))
    B, C = (m.to(dtype).transpose(2, 3).contiguous() for m in (B, C))
    initial = None if initial_state is None else initial_state.to(dtype).unflatten(1, (groups, -1))
    y, last = scan(x, dt, A, B, C, initial)
    if D is not None:
        y.addcmul_(x, D.to(dtype).view(groups, 1, -1))
    return _channels_first(y).to(u.dtype), last.flatten(1, 2)


def backward(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients by u, delta, A, B, C, D, delta_bias and the initial state, in the dtype that the scan computes in."""
    groups, dtype = B.shape[1], compute_dtype(u, A, initial_state)
    dy, x, delta = (_channels_last(m, groups, dtype) for m in (dy, u, delta))
    raw, dt = _step_size(delta, delta_bias, delta_softplus)
    A = A.to(dtype).unflatten(0, (groups, -1))
    B, C = (m.to(dtype).transpose(2, 3).contiguous() for m in (B, C))
    initial = None if initial_state is None else initial_state.to(dtype).unflatten(1, (groups, -1))
    dlast = dlast.to(dtype).unflatten(1, (groups, -1))
    du, ddelta, dA, dB, dC, dinitial = scan_backward(dy, dlast, x, dt, A, B, C, initial)
    if delta_softplus:
        ddelta *= torch.sigmoid(raw)
    if D is not None:
        du.addcmul_(dy, D.to(dtype).view(groups, 1, -1))
    dD = (dy * x).sum((0, 2)).flatten()
    return (
        _channels_first(du),
        _channels_first(ddelta),
        dA.flatten(0, 1),
        dB.transpose(2, 3).contiguous(),
        dC.transpose(2, 3).contiguous(),
        dD,
        ddelta.sum((0, 2)).flatten(),
        dinitial.flatten(1, 2),
    )
