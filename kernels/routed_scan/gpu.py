"""Routed scan on the GPU, in Triton: no route is materialised and Δ is never written.

Every route is cut into runs of consecutive steps along its fastest axis. A program walks the runs of one tile, step by
step and side by side, so that a step is a tile [M runs, D channels] in the layout of the tensor cores that project Δ:
the recurrence needs neither an associative scan nor an exchange between threads. Three kernels make an operator,

1. ``summary``: what each run does to a state, h -> exp(A ΣΔ) h + state, with nothing carried in;
2. ``carry``: the states after each run, scanned from run to run;
3. ``apply`` (and ``gradient``): the runs once more, now with the state that comes in.

A cell's address is arithmetic in the step (``Route.affine``), so image size is no constant and nothing recompiles for a
new one. Routes that share cells run one launch after the other and add to a float32 map: no atomics, so that two runs
agree bit for bit. Exponentials are to the base 2, the one that the hardware has: Δ is kept as Δ log2(e).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import compute_dtype
from ..routes import Route, Routes
from ..selective_scan.gpu import TRITON_DTYPE, compose

_AXES = 3
_FIELDS = 8
_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def softplus2(x, COARSE: tl.constexpr):
    """log2(1 + 2^x), by max(x, 0) + e P(e) with e = 2^-|x| and P a fit of log2(1 + e) / e on [0, 1].

    The relative error of P is 1.0e-5 (``COARSE``, for half-precision maps) or 1.5e-7; float64 takes the logarithm.
    """
    e = tl.exp2(-tl.abs(x))
    if x.dtype == tl.float64:
        one = 1 + e
        low = one - 1
        tail = tl.where(low == 0, _LOG2E * e, tl.log2(one) * (e / tl.where(low == 0, 1, low)))
        return tl.maximum(x, 0.0) + tail
    if COARSE:
        p = 0.144073083 - 0.03366616 * e
        p = p * e - 0.301280044
        p = p * e + 0.46852615
        p = p * e - 0.72034125
        p = p * e + 1.44268108
    else:
        p = 0.00736614965 * e - 0.0418265521
        p = p * e + 0.111636808
        p = p * e - 0.196070916
        p = p * e + 0.275140838
        p = p * e - 0.3582781
        p = p * e + 0.480676186
        p = p * e - 0.721339379
        p = p * e + 1.44269499
    return p * e + tl.maximum(x, 0.0)


@triton.jit
def product(a, b, ACC: tl.constexpr):
    """a b on the tensor cores: half-precision operands as they are, float32 in three TF32 products."""
    if a.dtype == tl.float64:
        return tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    return tl.dot(a, b, input_precision="tf32x3", out_dtype=ACC)


@triton.jit
def tail(m, BLOCK_N: tl.constexpr):
    """Room for the states as last axis; a single state has no axis of its own, which keeps its tiles [M, D]."""
    return m if BLOCK_N == 1 else tl.expand_dims(m, -1)


@triton.jit
def over_states(m, BLOCK_N: tl.constexpr):
    """Sum over the states."""
    return m if BLOCK_N == 1 else tl.sum(m, axis=2)


@triton.jit
def states_from(first, BLOCK_N: tl.constexpr):
    """Offsets of BLOCK_N states."""
    return first if BLOCK_N == 1 else first + tl.arange(0, BLOCK_N)


@triton.jit
def with_states(mask, o_n, STATE, BLOCK_N: tl.constexpr):
    """A mask, extended to the states that there are."""
    return mask if BLOCK_N == 1 else tl.expand_dims(mask, -1) & (o_n < STATE)


@triton.jit
def runs_of(table, k, o_m, BATCH, CELLS, FIELDS: tl.constexpr):
    """For runs ``o_m`` of route k, counted over the batch: first cell, steps, place among the sample's runs; the step.

    The table's row of a route: sizes of the two faster axes, cells moved by a step along each axis, first cell, runs in
    a sample, steps in a run.
    """
    row = table + k * FIELDS
    size1, size2 = tl.load(row).to(tl.int32), tl.load(row + 1).to(tl.int32)
    step0, step1, step2 = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    runs, length = tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
    pieces = tl.cdiv(size2, length)
    sample, place = o_m // runs, o_m % runs
    line, left = place // pieces, place % pieces * length
    cell = sample.to(tl.int64) * CELLS + tl.load(row + 5) + line // size1 * step0 + line % size1 * step1 + left * step2
    steps = tl.where(sample < BATCH, tl.minimum(size2 - left, length), 0)
    return cell, steps, place, runs, length, step2


@triton.jit
def weights_of(weight, bias, A, k, o_d, o_n, CHANNELS, STATE, RANK, DTYPE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Projection [R, D] and bias [D] of Δ log2(e), and A [D] or [D, N]."""
    o_r = tl.arange(0, BLOCK_R)
    o_kd, m_d = k * CHANNELS + o_d, o_d < CHANNELS
    w = tl.load(weight + o_kd[None, :] * RANK + o_r[:, None], (o_r < RANK)[:, None] & m_d[None, :], 0.0)
    shift = tl.load(bias + o_kd, m_d, 0.0).to(ACC)
    decay = tl.load(A + tail(o_kd * STATE, BLOCK_N) + o_n, with_states(m_d, o_n, STATE, BLOCK_N), 0.0).to(ACC)
    return (w.to(ACC) * _LOG2E).to(DTYPE), shift * _LOG2E, decay


