"""The scalar-decay scan in chunks: matrix products inside a chunk, a recurrence of states from chunk to chunk.

Dao and Gu, "Transformers are SSMs", ICML 2024, arXiv:2405.21060, section 6; the backward is written out, so that only
the inputs are kept for it. Plain PyTorch, for any device; GPUs have kernels of their own, in ``gpu.py``.

A step s reaches a step t by the exponential of the sum of dt A over s+1..t on the way ahead, over t..s-1 on the way
back.
"""

# Shapes: b batch, c chunks, q steps of a chunk, h heads, g groups of heads, p width of a head, n state.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import compute_dtype

STEPS = 64  # of a chunk


class Chunks(NamedTuple):
    """The inputs in chunks and what both directions of differentiation need of them.

    Attributes:
        u: dt x, (b, c, q, h, p).
        B, C: (b, c, q, h, n), expanded over the heads of a group.
        reach: decay from step s to step t, (b, c, h, q t, q s); 0 where s comes after t.
        leave: decay from a step to the end of its chunk, (b, c, q, h).
        enter: decay from the beginning of its chunk to a step, (b, c, q, h).
        whole: decay over a chunk, (b, c, h).
    """

    u: Tensor
    B: Tensor
    C: Tensor
    reach: Tensor
    leave: Tensor
    enter: Tensor
    whole: Tensor


