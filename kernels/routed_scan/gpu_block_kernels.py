"""The routed scan in Gluon, Triton's dialect with explicit layouts: half-precision maps on NVIDIA GPUs.

A route is walked in blocks of T steps. A warp holds a block as T x 32 channels with a whole column, one channel over
the T steps, in each thread: the recurrence is T multiply-adds of one thread, with no exchange between threads and no
second pass. Around it a tile changes hands through shared memory only where it must: the projection of Δ comes from the
tensor cores, maps are read and written a row at a time, and the next blocks are under way (``cp.async``) meanwhile.

``walk_kernel``      a route from its first step to its last, or a segment of it: writes the output, or what a segment
                     does to a state, or the state before each block;
``gradient_kernel``  the blocks of a route from the last to the first, all gradients.

``gpu_pair_kernels.py`` has those of a route with its reverse.

``order`` (k, segments * SEGMENT) holds the cell of each step, -1 where there is none. A route that is the reverse of
another has its missing steps in front, so that their blocks coincide. Nothing is compiled for an image size.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ..selective_scan.gpu import compose
from .gpu_block_parts import (
    LN2,
    LOG2E,
    SLOTS,
    STAGES,
    T,
    advance,
    await_block,
    by_columns,
    by_rows,
    cells_of,
    fetch_cells,
    fetch_inputs,
    fetch_rows,
    fetch_states,
    gradients,
    keep,
    only,
    operand,
    pair,
    products,
    projection,
    raw_step,
    retreat,
    send_back,
    shared,
    shared_projection,
    softplus2,
    step_of,
    store_low_rank,
    store_sums,
)

_SIZES = ["CELLS", "COLUMNS", "SEGMENT", "SEGMENTS"]  # no kernel is compiled for them


@gluon.jit(do_not_specialize=_SIZES)
def walk_kernel(
    x, dy, low_rank, weight, bias, A, skips, order, start, total, state, adjoint, history, prefix, y,
    CELLS, CHANNELS, COLUMNS, SEGMENT, SEGMENTS,
    RANK: gl.constexpr, STATE: gl.constexpr, R: gl.constexpr, N: gl.constexpr, D: gl.constexpr, ALIGN: gl.constexpr,
    OUTPUT: gl.constexpr, TRACE: gl.constexpr, ADJOINT: gl.constexpr, PARTIAL: gl.constexpr, SPLIT: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """OUTPUT: y from the states ``start`` of the segments, per route if PARTIAL. Else, with nothing before a segment:
    its ΣΔ (``total``), the ``state`` after it, with ADJOINT the gradient that it sends back, and with TRACE the state
    before each block (``history``) and ΣΔ up to it (``prefix``)."""
    CHANNELS, columns = CHANNELS // 8 * 8, COLUMNS // ALIGN * ALIGN  # as they are; the compiler sees the factors
    half: gl.constexpr = x.dtype.element_ty
    L: gl.constexpr = by_columns(W)
    Y: gl.constexpr = by_rows(D, 4, W)
    CL: gl.constexpr = gl.SliceLayout(0, L)
    RL: gl.constexpr = gl.SliceLayout(1, L)

    blocks = gl.cdiv(CHANNELS, D)
    k, part, d0 = gl.program_id(1), gl.program_id(0) // blocks, gl.program_id(0) % blocks * D
    parts = gl.num_programs(0) // blocks
    sample, segment, left = part // SEGMENTS, part % SEGMENTS, CHANNELS - d0
    row = k.to(gl.int64) * parts + part
    order += (k * SEGMENTS + segment) * SEGMENT
    column = k * (RANK + 2 * STATE) % COLUMNS  # one set of columns may serve all routes
    bases = (
        x + sample.to(gl.int64) * CELLS * CHANNELS + d0,
        low_rank + sample.to(gl.int64) * CELLS * columns + column // ALIGN * ALIGN,
    )
    dy += sample.to(gl.int64) * CELLS * CHANNELS + d0
    y += (k.to(gl.int64) * (parts // SEGMENTS if PARTIAL else 0) + sample) * CELLS * CHANNELS + d0
    o_d = gl.arange(0, D, CL)
    m_d = o_d < left
    o_s = row * STATE * CHANNELS + d0 + o_d  # (k, parts, n, c)
    first = k * CHANNELS + d0
    w = projection(weight, first, left, RANK, R, D, W, half)
    o_dm = gl.arange(0, D, gl.SliceLayout(0, products(W)))
    shift = gl.load(bias + first + o_dm, o_dm < left, 0.0).to(gl.float32) * LOG2E
    skip = gl.load(skips + first + o_d, m_d, 0.0).to(gl.float32)

    cells = gl.allocate_shared_memory(gl.int32, [SLOTS, T], shared([0]))
    inputs = (
        gl.allocate_shared_memory(half, [STAGES, T, D], shared([1, 0])),
        gl.allocate_shared_memory(half, [STAGES, T, R], shared([1, 0])),
        gl.allocate_shared_memory(half, [STAGES, T, 2 * N], shared([1, 0])),
    )
    dys = gl.allocate_shared_memory(half, [STAGES, T, D], shared([1, 0]))
    if STATE > 1:
        turned = gl.allocate_shared_memory(gl.float32, [2 * N, T], shared([1, 0]))
        turned_rows = turned._reinterpret(gl.float32, [2 * N, T], shared([0]))
        decays = gl.allocate_shared_memory(gl.float32, [N, D], shared([0]))
        states = gl.allocate_shared_memory(gl.float32, [N, D], shared([0]))
        decayed = gl.allocate_shared_memory(gl.float32, [N, D], shared([0]))
        grads = gl.allocate_shared_memory(gl.float32, [N, D], shared([0]))
        for n in range(STATE):
            decays.index(n).store(gl.load(A + n * CHANNELS * gl.num_programs(1) + first + o_d, m_d, 0.0))
            states.index(n).store(gl.zeros([D], gl.float32, CL))
            if OUTPUT and SPLIT:
                states.index(n).store(gl.load(start + o_s + n * CHANNELS, m_d, 0.0))
            if ADJOINT:
                decayed.index(n).store(gl.full([D], 1.0, gl.float32, CL))
                grads.index(n).store(gl.zeros([D], gl.float32, CL))
    else:
        decay = gl.load(A + first + o_d, m_d, 0.0)
        h = gl.zeros([D], gl.float32, CL)
        if OUTPUT and SPLIT:
            h = gl.load(start + o_s, m_d, 0.0)
        p, g = gl.full([D], 1.0, gl.float32, CL), gl.zeros([D], gl.float32, CL)
    sum_dt = gl.zeros([D], gl.float32, CL)

    count = SEGMENT // T
    for i in gl.static_range(SLOTS - 2):
        fetch_cells(cells, i, order, gl.minimum(i, count - 1), W)
    async_copy.commit_group()
    for i in range(1 - STAGES, count):
        await_block()
        ahead = i + STAGES - 1
        fetch_inputs(
            inputs, bases, cells.index(ahead % SLOTS), ahead % STAGES, CHANNELS, columns, left, RANK, STATE, ALIGN, W
        )
        if ADJOINT:
            fetch_rows(dys.index(ahead % STAGES), dy, cells.index(ahead % SLOTS), CHANNELS, left, 8, W)
        fetch_cells(cells, ahead + STAGES - 1, order, gl.minimum(ahead + STAGES - 1, count - 1), W)
        async_copy.commit_group()
        if i >= 0:
            slot = i % STAGES
            low_s = inputs[1].index(slot)
            u = inputs[0].index(slot).load(L).to(gl.float32)
            dt = softplus2(raw_step(low_s, w, shift, RANK, W))
            dt = gl.convert_layout(gl.where((cells_of(cells, i, products(W)) >= 0)[:, None], dt, 0.0), L)
            du = dt * u
            if ADJOINT:
                v = dys.index(slot).load(L).to(gl.float32)
            if TRACE and SPLIT:
                gl.store(prefix + (row * count + i) * CHANNELS + d0 + o_d, sum_dt, m_d)
            if STATE == 1:
                b, c = pair(low_s, RANK, LN2, W)
                if TRACE:
                    gl.store(history + (row * count + i) * CHANNELS + d0 + o_d, h, m_d)
                a = gl.exp2(dt * decay[None, :])
                hs, h = advance(a, du * b[:, None], h, False)
                if ADJOINT:
                    p, g = send_back(a, v * c[:, None], p, g)
                out = hs * c[:, None]
            else:
                turned.permute([1, 0]).store(inputs[2].index(slot).load(by_rows(2 * N, 2, W)).to(gl.float32))
                out = gl.zeros([T, D], gl.float32, L)
                for n in range(STATE):
                    h = states.index(n).load(CL)
                    if TRACE:
                        gl.store(history + ((row * count + i) * STATE + n) * CHANNELS + d0 + o_d, h, m_d)
                    a = gl.exp2(dt * decays.index(n).load(CL)[None, :])
                    b = turned_rows.index(n).load(RL) * LN2
                    hs, h = advance(a, du * b[:, None], h, False)
                    states.index(n).store(h)
                    if ADJOINT or OUTPUT:
                        c = turned_rows.index(N + n).load(RL)
                    if ADJOINT:
                        p, g = send_back(a, v * c[:, None], decayed.index(n).load(CL), grads.index(n).load(CL))
                        decayed.index(n).store(p)
                        grads.index(n).store(g)
                    if OUTPUT:
                        out += hs * c[:, None]
            if OUTPUT:
                out = gl.convert_layout(out + u * skip[None, :], Y)
                cell = cells_of(cells, i, Y)
                o_c = gl.arange(0, D, gl.SliceLayout(0, Y))
                mask = (cell >= 0)[:, None] & (o_c < left)[None, :]
                gl.store(y + (cell * CHANNELS)[:, None] + o_c[None, :], out.to(y.dtype.element_ty), mask)
            else:
                sum_dt += gl.sum(dt, axis=0)
    async_copy.wait_group(0)
    if not OUTPUT and SPLIT:
        gl.store(total + row * CHANNELS + d0 + o_d, sum_dt, m_d)
        if STATE == 1:
            gl.store(state + o_s, h, m_d)
            if ADJOINT:
                gl.store(adjoint + o_s, g, m_d)
        else:
            for n in range(STATE):
                gl.store(state + o_s + n * CHANNELS, states.index(n).load(CL), m_d)
                if ADJOINT:
                    gl.store(adjoint + o_s + n * CHANNELS, grads.index(n).load(CL), m_d)


@gluon.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    dy, x, low_rank, weight, bias, A, skips, order, start, history, prefix, adjoint, dx, dlow_rank, dweights,
    CELLS, CHANNELS, COLUMNS, SEGMENT, SEGMENTS,
    RANK: gl.constexpr, STATE: gl.constexpr, R: gl.constexpr, N: gl.constexpr, D: gl.constexpr, ALIGN: gl.constexpr,
    PARTIAL: gl.constexpr, SPLIT: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """All gradients of a segment of a route, from its last block to its first.

    ``dx`` is per route if PARTIAL; ``dlow_rank`` per block of channels; ``dweights`` per segment: the gradients by
    dt_weight (k, c, r), dt_bias (k, c), A (k, c, n), D (k, c) in a row. The launcher adds them up in a fixed order.
    Sums over channels are products on the tensor cores, whose operands are in the dtype of the maps.
    """
    CHANNELS, columns = CHANNELS // 8 * 8, COLUMNS // ALIGN * ALIGN
    half: gl.constexpr = x.dtype.element_ty
    L: gl.constexpr = by_columns(W)
    M: gl.constexpr = products(W)
    Y: gl.constexpr = by_rows(D, 4, W)
    CL: gl.constexpr = gl.SliceLayout(0, L)
    RL: gl.constexpr = gl.SliceLayout(1, L)

    blocks = gl.cdiv(CHANNELS, D)
    K = gl.num_programs(1)
    k, part, block = gl.program_id(1), gl.program_id(0) // blocks, gl.program_id(0) % blocks
    parts = gl.num_programs(0) // blocks
    d0 = block * D
    sample, samples, segment, left = part // SEGMENTS, parts // SEGMENTS, part % SEGMENTS, CHANNELS - d0
    row = k.to(gl.int64) * parts + part
    order += (k * SEGMENTS + segment) * SEGMENT
    column = k * (RANK + 2 * STATE) % COLUMNS  # one set of columns may serve all routes
    bases = (
        x + sample.to(gl.int64) * CELLS * CHANNELS + d0,
        low_rank + sample.to(gl.int64) * CELLS * columns + column // ALIGN * ALIGN,
    )
    dy += sample.to(gl.int64) * CELLS * CHANNELS + d0
    dx += (k.to(gl.int64) * (samples if PARTIAL else 0) + sample) * CELLS * CHANNELS + d0
    dlow_rank += (block.to(gl.int64) * samples + sample) * CELLS * COLUMNS + column
    count = SEGMENT // T
    o_d = gl.arange(0, D, CL)
    m_d = o_d < left
    first = k * CHANNELS + d0
    o_s = row * STATE * CHANNELS + d0 + o_d
    projected = shared_projection(weight, bias, first, left, RANK, R, D, W, half)
    o_dm = gl.arange(0, D, gl.SliceLayout(0, M))
    skip = gl.load(skips + first + o_d, m_d, 0.0).to(gl.float32)

    cells = gl.allocate_shared_memory(gl.int32, [SLOTS, T], shared([0]))
    inputs = (
        gl.allocate_shared_memory(half, [STAGES, T, D], shared([1, 0])),
        gl.allocate_shared_memory(half, [STAGES, T, R], shared([1, 0])),
        gl.allocate_shared_memory(half, [STAGES, T, 2 * N], shared([1, 0])),
    )
    dys = gl.allocate_shared_memory(half, [STAGES, T, D], shared([1, 0]))
    kept_states = gl.allocate_shared_memory(gl.float32, [STAGES, N, D], shared([1, 0]))
    terms = gl.allocate_shared_memory(half, [T, D], shared([1, 0], 8, 4, 2))
    sum_w = gl.zeros([R, D], gl.float32, M)
    sum_b = gl.zeros([D], gl.float32, CL)
    sum_D = gl.zeros([D], gl.float32, CL)
    if STATE == 1:
        decay = gl.load(A + first + o_d, m_d, 0.0)
        sum_A = gl.zeros([D], gl.float32, CL)
        g = gl.zeros([D], gl.float32, CL)
        if SPLIT:
            g = gl.load(adjoint + o_s, m_d, 0.0)
    else:
        o_rm, o_nm = gl.arange(0, R, gl.SliceLayout(0, M)), gl.arange(0, N, gl.SliceLayout(0, M))
        turned = gl.allocate_shared_memory(gl.float32, [2 * N, T], shared([1, 0]))
        turned_rows = turned._reinterpret(gl.float32, [2 * N, T], shared([0]))
        decays = gl.allocate_shared_memory(gl.float32, [N, D], shared([0]))
        grads = gl.allocate_shared_memory(gl.float32, [N, D], shared([0]))
        sums = gl.allocate_shared_memory(gl.float32, [N, D], shared([0]))
        for n in range(STATE):
            decays.index(n).store(gl.load(A + n * CHANNELS * K + first + o_d, m_d, 0.0))
            sums.index(n).store(gl.zeros([D], gl.float32, CL))
            grads.index(n).store(gl.zeros([D], gl.float32, CL))
            if SPLIT:
                grads.index(n).store(gl.load(adjoint + o_s + n * CHANNELS, m_d, 0.0))

    for i in gl.static_range(SLOTS - 2):
        fetch_cells(cells, i, order, gl.maximum(count - 1 - i, 0), W)
    async_copy.commit_group()
    for i in range(1 - STAGES, count):
        await_block()
        ahead = i + STAGES - 1
        slot_a, place_a = ahead % STAGES, gl.maximum(count - 1 - ahead, 0)
        fetch_inputs(inputs, bases, cells.index(ahead % SLOTS), slot_a, CHANNELS, columns, left, RANK, STATE, ALIGN, W)
        fetch_rows(dys.index(slot_a), dy, cells.index(ahead % SLOTS), CHANNELS, left, 8, W)
        o_h = (row * count + place_a) * STATE * CHANNELS + d0
        fetch_states(kept_states.index(slot_a), history + o_h, CHANNELS, STATE, left, W)
        fetch_cells(cells, ahead + STAGES - 1, order, gl.maximum(count - ahead - STAGES, 0), W)
        async_copy.commit_group()
        if i >= 0:
            slot, place = i % STAGES, count - 1 - i
            low_s = inputs[1].index(slot)
            u = inputs[0].index(slot).load(L).to(gl.float32)
            v = dys.index(slot).load(L).to(gl.float32)
            cell_m = cells_of(cells, i, M)
            sum_D += gl.sum(u * v, axis=0)
            if SPLIT:
                since = gl.load(prefix + (row * count + place) * CHANNELS + d0 + o_d, m_d, 0.0)
            if STATE == 1:
                h = gl.sum(kept_states.index(slot).load(L), axis=0)
                if SPLIT:
                    h += gl.exp2(since * decay) * gl.load(start + o_s, m_d, 0.0)
                du, acc, acc_bc, sum_w, sum_b, sum_A, _h, g = gradients(
                    low_s, terms, u, v, cell_m, projected, decay, h, g, sum_w, sum_b, sum_A, RANK, False, W
                )
                store_low_rank(dlow_rank, cell_m, columns, acc, acc_bc, RANK, W)
            else:
                dt, slope = step_of(low_s, cell_m, projected, RANK, W)
                delta = dt * LN2
                du = delta * u
                turned.permute([1, 0]).store(inputs[2].index(slot).load(by_rows(2 * N, 2, W)).to(gl.float32))
                h_rows = kept_states.index(slot)._reinterpret(gl.float32, [N, D], shared([0]))
                da = gl.zeros([T, D], gl.float32, L)
                db = gl.zeros([T, D], gl.float32, L)
                acc_b = gl.zeros([T, N], gl.float32, M)
                acc_c = gl.zeros([T, N], gl.float32, M)
                for n in range(STATE):
                    b, c = turned_rows.index(n).load(RL), turned_rows.index(N + n).load(RL)
                    decay = decays.index(n).load(CL)
                    a = gl.exp2(dt * decay[None, :])
                    s = du * b[:, None]
                    h = h_rows.index(n).load(CL)
                    if SPLIT:
                        h += gl.exp2(since * decay) * gl.load(start + o_s + n * CHANNELS, m_d, 0.0)
                    kept, _h = keep(a, s, h, False)
                    gs, g = retreat(a, v * c[:, None], grads.index(n).load(CL), False)
                    grads.index(n).store(g)
                    log_a = gs * kept
                    sums.index(n).store(sums.index(n).load(CL) + gl.sum(log_a * delta, axis=0))
                    da += log_a * decay[None, :]
                    db += gs * b[:, None]
                    ones = only(n, D, N, W, half)
                    terms.store((gs * du).to(half))
                    acc_b = mma_v2(terms.load(operand(0, W)), ones, acc_b)
                    terms.store((v * (kept + s)).to(half))
                    acc_c = mma_v2(terms.load(operand(0, W)), ones, acc_c)
                draw = (da + db * u) * slope
                sum_b += gl.sum(draw, axis=0)
                terms.store((draw * LN2).to(half))
                acc = gl.zeros([T, R], gl.float32, M)
                acc = mma_v2(terms.load(operand(0, W)), projected[0].permute([1, 0]).load(operand(1, W)), acc)
                sum_w = mma_v2(low_s.permute([1, 0]).load(operand(0, W)), terms.load(operand(1, W)), sum_w)
                du = db * delta
                m_m = (cell_m >= 0)[:, None]
                o_low = dlow_rank + (cell_m * columns)[:, None]
                dtype: gl.constexpr = dlow_rank.dtype.element_ty
                m_n = m_m & (o_nm < STATE)[None, :]
                gl.store(o_low + o_rm[None, :], acc.to(dtype), m_m & (o_rm < RANK)[None, :])
                gl.store(o_low + RANK + o_nm[None, :], acc_b.to(dtype), m_n)
                gl.store(o_low + RANK + STATE + o_nm[None, :], acc_c.to(dtype), m_n)
            out = gl.convert_layout(v * skip[None, :] + du, Y)
            cell = cells_of(cells, i, Y)
            o_c = gl.arange(0, D, gl.SliceLayout(0, Y))
            mask = (cell >= 0)[:, None] & (o_c < left)[None, :]
            gl.store(dx + (cell * CHANNELS)[:, None] + o_c[None, :], out.to(dx.dtype.element_ty), mask)
    async_copy.wait_group(0)

    dweights += part.to(gl.int64) * K * CHANNELS * (RANK + 2 + STATE)
    if STATE == 1:
        store_sums(dweights, first, sum_w, sum_b, sum_A, sum_D, K * CHANNELS, left, RANK, W)
    else:
        o_rw = gl.arange(0, R, gl.SliceLayout(1, M))
        o_w = (first + o_dm)[None, :] * RANK + o_rw[:, None]
        gl.store(dweights + o_w, sum_w * LOG2E, (o_rw < RANK)[:, None] & (o_dm < left)[None, :])
        dweights += K * CHANNELS * RANK
        gl.store(dweights + first + o_d, sum_b, m_d)
        dweights += K * CHANNELS
        for n in range(STATE):
            gl.store(dweights + (first + o_d) * STATE + n, sums.index(n).load(CL), m_d)
        gl.store(dweights + K * CHANNELS * STATE + first + o_d, sum_D, m_d)


@triton.jit(do_not_specialize=["SEGMENTS", "SAMPLES"])
def carry_kernel(
    total, state, A, SEGMENTS, CHANNELS, STATE, SAMPLES, K,
    BACK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What each segment leaves behind becomes what comes into it, in place; if BACK, from the last segment on."""
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    o_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    n, row = tl.program_id(0) // blocks % STATE, tl.program_id(0).to(tl.int64) // blocks // STATE
    m_d = o_d < CHANNELS
    decay = tl.load(A + (n * K + row // SAMPLES) * CHANNELS + o_d, m_d, 0.0)
    h = tl.zeros([BLOCK_D], tl.float32)
    step = -1 if BACK else 1
    first = row * SEGMENTS + (SEGMENTS - 1 if BACK else 0)
    for chunk in range(0, SEGMENTS, BLOCK_S):
        o_s = chunk + tl.arange(0, BLOCK_S)
        mask = (o_s < SEGMENTS)[:, None] & m_d[None, :]
        segment = first + step * o_s
        a = tl.exp2(tl.load(total + segment[:, None] * CHANNELS + o_d[None, :], mask, 0.0) * decay[None, :])
        address = state + (segment * STATE + n)[:, None] * CHANNELS + o_d[None, :]
        decays, states = tl.associative_scan((a, tl.load(address, mask, 0.0)), 0, compose)
        after = decays * h[None, :] + states
        tl.debug_barrier()  # all of the chunk is read before its neighbours write
        within = (o_s + 1 < SEGMENTS) & (o_s + 1 < chunk + BLOCK_S)
        tl.store(address + step * STATE * CHANNELS, after, mask & within[:, None])
        tl.store(state + ((first + step * chunk) * STATE + n) * CHANNELS + o_d, h, m_d)
        tl.debug_barrier()
        h = tl.sum(tl.where((tl.arange(0, BLOCK_S) == BLOCK_S - 1)[:, None], after, 0.0), axis=0)


@triton.jit(do_not_specialize=["COUNT"])
def merge_kernel(parts, out, COUNT, SIZE, BLOCK: tl.constexpr):
    """The sum of COUNT maps, in a fixed order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < SIZE
    total = tl.load(parts + o, mask, 0.0).to(tl.float32)
    for i in range(1, COUNT):
        total += tl.load(parts + i * SIZE.to(tl.int64) + o, mask, 0.0).to(tl.float32)
    tl.store(out + o, total.to(out.dtype.element_ty), mask)