@triton.jit
def step_size(low_rank, rows, m_t, w, shift, RANK, BLOCK_R: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr):
    """Δ log2(e) [M, D], before softplus and after it, from the low-rank columns [M, R] at ``rows``; and those.

    Where the mask ends, it is 0: such a step keeps the state.
    """
    o_r = tl.arange(0, BLOCK_R)
    low = tl.load(low_rank + rows[:, None] + o_r[None, :], m_t[:, None] & (o_r < RANK)[None, :], 0.0)
    raw = product(low, w, ACC) + shift[None, :]
    return raw, tl.where(m_t[:, None], softplus2(raw, COARSE), 0.0), low


@triton.jit(do_not_specialize=["BATCH", "CELLS", "RUNS"])
def summary_kernel(
    x, dy, low_rank, weight, bias, A, table, total, state, adjoint,
    BATCH, CELLS, RUNS, CHANNELS, STATE, RANK, COLUMNS,
    FIELDS: tl.constexpr, ALIGN: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of each run: ΣΔ, the state it leaves behind with none before it and, if ``dy`` is given, the gradient that it
    sends back with none after it (all steps weighted by the decay up to them, so that one walk serves both)."""
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    k = tl.program_id(1)
    o_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    o_m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(2) * BLOCK_N
    o_n = states_from(first, BLOCK_N)
    m_d = o_d < CHANNELS
    cell, steps, _, _, length, step = runs_of(table, k, o_m, BATCH, CELLS, FIELDS)
    w, shift, decay = weights_of(
        weight, bias, A, k, o_d, o_n, CHANNELS, STATE, RANK, low_rank.dtype.element_ty, ACC, BLOCK_R, BLOCK_N
    )
    decay = tl.expand_dims(decay, 0)

    column = tl.multiple_of(k * (RANK + 2 * STATE), ALIGN)
    s = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    h = tail(s, BLOCK_N) * decay
    p, g = h + 1, h
    for t in range(length):
        m_t = t < steps
        mask = m_t[:, None] & m_d[None, :]
        here = cell + t * step
        offset = here[:, None] * CHANNELS + o_d[None, :]
        rows = here * COLUMNS + column
        u = tl.load(x + offset, mask, 0.0).to(ACC)
        o_b = tail(rows + RANK, BLOCK_N) + o_n
        m_b = with_states(m_t, o_n, STATE, BLOCK_N)
        b = tl.load(low_rank + o_b, m_b, 0.0).to(ACC) * _LN2
        _raw, dt, _low = step_size(low_rank, rows, m_t, w, shift, RANK, BLOCK_R, COARSE, ACC)
        a = tl.exp2(tail(dt, BLOCK_N) * decay)
        h = a * h + tail(dt * u, BLOCK_N) * tl.expand_dims(b, 1)
        s += dt
        if dy is not None:
            c = tl.load(low_rank + o_b + STATE, m_b, 0.0).to(ACC)
            p *= a
            g += p * (tail(tl.load(dy + offset, mask, 0.0).to(ACC), BLOCK_N) * tl.expand_dims(c, 1))

    row = k * RUNS.to(tl.int64) + o_m
    m_md = (steps > 0)[:, None] & m_d[None, :]
    o_s = tail(row[:, None] * STATE * CHANNELS + o_d[None, :], BLOCK_N) + o_n * CHANNELS
    m_s = with_states(m_md, o_n, STATE, BLOCK_N)
    tl.store(state + o_s, h, m_s)
    if dy is not None:
        tl.store(adjoint + o_s, g, m_s)
    if first == 0:
        tl.store(total + row[:, None] * CHANNELS + o_d[None, :], s, m_md)


@triton.jit(do_not_specialize=["RUNS"])
def carry_kernel(
    total, state, A, table, RUNS, CHANNELS, STATE,
    FIELDS: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The states after each run, in place of those that it leaves alone; from the last run to the first if REVERSE."""
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    n, k = tl.program_id(0) // blocks % STATE, tl.program_id(1)
    o_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < CHANNELS
    runs = tl.load(table + k * FIELDS + 6).to(tl.int32)
    start = k * RUNS.to(tl.int64) + tl.program_id(0).to(tl.int64) // blocks // STATE * runs
    decay = tl.load(A + (k * CHANNELS + o_d) * STATE + n, m_d, 0.0).to(ACC)
    h = tl.zeros([BLOCK_D], ACC)
    for chunk in range(tl.cdiv(runs, BLOCK_L)):
        o_l = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (o_l < runs)[:, None] & m_d[None, :]
        row = start + (runs - 1 - o_l if REVERSE else o_l)
        a = tl.exp2(tl.load(total + row[:, None] * CHANNELS + o_d[None, :], mask, 0.0) * decay[None, :])
        o_s = (row * STATE + n)[:, None] * CHANNELS + o_d[None, :]
        a, b = tl.associative_scan((a, tl.load(state + o_s, mask, 0.0)), 0, compose)
        after = a * h[None, :] + b
        tl.store(state + o_s, after, mask)
        h = tl.sum(tl.where((tl.arange(0, BLOCK_L) == BLOCK_L - 1)[:, None], after, 0.0), axis=0)


@triton.jit(do_not_specialize=["BATCH", "CELLS", "RUNS", "ROUTE", "FIRST", "ADD", "LAST"])
def apply_kernel(
    x, low_rank, weight, bias, A, D, table, state, partial, y,
    BATCH, CELLS, RUNS, CHANNELS, STATE, RANK, COLUMNS, ROUTE, FIRST, ADD, LAST,
    FIELDS: tl.constexpr, ALIGN: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t;  y_t = C_t h_t + D u_t   (arXiv:2401.10166, section 4.2)

    For the routes from ROUTE on and the states from FIRST on. Adds what ``partial`` holds if ADD; stores to y if this
    is the LAST launch, else to ``partial``.
    """
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    k = ROUTE + tl.program_id(1)
    o_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    o_m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = states_from(FIRST, BLOCK_N)
    m_d, m_add = o_d < CHANNELS, o_d < CHANNELS * ADD
    cell, steps, place, _, length, step = runs_of(table, k, o_m, BATCH, CELLS, FIELDS)
    w, shift, decay = weights_of(
        weight, bias, A, k, o_d, o_n, CHANNELS, STATE, RANK, low_rank.dtype.element_ty, ACC, BLOCK_R, BLOCK_N
    )
    decay = tl.expand_dims(decay, 0)
    skip = tl.load(D + k * CHANNELS + o_d, o_d < tl.where(FIRST == 0, CHANNELS, 0), 0.0).to(ACC)
    before = k * RUNS.to(tl.int64) + o_m - 1
    o_s = tail(before[:, None] * STATE * CHANNELS + o_d[None, :], BLOCK_N) + o_n * CHANNELS
    m_s = with_states(((steps > 0) & (place > 0))[:, None] & m_d[None, :], o_n, STATE, BLOCK_N)
    h = tl.load(state + o_s, m_s, 0.0)

    column = tl.multiple_of(k * (RANK + 2 * STATE), ALIGN)
    for t in range(length):
        m_t = t < steps
        mask = m_t[:, None] & m_d[None, :]
        here = cell + t * step
        offset = here[:, None] * CHANNELS + o_d[None, :]
        rows = here * COLUMNS + column
        u = tl.load(x + offset, mask, 0.0).to(ACC)
        o_b = tail(rows + RANK, BLOCK_N) + o_n
        m_b = with_states(m_t, o_n, STATE, BLOCK_N)
        b = tl.load(low_rank + o_b, m_b, 0.0).to(ACC) * _LN2
        c = tl.load(low_rank + o_b + STATE, m_b, 0.0).to(ACC)
        out = tl.load(partial + offset, m_t[:, None] & m_add[None, :], 0.0).to(ACC) + u * skip[None, :]
        _raw, dt, _low = step_size(low_rank, rows, m_t, w, shift, RANK, BLOCK_R, COARSE, ACC)
        h = tl.exp2(tail(dt, BLOCK_N) * decay) * h + tail(dt * u, BLOCK_N) * tl.expand_dims(b, 1)
        out += over_states(h * tl.expand_dims(c, 1), BLOCK_N)
        if LAST:
            tl.store(y + offset, out, mask)
        else:
            tl.store(partial + offset, out, mask)


@triton.jit(do_not_specialize=["BATCH", "CELLS", "RUNS", "LONGEST", "ROUTE", "FIRST", "ADD", "LAST"])
def gradient_kernel(
    dy, x, low_rank, weight, bias, A, D, table, state, adjoint, history, partial,
    dx, dlow_rank, dweight, dbias, dA, dD,
    BATCH, CELLS, RUNS, CHANNELS, STATE, RANK, COLUMNS, LONGEST, ROUTE, FIRST, ADD, LAST,
    FIELDS: tl.constexpr, ALIGN: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """All gradients of ``apply_kernel``'s part: a walk forward that keeps the states, and one back.

    ``dx`` is as y there. ``dlow_rank`` is per block of channels, the parameters' gradients per tile of runs: the
    launcher adds them up in a fixed order.
    """
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    k = ROUTE + tl.program_id(1)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    o_m = part * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.arange(0, BLOCK_R)
    o_n = states_from(FIRST, BLOCK_N)
    m_d, m_r, m_add = o_d < CHANNELS, o_r < RANK, o_d < CHANNELS * ADD
    cell, steps, place, runs, length, step = runs_of(table, k, o_m, BATCH, CELLS, FIELDS)
    w, shift, decay = weights_of(
        weight, bias, A, k, o_d, o_n, CHANNELS, STATE, RANK, low_rank.dtype.element_ty, ACC, BLOCK_R, BLOCK_N
    )
    decay = tl.expand_dims(decay, 0)
    skip = tl.load(D + k * CHANNELS + o_d, o_d < tl.where(FIRST == 0, CHANNELS, 0), 0.0).to(ACC)
    o_w = (k * CHANNELS + o_d)[:, None] * RANK + o_r[None, :]
    back = tl.load(weight + o_w, m_d[:, None] & m_r[None, :], 0.0).to(low_rank.dtype.element_ty)
    row = k * RUNS.to(tl.int64) + o_m
    o_s = tail(row[:, None] * STATE * CHANNELS + o_d[None, :], BLOCK_N) + o_n * CHANNELS
    m_s = with_states((steps > 0)[:, None] & m_d[None, :], o_n, STATE, BLOCK_N)
    h = tl.load(state + o_s - STATE * CHANNELS, m_s & tail((place > 0)[:, None], BLOCK_N), 0.0)
    g = tl.load(adjoint + o_s + STATE * CHANNELS, m_s & tail((place < runs - 1)[:, None], BLOCK_N), 0.0)

    column = tl.multiple_of(k * (RANK + 2 * STATE), ALIGN)
    o_h = tl.arange(0, BLOCK_M)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    o_h = tail(o_h, BLOCK_N) * BLOCK_N + (0 if BLOCK_N == 1 else tl.arange(0, BLOCK_N))
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    history += program * LONGEST * (BLOCK_M * BLOCK_D * BLOCK_N)
    for t in range(length):
        m_t = t < steps
        here = cell + t * step
        rows = here * COLUMNS + column
        u = tl.load(x + here[:, None] * CHANNELS + o_d[None, :], m_t[:, None] & m_d[None, :], 0.0).to(ACC)
        b = tl.load(low_rank + tail(rows + RANK, BLOCK_N) + o_n, with_states(m_t, o_n, STATE, BLOCK_N), 0.0).to(ACC) * _LN2
        tl.store(history + t * (BLOCK_M * BLOCK_D * BLOCK_N) + o_h, h)
        _raw, dt, _low = step_size(low_rank, rows, m_t, w, shift, RANK, BLOCK_R, COARSE, ACC)
        h = tl.exp2(tail(dt, BLOCK_N) * decay) * h + tail(dt * u, BLOCK_N) * tl.expand_dims(b, 1)
    tl.debug_barrier()  # another thread may read what this one kept

    sum_w = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    sum_raw, sum_D = tl.zeros([BLOCK_M, BLOCK_D], ACC), tl.zeros([BLOCK_M, BLOCK_D], ACC)
    sum_A = h * 0
    dlow_rank += block.to(tl.int64) * BATCH * CELLS * COLUMNS
    for i in range(length):
        t = length - 1 - i
        m_t = t < steps
        mask = m_t[:, None] & m_d[None, :]
        here = cell + t * step
        offset = here[:, None] * CHANNELS + o_d[None, :]
        rows = here * COLUMNS + column
        u, dout = tl.load(x + offset, mask, 0.0).to(ACC), tl.load(dy + offset, mask, 0.0).to(ACC)
        o_b = tail(rows + RANK, BLOCK_N) + o_n
        m_b = with_states(m_t, o_n, STATE, BLOCK_N)
        b = tl.load(low_rank + o_b, m_b, 0.0).to(ACC) * _LN2
        c = tl.load(low_rank + o_b + STATE, m_b, 0.0).to(ACC)
        h = tl.load(history + t * (BLOCK_M * BLOCK_D * BLOCK_N) + o_h).to(ACC)
        out = tl.load(partial + offset, m_t[:, None] & m_add[None, :], 0.0).to(ACC) + dout * skip[None, :]
        raw, dt, low = step_size(low_rank, rows, m_t, w, shift, RANK, BLOCK_R, COARSE, ACC)

        b, c = tl.expand_dims(b, 1), tl.expand_dims(c, 1)
        a = tl.exp2(tail(dt, BLOCK_N) * decay)
        kept = a * h
        g += tail(dout, BLOCK_N) * c
        log_a = g * kept  # the gradient by Δ A
        sum_A += log_a * tail(dt, BLOCK_N)
        dB = tl.sum(g * tail(dt * u, BLOCK_N), axis=1)
        dC = tl.sum(tail(dout, BLOCK_N) * (kept + tail(dt * u, BLOCK_N) * b), axis=1)
        db = over_states(g * b, BLOCK_N)
        # b holds ln 2; the sigmoid, which is softplus's slope, is 2^(raw - dt)
        draw = (over_states(log_a * decay, BLOCK_N) + db * u * _LOG2E) * tl.exp2(raw - dt)
        draw = tl.where(m_t[:, None], draw, 0.0)
        g *= a
        out += db * dt
        if LAST:
            tl.store(dx + offset, out, mask)
        else:
            tl.store(partial + offset, out, mask)
        tl.store(dlow_rank + o_b, dB * _LN2, m_b)
        tl.store(dlow_rank + o_b + STATE, dC, m_b)
        draw_low = draw.to(low_rank.dtype.element_ty)
        o_low = rows[:, None] + o_r[None, :]
        m_low = m_t[:, None] & m_r[None, :]
        dlow = product(draw_low, back, ACC)
        if FIRST > 0:
            dlow += tl.load(dlow_rank + o_low, m_low, 0.0)
        tl.store(dlow_rank + o_low, dlow, m_low)
        sum_w += product(tl.trans(low), draw_low, ACC)
        sum_raw += draw
        sum_D += dout * u

    o_p = (part * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * CHANNELS + o_d
    tl.store(dweight + o_p[None, :] * RANK + o_r[:, None], sum_w, m_r[:, None] & m_d[None, :])
    tl.store(dbias + o_p, tl.sum(sum_raw, axis=0), m_d)
    tl.store(dD + o_p, tl.sum(sum_D, axis=0), m_d)
    tl.store(dA + tail(o_p * BLOCK_N, BLOCK_N) + (o_n - FIRST), tl.sum(sum_A, axis=0) * _LN2, with_states(m_d, o_n, STATE, BLOCK_N))


class _Plan(NamedTuple):
    """How a grid is walked: the routes' table, runs of a sample and steps of a run (at most, over the routes)."""

    table: Tensor
    runs: int
    steps: int


@lru_cache(maxsize=256)
def _plan(routes: Routes, grid: tuple[int, ...], pieces: int, device: torch.device) -> _Plan:
    rows = []
    for route in routes:
        sizes, steps, first = route.affine(grid)
        sizes, steps = (1,) * (_AXES - len(sizes)) + sizes, (0,) * (_AXES - len(steps)) + steps
        length = triton.cdiv(sizes[2], pieces)
        rows.append((*sizes[1:], *steps, first, sizes[0] * sizes[1] * triton.cdiv(sizes[2], length), length))
    return _Plan(
        torch.tensor(rows, dtype=torch.int64, device=device), max(row[6] for row in rows), max(row[7] for row in rows)
    )


def _disjoint(one: Route, other: Route) -> bool:
    return one.stride == other.stride and one.offset != other.offset


@lru_cache(maxsize=256)
def _waves(routes: Routes) -> list[tuple[int, int]]:
    """(first route, how many) of every launch: neighbours that share no cell go together."""
    waves = [[0, 1]]
    for k in range(1, len(routes)):
        first, count = waves[-1]
        if all(_disjoint(routes[k], route) for route in routes[first : first + count]):
            waves[-1][1] += 1
        else:
            waves.append([k, 1])
    return [(first, count) for first, count in waves]


def block_sizes(channels: int, state: int, rank: int, most_states: int) -> dict[str, int]:
    """Tile sizes and warps: what a thread keeps of a tile [M, D, N], and of the projection [R, D], fits registers."""
    block_n = min(most_states, triton.next_power_of_2(state))
    block_r = max(16, triton.next_power_of_2(rank))
    return {
        "BLOCK_M": 16,
        "BLOCK_D": 32 if block_n == 1 and block_r <= 32 and channels > 16 else 16,
        "BLOCK_N": block_n,
        "BLOCK_R": block_r,
        "num_warps": 1,
    }


_PROGRAMS = 2048
_SCRATCH = 96 * 2**20


class _Call:
    """What the launches of a forward or a backward share."""

    def __init__(self, x: Tensor, low_rank: Tensor, dt_weight: Tensor, A: Tensor, routes: Routes, most_states: int):
        _, *grid, self.channels = x.shape
        if len(grid) > _AXES:
            raise ValueError(f"routed_scan on a GPU: grids of at most {_AXES} axes; got the grid {tuple(grid)}")
        self.routes, self.grid, self.cells = routes, tuple(grid), math.prod(grid)
        self.state, self.rank, self.columns = A.shape[-1], dt_weight.shape[-1], low_rank.shape[-1]
        self.dtype = compute_dtype(x, A)
        self.blocks = block_sizes(self.channels, self.state, self.rank, most_states)
        self.parts = triton.cdiv(self.channels, self.blocks["BLOCK_D"])
        self.passes = [
            (first, count, start)
            for first, count in _waves(routes)
            for start in range(0, self.state, self.blocks["BLOCK_N"])
        ]
        visited = routes[0].length(grid)
        self.every_route_full = visited == self.cells
        self.every_pass_full = all(count * visited == self.cells for _, count, _ in self.passes)
        width = self.rank + 2 * self.state
        self.constants = {
            "FIELDS": _FIELDS,
            "ALIGN": math.gcd(width, 16),
            "COARSE": x.dtype.itemsize == 2,
            "ACC": TRITON_DTYPE[self.dtype],
            **self.blocks,
        }
        self.device = x.device

    def plan(self, batch: int) -> _Plan:
        """Runs long enough to be worth a program, short enough to fill the GPU."""
        fastest = max(self.grid)
        lines = max(1, batch * self.cells // fastest)
        tiles = triton.cdiv(lines, self.blocks["BLOCK_M"]) * self.parts
        pieces = max(1, min(triton.cdiv(_PROGRAMS, tiles), fastest // 8))
        return _plan(self.routes, self.grid, pieces, self.device)

    def slices(self, batch: int, bytes_per_sample: int) -> list[slice]:
        """The batch in equal parts whose scratch memory is bounded."""
        count = min(batch, max(1, triton.cdiv(batch * bytes_per_sample, _SCRATCH)))
        size = triton.cdiv(batch, count)
        return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]

    def carries(
        self, plan: _Plan, x: Tensor, dy: Tensor | None, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The states after each run, (k, runs, n, c), and the gradients that each sends back, if ``dy`` is given."""
        batch, count = x.shape[0], len(self.routes)
        runs = batch * plan.runs
        state = x.new_empty(count, runs, self.state, self.channels, dtype=self.dtype)
        adjoint = None if dy is None else torch.empty_like(state)
        if plan.runs == 1:
            return state, adjoint
        total = x.new_empty(count, runs, self.channels, dtype=self.dtype)
        sizes = batch, self.cells, runs, self.channels, self.state, self.rank, self.columns
        tiles = triton.cdiv(runs, self.blocks["BLOCK_M"]) * self.parts
        grid = tiles, count, triton.cdiv(self.state, self.blocks["BLOCK_N"])
        summary_kernel[grid](
            x, dy, low_rank, dt_weight, dt_bias, A, plan.table, total, state, adjoint, *sizes, **self.constants
        )
        block_l = min(128, max(2, triton.next_power_of_2(plan.runs)))
        for carried, reverse in ((state, False), (adjoint, True)):
            if carried is not None:
                carry_kernel[batch * self.state * triton.cdiv(self.channels, 32), count](
                    total, carried, A, plan.table, runs, self.channels, self.state,
                    FIELDS=_FIELDS, REVERSE=reverse, ACC=self.constants["ACC"], BLOCK_L=block_l, BLOCK_D=32,
                    num_warps=1 if block_l <= 16 else 4,
                )  # fmt: skip
        return state, adjoint


def forward(
    x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: Routes
) -> Tensor:
    """See :func:`vision_ssm.kernels.routed_scan.op.routed_scan`."""
    x, low_rank, dt_weight, dt_bias, A, D = (m.contiguous() for m in (x, low_rank, dt_weight, dt_bias, A, D))
    call = _Call(x, low_rank, dt_weight, A, routes, most_states=16)
    several = len(call.passes) > 1
    y = torch.empty_like(x) if call.every_pass_full else torch.zeros_like(x)
    wide = call.dtype.itemsize * call.cells * call.channels
    for part in call.slices(x.shape[0], several * wide):
        _forward(call, x[part], low_rank[part], dt_weight, dt_bias, A, D, y[part])
    return y


def _forward(
    call: _Call, x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, y: Tensor
) -> None:
    batch = x.shape[0]
    plan = call.plan(batch)
    state, _ = call.carries(plan, x, None, low_rank, dt_weight, dt_bias, A)
    partial = _partial(call, y)
    runs = batch * plan.runs
    tiles = triton.cdiv(runs, call.blocks["BLOCK_M"]) * call.parts
    sizes = batch, call.cells, runs, call.channels, call.state, call.rank, call.columns
    for (route, count, start), add, last in _order(call):
        apply_kernel[tiles, count](
            x, low_rank, dt_weight, dt_bias, A, D, plan.table, state, partial, y,
            *sizes, route, start, add, last, **call.constants,
        )  # fmt: skip
    if partial is not y and not call.every_pass_full:
        y.copy_(partial)


def _partial(call: _Call, out: Tensor) -> Tensor:
    """The map that passes add up on; where one pass does it all, the result itself."""
    if len(call.passes) == 1:
        return out
    shape = out.shape
    return out.new_empty(shape, dtype=call.dtype) if call.every_pass_full else out.new_zeros(shape, dtype=call.dtype)


def _order(call: _Call) -> list[tuple[tuple[int, int, int], int, int]]:
    """Each pass, whether it adds to the partial map, and whether its result is the final one."""
    full, last = call.every_pass_full, len(call.passes) - 1
    return [
        (one, int(i > 0 or (last > 0 and not full)), int(i == last and (full or last == 0)))
        for i, one in enumerate(call.passes)
    ]


def backward(
    dy: Tensor, x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: Routes
) -> tuple[Tensor, ...]:
    """Gradients by x, low_rank, dt_weight, dt_bias, A and D, each in the dtype of its tensor."""
    dy, x, low_rank, dt_weight, dt_bias, A, D = (m.contiguous() for m in (dy, x, low_rank, dt_weight, dt_bias, A, D))
    call = _Call(x, low_rank, dt_weight, A, routes, most_states=4)
    dx = torch.empty_like(x) if call.every_pass_full else torch.zeros_like(x)
    dlow_rank = torch.empty_like(low_rank)
    grads = [m.new_zeros(m.shape, dtype=call.dtype) for m in (dt_weight, dt_bias, A, D)]
    wide = call.dtype.itemsize
    per_cell = call.channels * (
        call.blocks["BLOCK_N"] * x.dtype.itemsize * max(count for _, count, _ in call.passes) + wide
    ) + call.columns * call.parts * wide
    for part in call.slices(x.shape[0], call.cells * per_cell):
        weights = dt_weight, dt_bias, A, D
        _backward(call, dy[part], x[part], low_rank[part], *weights, dx[part], dlow_rank[part], grads)
    return dx, dlow_rank, *(grad.to(m.dtype) for grad, m in zip(grads, (dt_weight, dt_bias, A, D), strict=True))


def _backward(
    call: _Call,
    dy: Tensor,
    x: Tensor,
    low_rank: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dx: Tensor,
    dlow_rank: Tensor,
    grads: list[Tensor],
) -> None:
    """Writes dx and dlow_rank of a part of the batch and adds its part of the others to ``grads``."""
    batch = x.shape[0]
    plan = call.plan(batch)
    state, adjoint = call.carries(plan, x, dy, low_rank, dt_weight, dt_bias, A)
    partial = _partial(call, dx)
    runs = batch * plan.runs
    tiles = triton.cdiv(runs, call.blocks["BLOCK_M"])
    sizes = batch, call.cells, runs, call.channels, call.state, call.rank, call.columns
    step = call.blocks["BLOCK_M"] * call.blocks["BLOCK_D"] * call.blocks["BLOCK_N"]
    most = max(count for _, count, _ in call.passes)
    history = x.new_empty(most * tiles * call.parts * plan.steps * step)
    parts = low_rank.new_empty if call.every_route_full else low_rank.new_zeros
    dlow = parts((call.parts, *low_rank.shape), dtype=call.dtype)
    for (route, count, start), add, last in _order(call):
        here = slice(route, route + count)
        pieces = [
            dy.new_empty(tiles, count, call.channels, *trailing, dtype=call.dtype)
            for trailing in ((call.rank,), (), (call.blocks["BLOCK_N"],), ())
        ]
        gradient_kernel[tiles * call.parts, count](
            dy, x, low_rank, dt_weight, dt_bias, A, D, plan.table, state, adjoint, history, partial,
            dx, dlow, *pieces, *sizes, plan.steps, route, start, add, last, **call.constants,
        )  # fmt: skip
        dweight, dbias, dA, dD = (piece.sum(0) for piece in pieces)
        grads[0][here] += dweight
        grads[1][here] += dbias
        grads[2][here, :, start : start + dA.shape[-1]] += dA[..., : call.state - start]
        if start == 0:
            grads[3][here] += dD
    torch.sum(dlow, 0, out=dlow_rank) if dlow.dtype == dlow_rank.dtype else dlow_rank.copy_(dlow.sum(0))
    if partial is not dx and not call.every_pass_full:
        dx.copy_(partial)
