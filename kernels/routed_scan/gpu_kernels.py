"""The Triton kernels of the routed scan: no route is materialised and Δ is never written.

Every route is cut into runs of consecutive steps along its fastest axis. A program walks the runs of one tile, step by
step and side by side, so that a step is a tile [M runs, D channels] in the layout of the tensor cores that project Δ:
the recurrence needs neither an associative scan nor an exchange between threads. Three kernels make an operator,

1. ``summary``: what each run does to a state, h -> exp(A ΣΔ) h + state, with nothing carried in;
2. ``carry``: the states after each run, scanned from run to run;
3. ``apply`` (and ``gradient``): the runs once more, now with the state that comes in.

A cell's address is arithmetic in the step (``Route.affine``), so image size is no constant and nothing recompiles for a
new one. Where a route is a curve, every path is one line, whose steps are places in a table of cells, ``order``. Routes
that are each other's reverse share their runs, and one program walks them both ways; others that share cells follow
one launch after the other. All add to a float32 map: no atomics, so that two runs agree bit for bit. Exponentials are
to the base 2, the one that the hardware has: Δ is kept as Δ log2(e).
"""

import math

import triton
import triton.language as tl

from ..selective_scan.gpu import compose

_SIZES = ["BATCH", "CELLS", "RUNS", "RANK", "COLUMNS"]  # sizes and flags that no kernel is compiled for
_LAUNCH = ["ROW", "ROUTES", "ADD", "LAST"]
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
def state_columns(rows, o_n, BLOCK_N: tl.constexpr):
    """Places of B or C in rows [M, 1]: [M, N], or [M] for a single state."""
    return tl.reshape(rows, [rows.shape[0]]) + o_n if BLOCK_N == 1 else rows + o_n[None, :]


@triton.jit
def runs_of(table, order, row, o_m, BATCH, CELLS, FIELDS: tl.constexpr):
    """For runs ``o_m`` of a route, counted over the batch: the sample's first cell, first position (see ``cell_at``),
    number of steps, place among the sample's runs; then of the route: runs in a sample, most steps in a run, what a
    step adds to the position.

    The table's row of a route: sizes of the two faster axes, cells moved by a step along each axis, first cell, runs in
    a sample, steps in a run, whether it is reversed, index. A reversed route walks the same runs from their ends.
    """
    table += row * FIELDS
    size1, size2 = tl.load(table).to(tl.int32), tl.load(table + 1).to(tl.int32)
    step0, step1, step2 = tl.load(table + 2), tl.load(table + 3), tl.load(table + 4)
    runs, length = tl.load(table + 6).to(tl.int32), tl.load(table + 7).to(tl.int32)
    pieces = tl.cdiv(size2, length)
    sample = o_m // runs
    place = o_m - sample * runs
    line = place // pieces
    left = (place - line * pieces) * length
    slow = line // size1
    origin = sample.to(tl.int64) * CELLS
    at = tl.load(table + 5) + slow * step0 + (line - slow * size1) * step1 + left * step2
    if order is None:
        at += origin
    steps = tl.where(sample < BATCH, tl.minimum(size2 - left, length), 0)
    return origin, at, steps, place, runs, length, step2


@triton.jit
def cell_at(order, origin, at, mask):
    """The cells [M, 1] of positions ``at``: those numbers themselves, or what the table of cells has there.

    With an axis for channels or columns from the start: Triton 3.6 fails to give one to what it has loaded.
    """
    at = at[:, None]
    return at if order is None else origin[:, None] + tl.load(order + at, mask[:, None], 0)