def in_chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Chunks:
    """What the chunks are, from inputs in them: x (b, c, q, h, p), dt (b, c, q, h), A (h,), B, C (b, c, q, g, n)."""
    heads = x.shape[3]
    exponents = dt * A
    after, before = _running(exponents, 2, back=True), _running(exponents, 2, back=False)
    # Sums of their own for each pair of steps: a difference of two long sums would lose the short ones between.
    lines = exponents.transpose(2, 3)[..., None].expand(*(-1,) * 4, exponents.shape[2])
    seen = torch.ones(lines.shape[-2:], dtype=torch.bool, device=x.device)
    seen = seen.triu() if reverse else seen.tril()
    passed = seen & ~torch.eye(len(seen), dtype=torch.bool, device=x.device)
    between = _running(lines.masked_fill(~passed, 0.0), 3, back=reverse)
    return Chunks(
        u=x * dt[..., None],
        B=B.repeat_interleave(heads // B.shape[3], dim=3),
        C=C.repeat_interleave(heads // C.shape[3], dim=3),
        reach=between.masked_fill(~seen, -torch.inf).exp(),
        leave=_shifted(before if reverse else after, back=reverse).exp(),
        enter=(after if reverse else before).exp(),
        whole=exponents.sum(2).exp(),
    )


def _running(m: Tensor, dim: int, *, back: bool) -> Tensor:
    """Sums along ``dim`` up to and with each entry, from the first or back from the last."""
    return m.flip(dim).cumsum(dim).flip(dim) if back else m.cumsum(dim)


def _shifted(m: Tensor, *, back: bool) -> Tensor:
    """Running sums (b, c, q, h) without the entry itself: from the first if ``back``, else from the last."""
    return F.pad(m[:, :, :-1], (0, 0, 1, 0)) if back else F.pad(m[:, :, 1:], (0, 0, 0, 1))


def _cut(m: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, l, ...) in chunks, (b, c, q, ...); zeros fill the last, which neither decay nor add to a state."""
    length = m.shape[1]
    steps = min(STEPS, length)
    m = F.pad(m.to(dtype), (0, 0) * (m.dim() - 2) + (0, -length % steps))
    return m.unflatten(1, (-1, steps))


def _join(m: Tensor, length: int) -> Tensor:
    return m.flatten(1, 2)[:, :length]


def _order(chunks: int, reverse: bool) -> list[int]:
    return list(range(chunks))[:: -1 if reverse else 1]


def _states(k: Chunks, initial_state: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """The state that enters each chunk, (b, c, h, p, n), and the last one."""
    leaving = torch.einsum("bcqh,bcqhp,bcqhn->bchpn", k.leave, k.u, k.B)
    state = torch.zeros_like(leaving[:, 0]) if initial_state is None else initial_state
    entering = torch.empty_like(leaving)
    for chunk in _order(leaving.shape[1], reverse):
        entering[:, chunk] = state
        state = k.whole[:, chunk, :, None, None] * state + leaving[:, chunk]
    return entering, state


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`vision_ssm.kernels.ssd_scan.op.ssd_scan`."""
    dtype = compute_dtype(x, A, initial_state)
    k = in_chunks(_cut(x, dtype), _cut(dt, dtype), A.to(dtype), _cut(B, dtype), _cut(C, dtype), reverse)
    initial = None if initial_state is None else initial_state.to(dtype)
    entering, last = _states(k, initial, reverse)
    mixed = torch.einsum("bcthn,bcshn->bchts", k.C, k.B) * k.reach
    y = torch.einsum("bchts,bcshp->bcthp", mixed, k.u)
    y += torch.einsum("bcth,bcthn,bchpn->bcthp", k.enter, k.C, entering)
    return _join(y, x.shape[1]).to(x.dtype).contiguous(), last.clone()


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
    """Gradients by x, dt, A, B, C and the initial state, in the dtype that the scan computes in."""
    dtype = compute_dtype(x, A, initial_state)
    length, groups = x.shape[1], B.shape[2]
    dy, x, dt, B, C = (_cut(m, dtype) for m in (dy, x, dt, B, C))
    A = A.to(dtype)
    k = in_chunks(x, dt, A, B, C, reverse)
    entering, _ = _states(k, None if initial_state is None else initial_state.to(dtype), reverse)

    # states: what each chunk's outputs ask of the one that enters it, and what the chunks after it ask
    asked = torch.einsum("bcth,bcthp,bcthn->bchpn", k.enter, dy, k.C)
    dleaving = torch.empty_like(asked)
    dstate = dlast.to(dtype)
    for chunk in reversed(_order(asked.shape[1], reverse)):
        dleaving[:, chunk] = dstate
        dstate = asked[:, chunk] + k.whole[:, chunk, :, None, None] * dstate

    mixed = torch.einsum("bcthn,bcshn->bchts", k.C, k.B) * k.reach
    dmixed = torch.einsum("bcthp,bcshp->bchts", dy, k.u)
    dproduct = dmixed * k.reach
    through = torch.einsum("bcshn,bchpn->bcshp", k.B, dleaving)
    reaching = torch.einsum("bcthn,bchpn->bcthp", k.C, entering)
    du = torch.einsum("bchts,bcthp->bcshp", mixed, dy) + k.leave[..., None] * through
    dC = torch.einsum("bchts,bcshn->bcthn", dproduct, k.B)
    dC += k.enter[..., None] * torch.einsum("bcthp,bchpn->bcthn", dy, entering)
    dB = torch.einsum("bchts,bcthn->bcshn", dproduct, k.C)
    dB += k.leave[..., None] * torch.einsum("bcshp,bchpn->bcshn", k.u, dleaving)

    # Exponents: of every decay, the gradient by its logarithm. With p_t the sum up to step t (on the way back without
    # it), these are p_t - p_s, p_t and total - p_s; on the way back p_s - p_t, total - p_t and p_s.
    dreach = dmixed * mixed
    denter = k.enter * (dy * reaching).sum(-1)
    dleave = k.leave * (k.u * through).sum(-1)
    dp = (dreach.sum(4) - dreach.sum(3)).transpose(2, 3)  # over what reaches a step less what it reaches
    dtotal = k.whole * (entering * dleaving).sum((-1, -2))
    if reverse:
        dp, dtotal = -dp - denter + dleave, dtotal + denter.sum(2)
    else:
        dp, dtotal = dp + denter - dleave, dtotal + dleave.sum(2)
    later = _running(dp, 2, back=True)
    dexponents = (_shifted(later, back=False) if reverse else later) + dtotal[:, :, None]

    ddt = dexponents * A + (du * x).sum(-1)
    dB, dC = (m.flatten(1, 2).unflatten(2, (groups, -1)).sum(3)[:, :length] for m in (dB, dC))
    return (
        _join(du * dt[..., None], length),
        _join(ddt, length),
        (dexponents * dt).sum((0, 1, 2)),
        dB,
        dC,
        dstate,
    )
