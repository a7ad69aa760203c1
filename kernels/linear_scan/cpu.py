"""The linear recurrence on the CPU: vectorised over everything but time, and over chunks of time where rows are short.

Pairs are computed as PyTorch's complex numbers, which are laid out the same.
"""

import math

import torch
from torch import Tensor

from ..checks import compute_dtype

_WIDE = 1 << 13
"""Numbers of a step from which walking time step by step is faster (two cores); below, chunks go side by side."""


def _numbers(m: Tensor, dtype: torch.dtype, pairs: bool) -> Tensor:
    """A copy of ``m`` to compute with, contiguous."""
    m = m.to(dtype).clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(m) if pairs else m


def _pairs(m: Tensor, pairs: bool) -> Tensor:
    return torch.view_as_real(m.resolve_conj()) if pairs else m


def _decays(a: Tensor, h: Tensor, pairs: bool) -> Tensor:
    """``a`` with all of h's axes; that of time is 1 where decays do not vary."""
    a = _numbers(a, h.dtype.to_real(), pairs)
    return a.view(*[1] * (h.dim() - a.dim()), *a.shape)


def _stops(resets: Tensor | None, h: Tensor) -> Tensor | None:
    return None if resets is None else resets.view(*resets.shape, *[1] * (h.dim() - 2))


def _kept(m: Tensor, stop: Tensor | None) -> Tensor:
    """``m``, and zero where the sequence starts anew: not a product, which would keep NaN."""
    return m if stop is None else m.masked_fill(stop, 0)


def _passed(decay: Tensor, state: Tensor) -> Tensor:
    """Their product; nothing passes a decay of zero, NaN neither."""
    return torch.where(decay == 0, 0, decay * state)


def _scan_(a: Tensor, h: Tensor, stops: Tensor | None) -> Tensor:
    """h_t = a_t h_{t-1} + b_t from zero, written over b, which ``h`` holds."""
    length = len(h)
    a = a.expand(length, *a.shape[1:])
    steps = length if h[0].numel() >= _WIDE else math.isqrt(length)
    chunks = length // steps
    even = chunks * steps
    head_a, head_h = (m[:even].unflatten(0, (chunks, steps)) for m in (a, h))
    head_stops = None if stops is None else stops[:even].unflatten(0, (chunks, steps))
    for t in range(1, steps):
        head_h[:, t].addcmul_(head_a[:, t], _kept(head_h[:, t - 1], None if head_stops is None else head_stops[:, t]))
    if chunks > 1:
        if head_stops is not None:
            head_a = torch.where(head_stops, 0, head_a)
        decays = head_a.cumprod(dim=1)
        carries = [torch.zeros_like(head_h[0, -1])]
        for chunk in range(chunks - 1):
            carries.append(head_h[chunk, -1] + _passed(decays[chunk, -1], carries[-1]))
        head_h += _passed(decays, torch.stack(carries).unsqueeze(1))
    for t in range(even, length):
        h[t].addcmul_(a[t], _kept(h[t - 1], None if stops is None else stops[t]))
    return h


def forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, resets: Tensor | None, pairs: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`vision_ssm.kernels.linear_scan.op.linear_scan`."""
    dtype = compute_dtype(a, b, initial_state)
    h = _numbers(b, dtype, pairs)
    decays, stops = _decays(a, h, pairs), _stops(resets, h)
    if initial_state is not None:
        h[0].addcmul_(decays[0], _kept(_numbers(initial_state, dtype, pairs), None if stops is None else stops[0]))
    h = _pairs(_scan_(decays, h, stops), pairs)
    return h.to(b.dtype), h[-1].clone()


def backward(
    dh: Tensor,
    dlast: Tensor,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    resets: Tensor | None,
    pairs: bool,
) -> tuple[Tensor, ...]:
    """Gradients by a, b and the initial state, in the dtype that the scan computes in, from the states ``h``.

    They are those of a recurrence that runs back: g_t = dh_t + conj(a_{t+1}) g_{t+1}.
    """
    dtype = compute_dtype(a, h, initial_state)
    g = _numbers(dh, dtype, pairs)
    g[-1] += _numbers(dlast, dtype, pairs)
    decays, stops = _decays(a, g, pairs).conj(), _stops(resets, g)
    # Each step takes the decay and the stop of the one after it, which the reversed sequence has visited before it.
    later = None if stops is None else stops.flip(0).roll(1, 0)
    g = _scan_(decays.flip(0).roll(1, 0), g.flip(0), later).flip(0)

    states = _numbers(h, dtype, pairs)
    start = torch.zeros_like(states[0]) if initial_state is None else _numbers(initial_state, dtype, pairs)
    before = _kept(torch.cat([start[None], states[:-1]]), stops)
    da = (before.conj() * g).sum_to_size(decays.shape)
    dinitial = _kept(decays[0] * g[0], None if stops is None else stops[0])
    return _pairs(da, pairs).view(a.shape), _pairs(g, pairs), _pairs(dinitial, pairs)