@triton.jit
def enter(
    table, row, start, steps, stride, weight, bias, A, o_d, o_n, CHANNELS, STATE, RANK,
    FIELDS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What it takes to walk a route over the runs that begin at ``start``: its index, its direction (1 or -1), its
    first positions and step; projection [R, D] and bias [D] of Δ log2(e), and A [1, D] or [1, D, N].
    """
    table += row * FIELDS
    k, ahead = tl.load(table + 9).to(tl.int32), 1 - 2 * tl.load(table + 8).to(tl.int32)
    at = start + tl.where(ahead < 0, steps - 1, 0) * stride
    o_r = tl.arange(0, BLOCK_R)
    o_kd, m_d = k * CHANNELS + o_d, o_d < CHANNELS
    w = tl.load(weight + o_kd[None, :] * RANK + o_r[:, None], (o_r < RANK)[:, None] & m_d[None, :], 0.0)
    shift = tl.load(bias + o_kd, m_d, 0.0).to(ACC) * _LOG2E
    decay = tl.load(A + tail(o_kd * STATE, BLOCK_N) + o_n, with_states(m_d, o_n, STATE, BLOCK_N), 0.0).to(ACC)
    return k, ahead, at, stride * ahead, (w.to(ACC) * _LOG2E).to(DTYPE), shift, tl.expand_dims(decay, 0)


@triton.jit
def read(x, low_rank, cell, m_t, column, o_d, o_n, CHANNELS, STATE, RANK, COLUMNS, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of one step: x [M, D], the columns [M, R] of Δ, B and C.

    Called one step ahead, so that the loads are under way while the step before is computed. The columns are loaded
    as wide as they lie and cleared after those of Δ: a weight of 0 would not keep a NaN of another column out.
    """
    o_r = tl.arange(0, BLOCK_R)
    columns, column = COLUMNS // ALIGN * ALIGN, column // ALIGN * ALIGN  # as they are; the compiler sees the factor
    rows = cell * columns + column
    m_r = o_r < columns - column
    o_b, m_b = state_columns(rows + RANK, o_n, BLOCK_N), with_states(m_t, o_n, STATE, BLOCK_N)
    u = tl.load(x + cell * CHANNELS + o_d[None, :], m_t[:, None] & (o_d < CHANNELS)[None, :], 0.0)
    low = tl.load(low_rank + rows + o_r[None, :], m_t[:, None] & m_r[None, :], 0.0)
    low = tl.where((o_r < RANK)[None, :], low, 0.0).to(low.dtype)
    return u, low, tl.load(low_rank + o_b, m_b, 0.0), tl.load(low_rank + o_b + STATE, m_b, 0.0)


@triton.jit
def read_back(x, low_rank, dy, kept, cell, m_t, column, o_d, o_n, CHANNELS, STATE, RANK, COLUMNS, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As ``read``, and the gradient by y and the state before the step."""
    u, low, b, c = read(
        x, low_rank, cell, m_t, column, o_d, o_n, CHANNELS, STATE, RANK, COLUMNS, ALIGN, BLOCK_R, BLOCK_N
    )
    mask = m_t[:, None] & (o_d < CHANNELS)[None, :]
    return u, low, b, c, tl.load(dy + cell * CHANNELS + o_d[None, :], mask, 0.0), tl.load(kept)


@triton.jit
def step_size(low, m_t, w, shift, COARSE: tl.constexpr, ACC: tl.constexpr):
    """Δ log2(e) [M, D] before softplus and after it; 0 where the mask ends: such a step keeps the state."""
    raw = product(low, w, ACC) + shift[None, :]
    return raw, tl.where(m_t[:, None], softplus2(raw, COARSE), 0.0)


@triton.jit(do_not_specialize=_SIZES)
def summary_kernel(
    x, dy, low_rank, weight, bias, A, table, order, total, state, adjoint, dweights,
    BATCH, CELLS, RUNS, CHANNELS, STATE, RANK, COLUMNS,
    FIELDS: tl.constexpr, ALIGN: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of each run: ΣΔ, the state it leaves behind with none before it and, if ``dy`` is given, the gradient that it
    sends back with none after it (all steps weighted by the decay up to them, so that one walk serves both) and the
    gradient by D, which is the last part of ``dweights``."""
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    row, part = tl.program_id(1), tl.program_id(0) // blocks
    o_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    o_m = part * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(2) * BLOCK_N
    o_n = states_from(first, BLOCK_N)
    m_d = o_d < CHANNELS
    origin, start, steps, _place, _runs, length, stride = runs_of(table, order, row, o_m, BATCH, CELLS, FIELDS)
    k, _ahead, at, step, w, shift, decay = enter(
        table, row, start, steps, stride, weight, bias, A, o_d, o_n, CHANNELS, STATE, RANK,
        FIELDS, low_rank.dtype.element_ty, ACC, BLOCK_R, BLOCK_N,
    )  # fmt: skip
    column = k * (RANK + 2 * STATE) % COLUMNS  # one set of columns may serve all routes
    s = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    sum_D = s
    h = tail(s, BLOCK_N) * decay
    p, g = h + 1, h
    m_next = steps > 0
    cell = cell_at(order, origin, at, m_next)
    u_next, low_next, b_next, c_next = read(
        x, low_rank, cell, m_next, column, o_d, o_n, CHANNELS, STATE, RANK, COLUMNS, ALIGN, BLOCK_R, BLOCK_N
    )
    for t in range(length):
        m_t, u, low = m_next, u_next.to(ACC), low_next
        b, c = tl.expand_dims(b_next.to(ACC) * _LN2, 1), tl.expand_dims(c_next.to(ACC), 1)
        if dy is not None:
            mask = m_t[:, None] & m_d[None, :]
            dout = tl.load(dy + cell * CHANNELS + o_d[None, :], mask, 0.0).to(ACC)
        at += step
        m_next = t + 1 < steps
        cell = cell_at(order, origin, at, m_next)
        u_next, low_next, b_next, c_next = read(
            x, low_rank, cell, m_next, column, o_d, o_n, CHANNELS, STATE, RANK, COLUMNS, ALIGN, BLOCK_R, BLOCK_N
        )
        _raw, dt = step_size(low, m_t, w, shift, COARSE, ACC)
        a = tl.exp2(tail(dt, BLOCK_N) * decay)
        h = a * h + tail(dt * u, BLOCK_N) * b
        s += dt
        if dy is not None:
            p *= a
            g += p * (tail(dout, BLOCK_N) * c)
            sum_D += dout * u

    run = row * RUNS.to(tl.int64) + o_m
    m_md = (steps > 0)[:, None] & m_d[None, :]
    o_s = tail(run[:, None] * STATE * CHANNELS + o_d[None, :], BLOCK_N) + o_n * CHANNELS
    m_s = with_states(m_md, o_n, STATE, BLOCK_N)
    tl.store(state + o_s, h, m_s)
    if dy is not None:
        tl.store(adjoint + o_s, g, m_s)
    if first == 0:
        tl.store(total + run[:, None] * CHANNELS + o_d[None, :], s, m_md)
        if dy is not None:
            K = tl.num_programs(1)
            o_p = part.to(tl.int64) * K * CHANNELS * (RANK + 2 + STATE) + K * CHANNELS * (RANK + 1 + STATE)
            tl.store(dweights + o_p + k * CHANNELS + o_d, tl.sum(sum_D, axis=0), m_d)


@triton.jit(do_not_specialize=["RUNS"])
def carry_kernel(
    total, state, adjoint, A, table, RUNS, CHANNELS, STATE,
    FIELDS: tl.constexpr, ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The states after each run, in place of those that it leaves alone; so the gradients, from the last run on."""
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    n, row = tl.program_id(0) // blocks % STATE, tl.program_id(1)
    o_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < CHANNELS
    table += row * FIELDS
    runs, back, k = tl.load(table + 6).to(tl.int32), tl.load(table + 8).to(tl.int32), tl.load(table + 9).to(tl.int32)
    if tl.program_id(2) == 1:
        state = adjoint
        back = 1 - back
    start = row * RUNS.to(tl.int64) + tl.program_id(0).to(tl.int64) // blocks // STATE * runs
    decay = tl.load(A + (k * CHANNELS + o_d) * STATE + n, m_d, 0.0).to(ACC)
    h = tl.zeros([BLOCK_D], ACC)
    for chunk in range(tl.cdiv(runs, BLOCK_L)):
        o_l = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (o_l < runs)[:, None] & m_d[None, :]
        run = start + tl.where(back == 1, runs - 1 - o_l, o_l)
        a = tl.exp2(tl.load(total + run[:, None] * CHANNELS + o_d[None, :], mask, 0.0) * decay[None, :])
        o_s = (run * STATE + n)[:, None] * CHANNELS + o_d[None, :]
        a, b = tl.associative_scan((a, tl.load(state + o_s, mask, 0.0)), 0, compose)
        after = a * h[None, :] + b
        tl.store(state + o_s, after, mask)
        h = tl.sum(tl.where((tl.arange(0, BLOCK_L) == BLOCK_L - 1)[:, None], after, 0.0), axis=0)


@triton.jit(do_not_specialize=[*_SIZES, *_LAUNCH])
def apply_kernel(
    x, low_rank, weight, bias, A, D, table, order, state, partial, y,
    BATCH, CELLS, RUNS, CHANNELS, STATE, RANK, COLUMNS, ROW, ROUTES, ADD, LAST,
    FIELDS: tl.constexpr, ALIGN: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t;  y_t = C_t h_t + D u_t   (arXiv:2401.10166, section 4.2)

    For ROUTES routes over the same runs, one after the other. Adds what ``partial`` holds if ADD; stores the end to y
    if this is the LAST launch, else to ``partial``.
    """
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    o_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    o_m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    m_d = o_d < CHANNELS
    parts = tl.cdiv(STATE, BLOCK_N)
    path = ROW + tl.program_id(1) * ROUTES
    origin, start, steps, place, runs, length, stride = runs_of(table, order, path, o_m, BATCH, CELLS, FIELDS)
    for i in range(ROUTES * parts):
        row = path + i // parts
        o_n = states_from(i % parts * BLOCK_N, BLOCK_N)
        k, ahead, at, step, w, shift, decay = enter(
            table, row, start, steps, stride, weight, bias, A, o_d, o_n, CHANNELS, STATE, RANK,
            FIELDS, low_rank.dtype.element_ty, ACC, BLOCK_R, BLOCK_N,
        )  # fmt: skip
        skip = tl.load(D + k * CHANNELS + o_d, o_d < tl.where(i % parts == 0, CHANNELS, 0), 0.0).to(ACC)
        before = place - ahead
        run = row * RUNS.to(tl.int64) + o_m - ahead
        o_s = tail(run[:, None] * STATE * CHANNELS + o_d[None, :], BLOCK_N) + o_n * CHANNELS
        m_s = ((steps > 0) & (before >= 0) & (before < runs))[:, None] & m_d[None, :]
        h = tl.load(state + o_s, with_states(m_s, o_n, STATE, BLOCK_N), 0.0)
        m_add = o_d < tl.where(ADD + i > 0, CHANNELS, 0)
        last = (LAST > 0) & (i == ROUTES * parts - 1)

        column = k * (RANK + 2 * STATE) % COLUMNS  # one set of columns may serve all routes
        m_next = steps > 0
        cell = cell_at(order, origin, at, m_next)
        u_next, low_next, b_next, c_next = read(
            x, low_rank, cell, m_next, column, o_d, o_n, CHANNELS, STATE, RANK, COLUMNS, ALIGN, BLOCK_R, BLOCK_N
        )
        for t in range(length):
            m_t, u, low = m_next, u_next.to(ACC), low_next
            b, c = tl.expand_dims(b_next.to(ACC) * _LN2, 1), tl.expand_dims(c_next.to(ACC), 1)
            offset = cell * CHANNELS + o_d[None, :]
            old = tl.load(partial + offset, m_t[:, None] & m_add[None, :], 0.0).to(ACC)
            at += step
            m_next = t + 1 < steps
            cell = cell_at(order, origin, at, m_next)
            u_next, low_next, b_next, c_next = read(
                x, low_rank, cell, m_next, column, o_d, o_n, CHANNELS, STATE, RANK, COLUMNS, ALIGN, BLOCK_R, BLOCK_N
            )
            _raw, dt = step_size(low, m_t, w, shift, COARSE, ACC)
            h = tl.exp2(tail(dt, BLOCK_N) * decay) * h + tail(dt * u, BLOCK_N) * b
            out = (u * skip[None, :] + old) + over_states(h * c, BLOCK_N)
            mask = m_t[:, None] & m_d[None, :]
            if last:
                tl.store(y + offset, out, mask)
            else:
                tl.store(partial + offset, out, mask)
        tl.debug_barrier()  # what one thread stored, another may load for the next route


@triton.jit(
    do_not_specialize=["BATCH", "CELLS", "RUNS", "RANK", "COLUMNS", "K", "LONGEST", "ROW", "ROUTES", "ADD", "LAST"]
)
def gradient_kernel(
    dy, x, low_rank, weight, bias, A, D, table, order, state, adjoint, history, partial, dx, dlow_rank, dweights,
    BATCH, CELLS, RUNS, CHANNELS, STATE, RANK, COLUMNS, K, LONGEST, ROW, ROUTES, ADD, LAST,
    FIELDS: tl.constexpr, ALIGN: tl.constexpr, COARSE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradients of ``apply_kernel``: a walk forward that keeps the states, and one back.

    ``dx`` is as y there. ``dlow_rank`` is per block of channels, ``dweights`` per tile of runs: the gradients by
    dt_weight (k, c, r), dt_bias (k, c), A (k, c, n), D (k, c) in a row. The launcher adds them up in a fixed order.
    """
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    o_m = part * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.arange(0, BLOCK_R)
    m_d, m_r = o_d < CHANNELS, o_r < RANK
    tile = BLOCK_M * BLOCK_D * BLOCK_N
    o_h = tail(tl.arange(0, BLOCK_M)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], BLOCK_N) * BLOCK_N
    o_h += states_from(0, BLOCK_N)
    history += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * LONGEST * tile
    dlow_rank += block.to(tl.int64) * BATCH * CELLS * COLUMNS
    parts = tl.cdiv(STATE, BLOCK_N)
    path = ROW + tl.program_id(1) * ROUTES
    origin, start, steps, place, runs, length, stride = runs_of(table, order, path, o_m, BATCH, CELLS, FIELDS)
    for i in range(ROUTES * parts):
        row = path + i // parts
        o_n = states_from(i % parts * BLOCK_N, BLOCK_N)
        k, ahead, at, step, w, shift, decay = enter(
            table, row, start, steps, stride, weight, bias, A, o_d, o_n, CHANNELS, STATE, RANK,
            FIELDS, low_rank.dtype.element_ty, ACC, BLOCK_R, BLOCK_N,
        )  # fmt: skip
        skip = tl.load(D + k * CHANNELS + o_d, o_d < tl.where(i % parts == 0, CHANNELS, 0), 0.0).to(ACC)
        o_w = (k * CHANNELS + o_d)[:, None] * RANK + o_r[None, :]
        w_back = tl.load(weight + o_w, m_d[:, None] & m_r[None, :], 0.0).to(low_rank.dtype.element_ty)
        before, after = place - ahead, place + ahead
        run = row * RUNS.to(tl.int64) + o_m
        o_s = tail(run[:, None] * STATE * CHANNELS + o_d[None, :], BLOCK_N) + o_n * CHANNELS
        m_s = (steps > 0)[:, None] & m_d[None, :]
        m_h = with_states(m_s & ((before >= 0) & (before < runs))[:, None], o_n, STATE, BLOCK_N)
        m_g = with_states(m_s & ((after >= 0) & (after < runs))[:, None], o_n, STATE, BLOCK_N)
        h = tl.load(state + o_s - ahead * STATE * CHANNELS, m_h, 0.0)
        g = tl.load(adjoint + o_s + ahead * STATE * CHANNELS, m_g, 0.0)

        column = k * (RANK + 2 * STATE) % COLUMNS  # one set of columns may serve all routes
        m_next = steps > 0
        cell = cell_at(order, origin, at, m_next)
        u_next, low_next, b_next, c_next = read(
            x, low_rank, cell, m_next, column, o_d, o_n, CHANNELS, STATE, RANK, COLUMNS, ALIGN, BLOCK_R, BLOCK_N
        )
        for t in range(length):
            m_t, u, low, b = m_next, u_next.to(ACC), low_next, tl.expand_dims(b_next.to(ACC) * _LN2, 1)
            at += step
            m_next = t + 1 < steps
            cell = cell_at(order, origin, at, m_next)
            u_next, low_next, b_next, c_next = read(
                x, low_rank, cell, m_next, column, o_d, o_n, CHANNELS, STATE, RANK, COLUMNS, ALIGN, BLOCK_R, BLOCK_N
            )
            tl.store(history + t * tile + o_h, h)
            _raw, dt = step_size(low, m_t, w, shift, COARSE, ACC)
            h = tl.exp2(tail(dt, BLOCK_N) * decay) * h + tail(dt * u, BLOCK_N) * b
        tl.debug_barrier()  # what one thread stored, another may load

        sum_w = tl.zeros([BLOCK_R, BLOCK_D], ACC)
        sum_A = h * 0
        m_add = o_d < tl.where(ADD + i > 0, CHANNELS, 0)
        m_more = o_r < tl.where(i % parts > 0, RANK, 0)
        last = (LAST > 0) & (i == ROUTES * parts - 1)
        at -= step
        m_next = length <= steps
        cell = cell_at(order, origin, at, m_next)
        u_next, low_next, b_next, c_next, dout_next, h_next = read_back(
            x, low_rank, dy, history + (length - 1) * tile + o_h, cell, m_next, column, o_d, o_n,
            CHANNELS, STATE, RANK, COLUMNS, ALIGN, BLOCK_R, BLOCK_N,
        )  # fmt: skip
        for i_back in range(length):
            t = length - 1 - i_back
            m_t, u, low, dout, h = m_next, u_next.to(ACC), low_next, dout_next.to(ACC), h_next.to(ACC)
            b, c = tl.expand_dims(b_next.to(ACC) * _LN2, 1), tl.expand_dims(c_next.to(ACC), 1)
            offset, rows = cell * CHANNELS + o_d[None, :], cell * COLUMNS + column
            old = tl.load(partial + offset, m_t[:, None] & m_add[None, :], 0.0).to(ACC)
            at -= step
            m_next = (t - 1 < steps) & (steps * 0 < t)
            cell = cell_at(order, origin, at, m_next)
            u_next, low_next, b_next, c_next, dout_next, h_next = read_back(
                x, low_rank, dy, history + tl.maximum(t - 1, 0) * tile + o_h, cell, m_next, column, o_d, o_n,
                CHANNELS, STATE, RANK, COLUMNS, ALIGN, BLOCK_R, BLOCK_N,
            )  # fmt: skip
            raw, dt = step_size(low, m_t, w, shift, COARSE, ACC)

            a = tl.exp2(tail(dt, BLOCK_N) * decay)
            kept = a * h
            g += tail(dout, BLOCK_N) * c
            log_a = g * kept  # the gradient by Δ A
            sum_A += log_a * tail(dt, BLOCK_N)
            du = tail(dt * u, BLOCK_N)
            dB = tl.sum(g * du, axis=1) * _LN2
            dC = tl.sum(tail(dout, BLOCK_N) * (kept + du * b), axis=1)
            db = over_states(g * b, BLOCK_N)
            # b holds ln 2; the sigmoid, which is softplus's slope, is 2^(raw - dt)
            draw = (over_states(log_a * decay, BLOCK_N) + db * u * _LOG2E) * tl.exp2(raw - dt)
            draw = tl.where(m_t[:, None], draw, 0.0).to(low_rank.dtype.element_ty)
            g *= a
            out = (dout * skip[None, :] + old) + db * dt
            mask = m_t[:, None] & m_d[None, :]
            if last:
                tl.store(dx + offset, out, mask)
            else:
                tl.store(partial + offset, out, mask)
            dlow = product(draw, w_back, ACC)
            o_low = rows + o_r[None, :]
            if BLOCK_N == 1:
                dlow = tl.where(
                    o_r[None, :] == RANK, dB[:, None], tl.where(o_r[None, :] == RANK + 1, dC[:, None], dlow)
                )
                tl.store(dlow_rank + o_low, dlow, m_t[:, None] & (o_r < RANK + 2)[None, :])
            else:
                o_b, m_b = state_columns(rows + RANK, o_n, BLOCK_N), with_states(m_t, o_n, STATE, BLOCK_N)
                tl.store(dlow_rank + o_b, dB, m_b)
                tl.store(dlow_rank + o_b + STATE, dC, m_b)
                dlow += tl.load(dlow_rank + o_low, m_t[:, None] & m_more[None, :], 0.0)
                tl.store(dlow_rank + o_low, dlow, m_t[:, None] & m_r[None, :])
            low = tl.where(o_r[None, :] == RANK, 1.0, low)  # a column of ones gives the bias's gradient
            sum_w += product(tl.trans(low).to(draw.dtype), draw, ACC)

        o_kd, o_p = k * CHANNELS + o_d, part.to(tl.int64) * K * CHANNELS * (RANK + 2 + STATE)
        o_w = o_kd[None, :] * RANK + o_r[:, None]
        o_w = o_p + tl.where(o_r[:, None] == RANK, K * CHANNELS * RANK + o_kd[None, :], o_w)
        sum_w += tl.load(dweights + o_w, (o_r < tl.where(i % parts > 0, RANK + 1, 0))[:, None] & m_d[None, :], 0.0)
        tl.store(dweights + o_w, sum_w, (o_r < RANK + 1)[:, None] & m_d[None, :])
        o_A = o_p + K * CHANNELS * (RANK + 1) + tail(o_kd * STATE, BLOCK_N) + o_n
        tl.store(dweights + o_A, tl.sum(sum_A, axis=0) * _LN2, with_states(m_d, o_n, STATE, BLOCK_N))
        tl.debug_barrier()
