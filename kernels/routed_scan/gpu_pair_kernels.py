"""The routed scan in Gluon, a route with its reverse: both visit the same blocks of cells, so that maps are read and
written once for both. One state. See ``gpu_block_kernels.py`` for how a block is walked.

``pair_kernel``           the outputs of both, from the states before each block;
``pair_walk_kernel``      the outputs of both on a small map, from its first block to its last and back;
``pair_gradient_kernel``  all gradients by both, from what comes into each segment alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .gpu_block_parts import (
    LN2,
    LOG2E,
    SLOTS,
    STAGES,
    T,
    advance,
    await_block,
    barrier,
    by_columns,
    by_rows,
    cells_of,
    direction,
    fetch_before,
    fetch_cells,
    fetch_rows,
    gradients,
    pair,
    products,
    projection,
    retreat,
    room_before,
    shared,
    shared_projection,
    state_before,
    step_of,
    store_low_rank,
    store_output,
    store_sums,
)

_SIZES = ["CELLS", "COLUMNS", "SEGMENT", "SEGMENTS", "AHEAD", "BACK", "PIECE"]  # no kernel is compiled for them


@gluon.jit(do_not_specialize=[*_SIZES, "FIRST", "SAMPLES"])
def pair_kernel(
    x, low_rank, weight, bias, A, skips, order, start, history, prefix, partial, y,
    CELLS, CHANNELS, COLUMNS, SEGMENT, SEGMENTS, AHEAD, BACK, PIECE, FIRST, SAMPLES,
    RANK: gl.constexpr, R: gl.constexpr, D: gl.constexpr, ALIGN: gl.constexpr,
    ADD: gl.constexpr, LAST: gl.constexpr, SPLIT: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """The outputs of route AHEAD and of its reverse, BACK, for PIECE blocks, from the states before each block.

    Does some of SAMPLES, from FIRST on, which ``partial`` holds alone. Adds it if ADD; stores the sum to y if LAST,
    else to ``partial``. One state.
    """
    CHANNELS, columns = CHANNELS // 8 * 8, COLUMNS // ALIGN * ALIGN
    half: gl.constexpr = x.dtype.element_ty
    L: gl.constexpr = by_columns(W)
    M: gl.constexpr = products(W)
    Y: gl.constexpr = by_rows(D, 4, W)
    per_segment = SEGMENT // T
    count = SEGMENTS * per_segment
    pieces, blocks = gl.cdiv(count, PIECE), gl.cdiv(CHANNELS, D)
    d0, piece = gl.program_id(0) % blocks * D, gl.program_id(0) // blocks % pieces
    own = gl.program_id(0) // blocks // pieces
    sample, parts, left = FIRST + own, SAMPLES * SEGMENTS, CHANNELS - d0
    order += AHEAD * SEGMENTS * SEGMENT
    x += sample.to(gl.int64) * CELLS * CHANNELS + d0
    low_rank += sample.to(gl.int64) * CELLS * columns
    partial += own.to(gl.int64) * CELLS * CHANNELS + d0
    y += sample.to(gl.int64) * CELLS * CHANNELS + d0
    o_d = gl.arange(0, D, gl.SliceLayout(0, L))
    m_d = o_d < left
    ahead0, back0 = AHEAD * CHANNELS + d0, BACK * CHANNELS + d0
    w_ahead = projection(weight, ahead0, left, RANK, R, D, W, half)
    w_back = projection(weight, back0, left, RANK, R, D, W, half)
    o_dm = gl.arange(0, D, gl.SliceLayout(0, M))
    shift_ahead = gl.load(bias + ahead0 + o_dm, o_dm < left, 0.0).to(gl.float32) * LOG2E
    shift_back = gl.load(bias + back0 + o_dm, o_dm < left, 0.0).to(gl.float32) * LOG2E
    decay_ahead = gl.load(A + ahead0 + o_d, m_d, 0.0)
    decay_back = gl.load(A + back0 + o_d, m_d, 0.0)
    skip = gl.load(skips + ahead0 + o_d, m_d, 0.0).to(gl.float32)
    skip += gl.load(skips + back0 + o_d, m_d, 0.0).to(gl.float32)

    cells = gl.allocate_shared_memory(gl.int32, [SLOTS, T], shared([0]))
    xs = gl.allocate_shared_memory(half, [STAGES, T, D], shared([1, 0]))
    lows_ahead = gl.allocate_shared_memory(half, [STAGES, T, R], shared([1, 0]))
    lows_back = gl.allocate_shared_memory(half, [STAGES, T, R], shared([1, 0]))
    olds = gl.allocate_shared_memory(gl.float32, [STAGES, T, D], shared([1, 0]))
    before_ahead, before_back = room_before(D), room_before(D)
    sources = history, prefix, start
    begin = piece * PIECE
    end = gl.minimum(begin + PIECE, count)
    for i in gl.static_range(SLOTS - 2):
        fetch_cells(cells, i, order, gl.minimum(begin + i, count - 1), W)
    async_copy.commit_group()
    for i in range(1 - STAGES, end - begin):
        await_block()
        ahead = i + STAGES - 1
        slot_a, cells_a = ahead % STAGES, cells.index(ahead % SLOTS)
        fetch_rows(xs.index(slot_a), x, cells_a, CHANNELS, left, 8, W)
        fetch_rows(lows_ahead.index(slot_a), low_rank + AHEAD * (RANK + 2), cells_a, columns, RANK + 2, ALIGN, W)
        fetch_rows(lows_back.index(slot_a), low_rank + BACK * (RANK + 2), cells_a, columns, RANK + 2, ALIGN, W)
        if ADD:
            fetch_rows(olds.index(slot_a), partial, cells_a, CHANNELS, left, 4, W)
        block = gl.minimum(begin + ahead, count - 1)
        segment, within = block // per_segment, block % per_segment
        segment_ahead = AHEAD.to(gl.int64) * parts + sample * SEGMENTS + segment
        segment_back = BACK.to(gl.int64) * parts + (sample + 1) * SEGMENTS - 1 - segment
        row_ahead = segment_ahead * per_segment + within
        row_back = (segment_back + 1) * per_segment - 1 - within
        fetch_before(before_ahead, slot_a, sources, row_ahead, segment_ahead, CHANNELS, d0, left, SPLIT, W)
        fetch_before(before_back, slot_a, sources, row_back, segment_back, CHANNELS, d0, left, SPLIT, W)
        fetch_cells(cells, ahead + STAGES - 1, order, gl.minimum(begin + ahead + STAGES - 1, count - 1), W)
        async_copy.commit_group()
        if i >= 0:
            slot = i % STAGES
            h_ahead = state_before(before_ahead, slot, decay_ahead, SPLIT, W)
            h_back = state_before(before_back, slot, decay_back, SPLIT, W)
            u = xs.index(slot).load(L).to(gl.float32)
            out = u * skip[None, :]
            one, _h = direction(
                lows_ahead.index(slot), u, cells_of(cells, i, M), w_ahead, shift_ahead, decay_ahead, h_ahead,
                RANK, False, W,
            )  # fmt: skip
            out += one
            one, _h = direction(
                lows_back.index(slot), u, cells_of(cells, i, M), w_back, shift_back, decay_back, h_back, RANK, True, W
            )
            out += one
            store_output(partial, y, olds.index(slot), cells_of(cells, i, Y), CHANNELS, left, out, ADD, LAST, W)
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=_SIZES)
def pair_walk_kernel(
    x, low_rank, weight, bias, A, skips, order, partial, y,
    CELLS, CHANNELS, COLUMNS, SEGMENT, SEGMENTS, AHEAD, BACK,
    RANK: gl.constexpr, R: gl.constexpr, D: gl.constexpr, ALIGN: gl.constexpr,
    BLOCKS: gl.constexpr, ADD: gl.constexpr, LAST: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """As ``pair_kernel``, over maps of one segment of at most BLOCKS blocks. These are walked twice: ahead, for the
    states before each block, which are kept in shared memory, and back."""
    CHANNELS, columns = CHANNELS // 8 * 8, COLUMNS // ALIGN * ALIGN
    half: gl.constexpr = x.dtype.element_ty
    L: gl.constexpr = by_columns(W)
    M: gl.constexpr = products(W)
    CL: gl.constexpr = gl.SliceLayout(0, L)
    count, blocks = SEGMENT // T, gl.cdiv(CHANNELS, D)
    d0, sample = gl.program_id(0) % blocks * D, gl.program_id(0) // blocks
    left = CHANNELS - d0
    order += AHEAD * SEGMENT
    x += sample.to(gl.int64) * CELLS * CHANNELS + d0
    partial += sample.to(gl.int64) * CELLS * CHANNELS + d0
    y += sample.to(gl.int64) * CELLS * CHANNELS + d0
    low_rank += sample.to(gl.int64) * CELLS * columns
    low_ahead, low_back = low_rank + AHEAD * (RANK + 2), low_rank + BACK * (RANK + 2)
    o_d = gl.arange(0, D, CL)
    m_d = o_d < left
    ahead0, back0 = AHEAD * CHANNELS + d0, BACK * CHANNELS + d0
    w_ahead = projection(weight, ahead0, left, RANK, R, D, W, half)
    w_back = projection(weight, back0, left, RANK, R, D, W, half)
    o_dm = gl.arange(0, D, gl.SliceLayout(0, M))
    shift_ahead = gl.load(bias + ahead0 + o_dm, o_dm < left, 0.0).to(gl.float32) * LOG2E
    shift_back = gl.load(bias + back0 + o_dm, o_dm < left, 0.0).to(gl.float32) * LOG2E
    decay_ahead = gl.load(A + ahead0 + o_d, m_d, 0.0)
    decay_back = gl.load(A + back0 + o_d, m_d, 0.0)
    skip = gl.load(skips + ahead0 + o_d, m_d, 0.0).to(gl.float32)
    skip += gl.load(skips + back0 + o_d, m_d, 0.0).to(gl.float32)

    cells = gl.allocate_shared_memory(gl.int32, [SLOTS, T], shared([0]))
    xs = gl.allocate_shared_memory(half, [STAGES, T, D], shared([1, 0]))
    lows_ahead = gl.allocate_shared_memory(half, [STAGES, T, R], shared([1, 0]))
    lows_back = gl.allocate_shared_memory(half, [STAGES, T, R], shared([1, 0]))
    olds = gl.allocate_shared_memory(gl.float32, [STAGES, T, D], shared([1, 0]))
    states = gl.allocate_shared_memory(gl.float32, [BLOCKS, D], shared([0]))

    h = gl.zeros([D], gl.float32, CL)
    for i in gl.static_range(SLOTS - 2):
        fetch_cells(cells, i, order, gl.minimum(i, count - 1), W)
    async_copy.commit_group()
    for i in range(1 - STAGES, count):
        await_block()
        ahead = i + STAGES - 1
        slot_a, cells_a = ahead % STAGES, cells.index(ahead % SLOTS)
        fetch_rows(xs.index(slot_a), x, cells_a, CHANNELS, left, 8, W)
        fetch_rows(lows_ahead.index(slot_a), low_ahead, cells_a, columns, RANK + 2, ALIGN, W)
        fetch_cells(cells, ahead + STAGES - 1, order, gl.minimum(ahead + STAGES - 1, count - 1), W)
        async_copy.commit_group()
        if i >= 0:
            slot = i % STAGES
            states.index(i).store(h)
            u, cell_m = xs.index(slot).load(L).to(gl.float32), cells_of(cells, i, M)
            _out, h = direction(lows_ahead.index(slot), u, cell_m, w_ahead, shift_ahead, decay_ahead, h, RANK, False, W)
    async_copy.wait_group(0)
    barrier()

    h = gl.zeros([D], gl.float32, CL)
    for i in gl.static_range(SLOTS - 2):
        fetch_cells(cells, i, order, gl.maximum(count - 1 - i, 0), W)
    async_copy.commit_group()
    for i in range(1 - STAGES, count):
        await_block()
        ahead = i + STAGES - 1
        slot_a, cells_a = ahead % STAGES, cells.index(ahead % SLOTS)
        fetch_rows(xs.index(slot_a), x, cells_a, CHANNELS, left, 8, W)
        fetch_rows(lows_ahead.index(slot_a), low_ahead, cells_a, columns, RANK + 2, ALIGN, W)
        fetch_rows(lows_back.index(slot_a), low_back, cells_a, columns, RANK + 2, ALIGN, W)
        if ADD:
            fetch_rows(olds.index(slot_a), partial, cells_a, CHANNELS, left, 4, W)
        fetch_cells(cells, ahead + STAGES - 1, order, gl.maximum(count - ahead - STAGES, 0), W)
        async_copy.commit_group()
        if i >= 0:
            slot = i % STAGES
            u, cell_m = xs.index(slot).load(L).to(gl.float32), cells_of(cells, i, M)
            h_ahead = states.index(count - 1 - i).load(CL)
            out = u * skip[None, :]
            one, _h = direction(
                lows_ahead.index(slot), u, cell_m, w_ahead, shift_ahead, decay_ahead, h_ahead, RANK, False, W
            )
            out += one
            one, h = direction(lows_back.index(slot), u, cell_m, w_back, shift_back, decay_back, h, RANK, True, W)
            out += one
            cell = cells_of(cells, i, by_rows(D, 4, W))
            store_output(partial, y, olds.index(slot), cell, CHANNELS, left, out, ADD, LAST, W)
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=_SIZES)
def pair_gradient_kernel(
    dy, x, low_rank, weight, bias, A, skips, order, start, adjoint, dx, dlow_rank, dweights,
    CELLS, CHANNELS, COLUMNS, SEGMENT, SEGMENTS, AHEAD, BACK, PIECE,
    RANK: gl.constexpr, R: gl.constexpr, D: gl.constexpr, ALIGN: gl.constexpr,
    BLOCKS: gl.constexpr, ADD: gl.constexpr, SPLIT: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """All gradients by route AHEAD and by its reverse, BACK, in PIECE segments of at most BLOCKS blocks.

    Segments are walked twice: ahead, for what each block is entered with, the state of AHEAD and the gradient of BACK,
    which are kept in shared memory; then back, with the other two at hand. Adds to ``dx`` if ADD. ``dlow_rank`` is per
    block of channels; ``dweights`` per piece, as in ``gradient_kernel``.
    """
    CHANNELS, columns = CHANNELS // 8 * 8, COLUMNS // ALIGN * ALIGN
    half: gl.constexpr = x.dtype.element_ty
    L: gl.constexpr = by_columns(W)
    M: gl.constexpr = products(W)
    Y: gl.constexpr = by_rows(D, 4, W)
    CL: gl.constexpr = gl.SliceLayout(0, L)
    count = SEGMENT // T
    pieces, blocks = gl.cdiv(SEGMENTS, PIECE), gl.cdiv(CHANNELS, D)
    block, piece = gl.program_id(0) % blocks, gl.program_id(0) // blocks % pieces
    sample, samples = gl.program_id(0) // blocks // pieces, gl.num_programs(0) // blocks // pieces
    parts, d0 = samples * SEGMENTS, block * D
    left = CHANNELS - d0
    order += AHEAD * SEGMENTS * SEGMENT
    dy += sample.to(gl.int64) * CELLS * CHANNELS + d0
    x += sample.to(gl.int64) * CELLS * CHANNELS + d0
    dx += sample.to(gl.int64) * CELLS * CHANNELS + d0
    low_rank += sample.to(gl.int64) * CELLS * columns
    dlow_rank += (block.to(gl.int64) * samples + sample) * CELLS * columns
    low_ahead, low_back = low_rank + AHEAD * (RANK + 2), low_rank + BACK * (RANK + 2)
    dlow_ahead, dlow_back = dlow_rank + AHEAD * (RANK + 2), dlow_rank + BACK * (RANK + 2)

    o_d = gl.arange(0, D, CL)
    m_d = o_d < left
    ahead0, back0 = AHEAD * CHANNELS + d0, BACK * CHANNELS + d0
    decay_ahead = gl.load(A + ahead0 + o_d, m_d, 0.0)
    decay_back = gl.load(A + back0 + o_d, m_d, 0.0)
    skip = gl.load(skips + ahead0 + o_d, m_d, 0.0).to(gl.float32)
    skip += gl.load(skips + back0 + o_d, m_d, 0.0).to(gl.float32)
    projected_ahead = shared_projection(weight, bias, ahead0, left, RANK, R, D, W, half)
    projected_back = shared_projection(weight, bias, back0, left, RANK, R, D, W, half)
    sum_w_ahead, sum_w_back = gl.zeros([R, D], gl.float32, M), gl.zeros([R, D], gl.float32, M)
    sum_b_ahead, sum_b_back = gl.zeros([D], gl.float32, CL), gl.zeros([D], gl.float32, CL)
    sum_A_ahead, sum_A_back = gl.zeros([D], gl.float32, CL), gl.zeros([D], gl.float32, CL)
    sum_D = gl.zeros([D], gl.float32, CL)

    cells = gl.allocate_shared_memory(gl.int32, [SLOTS, T], shared([0]))
    xs = gl.allocate_shared_memory(half, [STAGES, T, D], shared([1, 0]))
    dys = gl.allocate_shared_memory(half, [STAGES, T, D], shared([1, 0]))
    lows_ahead = gl.allocate_shared_memory(half, [STAGES, T, R], shared([1, 0]))
    lows_back = gl.allocate_shared_memory(half, [STAGES, T, R], shared([1, 0]))
    olds = gl.allocate_shared_memory(half, [STAGES, T, D], shared([1, 0]))
    terms = gl.allocate_shared_memory(half, [T, D], shared([1, 0], 8, 4, 2))
    states = gl.allocate_shared_memory(gl.float32, [BLOCKS, D], shared([0]))
    grads = gl.allocate_shared_memory(gl.float32, [BLOCKS, D], shared([0]))

    for segment in range(piece * PIECE, gl.minimum(piece * PIECE + PIECE, SEGMENTS)):
        first = order + segment * SEGMENT
        h_ahead, h_back = gl.zeros([D], gl.float32, CL), gl.zeros([D], gl.float32, CL)
        g_ahead, g_back = gl.zeros([D], gl.float32, CL), gl.zeros([D], gl.float32, CL)
        if SPLIT:
            row_ahead = AHEAD.to(gl.int64) * parts + sample * SEGMENTS + segment
            row_back = BACK.to(gl.int64) * parts + (sample + 1) * SEGMENTS - 1 - segment
            o_ahead, o_back = row_ahead * CHANNELS + d0 + o_d, row_back * CHANNELS + d0 + o_d
            h_ahead, h_back = gl.load(start + o_ahead, m_d, 0.0), gl.load(start + o_back, m_d, 0.0)
            g_ahead, g_back = gl.load(adjoint + o_ahead, m_d, 0.0), gl.load(adjoint + o_back, m_d, 0.0)

        for i in gl.static_range(SLOTS - 2):
            fetch_cells(cells, i, first, gl.minimum(i, count - 1), W)
        async_copy.commit_group()
        for i in range(1 - STAGES, count):
            await_block()
            ahead = i + STAGES - 1
            slot_a, cells_a = ahead % STAGES, cells.index(ahead % SLOTS)
            fetch_rows(xs.index(slot_a), x, cells_a, CHANNELS, left, 8, W)
            fetch_rows(dys.index(slot_a), dy, cells_a, CHANNELS, left, 8, W)
            fetch_rows(lows_ahead.index(slot_a), low_ahead, cells_a, columns, RANK + 2, ALIGN, W)
            fetch_rows(lows_back.index(slot_a), low_back, cells_a, columns, RANK + 2, ALIGN, W)
            fetch_cells(cells, ahead + STAGES - 1, first, gl.minimum(ahead + STAGES - 1, count - 1), W)
            async_copy.commit_group()
            if i >= 0:
                slot = i % STAGES
                states.index(i).store(h_ahead)
                grads.index(i).store(g_back)
                cell_m = cells_of(cells, i, M)
                u = xs.index(slot).load(L).to(gl.float32)
                dt, _ = step_of(lows_ahead.index(slot), cell_m, projected_ahead, RANK, W)
                b, _ = pair(lows_ahead.index(slot), RANK, LN2, W)
                _, h_ahead = advance(gl.exp2(dt * decay_ahead[None, :]), dt * u * b[:, None], h_ahead, False)
                v = dys.index(slot).load(L).to(gl.float32)
                dt, _ = step_of(lows_back.index(slot), cell_m, projected_back, RANK, W)
                _, c = pair(lows_back.index(slot), RANK, 1.0, W)
                _, g_back = retreat(gl.exp2(dt * decay_back[None, :]), v * c[:, None], g_back, True)
        async_copy.wait_group(0)
        barrier()

        for i in gl.static_range(SLOTS - 2):
            fetch_cells(cells, i, first, gl.maximum(count - 1 - i, 0), W)
        async_copy.commit_group()
        for i in range(1 - STAGES, count):
            await_block()
            ahead = i + STAGES - 1
            slot_a, cells_a = ahead % STAGES, cells.index(ahead % SLOTS)
            fetch_rows(xs.index(slot_a), x, cells_a, CHANNELS, left, 8, W)
            fetch_rows(dys.index(slot_a), dy, cells_a, CHANNELS, left, 8, W)
            fetch_rows(lows_ahead.index(slot_a), low_ahead, cells_a, columns, RANK + 2, ALIGN, W)
            fetch_rows(lows_back.index(slot_a), low_back, cells_a, columns, RANK + 2, ALIGN, W)
            if ADD:
                fetch_rows(olds.index(slot_a), dx, cells_a, CHANNELS, left, 8, W)
            fetch_cells(cells, ahead + STAGES - 1, first, gl.maximum(count - ahead - STAGES, 0), W)
            async_copy.commit_group()
            if i >= 0:
                slot, place = i % STAGES, count - 1 - i
                cell_m = cells_of(cells, i, M)
                u = xs.index(slot).load(L).to(gl.float32)
                v = dys.index(slot).load(L).to(gl.float32)
                sum_D += gl.sum(u * v, axis=0)
                out, acc, acc_bc, sum_w_ahead, sum_b_ahead, sum_A_ahead, _h, g_ahead = gradients(
                    lows_ahead.index(slot), terms, u, v, cell_m, projected_ahead, decay_ahead,
                    states.index(place).load(CL), g_ahead, sum_w_ahead, sum_b_ahead, sum_A_ahead, RANK, False, W,
                )  # fmt: skip
                store_low_rank(dlow_ahead, cell_m, columns, acc, acc_bc, RANK, W)
                other, acc, acc_bc, sum_w_back, sum_b_back, sum_A_back, h_back, _g = gradients(
                    lows_back.index(slot), terms, u, v, cell_m, projected_back, decay_back,
                    h_back, grads.index(place).load(CL), sum_w_back, sum_b_back, sum_A_back, RANK, True, W,
                )  # fmt: skip
                store_low_rank(dlow_back, cell_m, columns, acc, acc_bc, RANK, W)
                out = gl.convert_layout(out + other + v * skip[None, :], Y)
                if ADD:
                    out += olds.index(slot).load(Y).to(gl.float32)
                cell = cells_of(cells, i, Y)
                o_c = gl.arange(0, D, gl.SliceLayout(0, Y))
                mask = (cell >= 0)[:, None] & (o_c < left)[None, :]
                gl.store(dx + (cell * CHANNELS)[:, None] + o_c[None, :], out.to(half), mask)
        async_copy.wait_group(0)
        barrier()

    K = COLUMNS // (RANK + 2)
    dweights += (sample * pieces + piece).to(gl.int64) * K * CHANNELS * (RANK + 3)
    store_sums(dweights, ahead0, sum_w_ahead, sum_b_ahead, sum_A_ahead, sum_D, K * CHANNELS, left, RANK, W)
    store_sums(dweights, back0, sum_w_back, sum_b_back, sum_A_back, sum_D, K * CHANNELS, left, RANK, W)
