"""The linear recurrence h_t = a_t h_{t-1} + b_t on the CPU: what every selective scan there comes down to.

Two ways compute it. numba (the extra ``vision-ssm[cpu]``) walks the sequence once. Without it, PyTorch cuts the
sequence into about sqrt(l) chunks, walks all chunks side by side, then carries the states across: 2 sqrt(l) vectorised
steps in place of l.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HAS_NUMBA = find_spec("numba") is not None


def scan_(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along dim 1, written over ``b``: a, b (s, l, w) contiguous, initial (s, w)."""
    if initial is not None:
        b[:, 0].addcmul_(a[:, 0], initial)
    return _numba_scan_(a, b, False) if HAS_NUMBA else _chunked_scan_(a, b)


def adjoint_scan_(a: Tensor, b: Tensor) -> Tensor:
    """g_t = b_t + a_{t+1} g_{t+1} along dim 1, written over ``b``: the transpose of :func:`scan_`."""
    if HAS_NUMBA:
        return _numba_scan_(a, b, True)
    following = torch.cat([a[:, 1:], torch.ones_like(a[:, :1])], dim=1)
    return b.copy_(_chunked_scan_(following.flip(1), b.flip(1)).flip(1))


def _chunked_scan_(a: Tensor, b: Tensor) -> Tensor:
    length = a.shape[1]
    steps = math.isqrt(length)
    chunks = length // steps
    even = chunks * steps
    head_a, head_b = (m[:, :even].unflatten(1, (chunks, steps)) for m in (a, b))

    decay = head_a[:, :, 0].clone()  # product of a over each chunk so far
    decays = [decay]
    for t in range(1, steps):
        head_b[:, :, t].addcmul_(head_a[:, :, t], head_b[:, :, t - 1])
        decay = decay * head_a[:, :, t]
        decays.append(decay)
    carry = head_b[:, 0, -1]
    carries = [torch.zeros_like(carry), carry]
    for chunk in range(1, chunks):
        carry = torch.addcmul(head_b[:, chunk, -1], decay[:, chunk], carry)
        carries.append(carry)
    head_b.addcmul_(torch.stack(decays, dim=2), torch.stack(carries[:chunks], dim=1).unsqueeze(2))
    for t in range(even, length):
        b[:, t].addcmul_(a[:, t], b[:, t - 1])
    return b


@cache
def _compiled() -> tuple[Any, Any]:
    import numba

    @numba.njit(nogil=True, fastmath={"contract"})
    def forward(a, b):  # type: ignore[no-untyped-def]
        for t in range(1, a.shape[0]):
            for i in range(a.shape[1]):
                b[t, i] += a[t, i] * b[t - 1, i]

    @numba.njit(nogil=True, fastmath={"contract"})
    def backward(a, b):  # type: ignore[no-untyped-def]
        for t in range(a.shape[0] - 2, -1, -1):
            for i in range(a.shape[1]):
                b[t, i] += a[t + 1, i] * b[t + 1, i]

    return forward, backward


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One pool a process: a fork does not take its parent's threads along."""
    return ThreadPoolExecutor(threads, thread_name_prefix="vision_ssm_scan")


def _numba_scan_(a: Tensor, b: Tensor, backward: bool) -> Tensor:
    kernel = _compiled()[backward]
    rows_a, rows_b = a.detach().numpy(), b.detach().numpy()
    # Plain threads, since numba's own thread pools abort the process when they meet a fork or a second caller.
    threads = min(torch.get_num_threads(), len(rows_a))
    if threads == 1 or a.numel() < 1 << 15:
        for row in range(len(rows_a)):
            kernel(rows_a[row], rows_b[row])
    else:
        list(_pool(threads, os.getpid()).map(kernel, rows_a, rows_b))
    return b


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) = max(x, 0) + 2 artanh(e / (2 + e)) with e = e^-|x|, for any x.

    PyTorch's own is by log1p, which is slow on a CPU: three times the time of this, which is as precise.
    """
    e = x.abs().neg_().exp_()
    return e.div_(e + 2).atanh_().mul_(2).add_(x.clamp(min=0))
