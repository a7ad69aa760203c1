"""What the Gluon kernels do with a block of T steps: how threads hold it, how it is copied, the recurrence in it."""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

# The names up to Triton 3.7 come second.
fetch = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

STEPS = 16
"""Steps T of a block: the rows of a product on the tensor cores."""

T = gl.constexpr(STEPS)
STAGES = gl.constexpr(2)  # blocks in shared memory: one at work, one under way; cells are known two blocks earlier
SLOTS = gl.constexpr(4)
LOG2E = gl.constexpr(math.log2(math.e))
LN2 = gl.constexpr(math.log(2))


@gluon.constexpr_function
def by_columns(warps):
    """A thread holds whole columns of a tile [T, D]."""
    return gl.BlockedLayout([STEPS, 1], [1, 32], [1, warps], [1, 0])


@gluon.constexpr_function
def by_rows(width, vector, warps):
    """Neighbouring threads hold ``vector`` values each of the same row, as maps lie in memory."""
    lanes = max(1, min(32, width // vector))
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def products(warps):
    """The result of a product on the tensor cores; a warp has its own columns."""
    return gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])


@gluon.constexpr_function
def operand(index, warps):
    return gl.DotOperandLayout(index, products(warps), 2)


@gluon.constexpr_function
def shared(order, vector=1, phases=1, per_phase=1):
    return gl.SwizzledSharedLayout(vector, per_phase, phases, order)


@gluon.constexpr_function
def nth(i, reverse):
    """The step of a block that is visited as number i."""
    return STEPS - 1 - i if reverse else i


@gluon.jit
def softplus2(x):
    """log2(1 + 2^x), by max(x, 0) + e P(e) with e = 2^-|x|; the relative error of P is 1e-5."""
    e = gl.exp2(-gl.abs(x))
    p = 0.144073083 - 0.03366616 * e
    p = p * e - 0.301280044
    p = p * e + 0.46852615
    p = p * e - 0.72034125
    p = p * e + 1.44268108
    return p * e + gl.maximum(x, 0.0)


@gluon.jit
def unstack(tile):
    """The rows of a tile that threads hold by columns; nothing moves."""
    if tile.shape[0] == 1:
        return (tile,)
    else:
        top, bottom = gl.split(tile.reshape([2, tile.shape[0] // 2, tile.shape[1]]).permute([1, 2, 0]))
        return unstack(top) + unstack(bottom)


@gluon.jit
def stack(rows):
    """Undo ``unstack``."""
    if len(rows) == 1:
        return rows[0]
    else:
        middle: gl.constexpr = len(rows) // 2
        both = gl.join(stack(rows[:middle]), stack(rows[middle:])).permute([2, 0, 1])
        return both.reshape([2 * both.shape[1], both.shape[2]])


@gluon.jit
def as_row(v, like):
    return gl.convert_layout(v[None, :], like.type.layout)


@gluon.jit
def as_vector(row, like):
    return gl.sum(gl.convert_layout(row, like.type.layout, assert_trivial=True), axis=0)


@gluon.jit
def as_tile(rows, like):
    return gl.convert_layout(stack(rows), like.type.layout, assert_trivial=True)


@gluon.jit
def advance(a, s, h, REVERSE: gl.constexpr):
    """h_t = a_t h_{t-1} + s_t: the states [T, D] of a block and the last of them [D], from the state h before."""
    a_rows, s_rows = unstack(a), unstack(s)
    row = as_row(h, a_rows[0])
    states = ()
    for i in gl.static_range(T):
        row = a_rows[nth(i, REVERSE)] * row + s_rows[nth(i, REVERSE)]
        states = (row,) + states if REVERSE else states + (row,)
    return as_tile(states, a), as_vector(row, a)


@gluon.jit
def keep(a, s, h, REVERSE: gl.constexpr):
    """What each step keeps of the state before it, a_t h_{t-1} [T, D], without a subtraction; and the last state."""
    a_rows, s_rows = unstack(a), unstack(s)
    row = as_row(h, a_rows[0])
    kept = ()
    for i in gl.static_range(T):
        now = a_rows[nth(i, REVERSE)] * row
        kept = (now,) + kept if REVERSE else kept + (now,)
        row = now + s_rows[nth(i, REVERSE)]
    return as_tile(kept, a), as_vector(row, a)


@gluon.jit
def retreat(a, q, g, REVERSE: gl.constexpr):
    """g_t = q_t + a_{t+1} g_{t+1}: gradients [T, D] at the states of a block, and the one sent back [D], from the one
    that comes in."""
    a_rows, q_rows = unstack(a), unstack(q)
    row = as_row(g, a_rows[0])
    grads = ()
    for i in gl.static_range(T):
        now = q_rows[nth(i, not REVERSE)] + row
        grads = grads + (now,) if REVERSE else (now,) + grads
        row = a_rows[nth(i, not REVERSE)] * now
    return as_tile(grads, a), as_vector(row, a)


@gluon.jit
def send_back(a, q, p, g):
    """The decay up to the end of a block and the gradient that the steps so far send back, both [D], walking ahead."""
    a_rows, q_rows = unstack(a), unstack(q)
    decayed, grad = as_row(p, a_rows[0]), as_row(g, a_rows[0])
    for i in gl.static_range(T):
        decayed = decayed * a_rows[i]
        grad = grad + decayed * q_rows[i]
    return as_vector(decayed, a), as_vector(grad, a)


@gluon.jit
def fetch_cells(cells, i, order, block, W: gl.constexpr):
    """Starts the copy of a block's cells."""
    o_t = gl.arange(0, T, gl.BlockedLayout([1], [32], [W], [0]))
    fetch(cells.index(i % SLOTS), order + block * T + o_t)


@gluon.jit
def fetch_rows(slot, base, cells, pitch, width, VECTOR: gl.constexpr, W: gl.constexpr):
    """Starts the copy of a map's rows at ``cells``; zeros where there is no cell, and past ``width``."""
    LAYOUT: gl.constexpr = by_rows(slot.shape[1], VECTOR, W)
    cell = cells.load(gl.SliceLayout(1, LAYOUT))
    o_c = gl.arange(0, slot.shape[1], gl.SliceLayout(0, LAYOUT))
    mask = (cell >= 0)[:, None] & (o_c < width)[None, :]
    fetch(slot, base + (cell * pitch)[:, None] + o_c[None, :], mask)


@gluon.jit
def fetch_states(slot, base, pitch, rows, width, W: gl.constexpr):
    """Starts the copy of a block's states, [N, D] of ``rows`` x ``width``."""
    LAYOUT: gl.constexpr = by_rows(slot.shape[1], 4, W)
    o_n = gl.arange(0, slot.shape[0], gl.SliceLayout(1, LAYOUT))
    o_d = gl.arange(0, slot.shape[1], gl.SliceLayout(0, LAYOUT))
    fetch(slot, base + (o_n * pitch)[:, None] + o_d[None, :], (o_n < rows)[:, None] & (o_d < width)[None, :])


@gluon.jit
def fetch_inputs(
    inputs,
    bases,
    cells,
    slot,
    pitch,
    columns,
    left,
    RANK: gl.constexpr,
    STATE: gl.constexpr,
    ALIGN: gl.constexpr,
    W: gl.constexpr,
):
    """Starts the copies of x, the columns of Δ, and B and C of a block."""
    xs, lows, bcs = inputs
    x, low_rank = bases
    N: gl.constexpr = bcs.shape[2] // 2
    fetch_rows(xs.index(slot), x, cells, pitch, left, 8, W)
    fetch_rows(lows.index(slot), low_rank, cells, columns, RANK + 2 * STATE, ALIGN, W)
    if STATE > 1:
        fetch_rows(bcs.index(slot).slice(0, N, dim=1), low_rank + RANK, cells, columns, STATE, ALIGN, W)
        fetch_rows(bcs.index(slot).slice(N, N, dim=1), low_rank + RANK + STATE, cells, columns, STATE, ALIGN, W)


@gluon.jit
def await_block():
    """Waits for the block that is next; all threads are then done with the one before."""
    async_copy.wait_group(STAGES - 2)
    barrier()


@gluon.jit
def projection(
    weight, first, left, RANK: gl.constexpr, R: gl.constexpr, D: gl.constexpr, W: gl.constexpr, dtype: gl.constexpr
):
    """dt_weight log2(e) as the second operand [R, D]."""
    LAYOUT: gl.constexpr = operand(1, W)
    o_r = gl.arange(0, R, gl.SliceLayout(1, LAYOUT))
    o_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    mask = (o_r < RANK)[:, None] & (o_d < left)[None, :]
    w = gl.load(weight + (first + o_d)[None, :] * RANK + o_r[:, None], mask, 0.0)
    return (w.to(gl.float32) * LOG2E).to(dtype)


@gluon.jit
def shared_projection(
    weight, bias, first, left, RANK: gl.constexpr, R: gl.constexpr, D: gl.constexpr, W: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """dt_weight log2(e) [R, D] and the bias of Δ times log2(e) [D] in shared memory."""
    LAYOUT: gl.constexpr = by_rows(D, 4, W)
    o_r = gl.arange(0, R, gl.SliceLayout(1, LAYOUT))
    o_d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    mask = (o_r < RANK)[:, None] & (o_d < left)[None, :]
    w = gl.load(weight + (first + o_d)[None, :] * RANK + o_r[:, None], mask, 0.0)
    room = gl.allocate_shared_memory(dtype, [R, D], shared([1, 0], 8, 4, 2))
    room.store((w.to(gl.float32) * LOG2E).to(dtype))
    shift = gl.allocate_shared_memory(gl.float32, [D], shared([0]))
    shift.store(gl.load(bias + first + o_d, o_d < left, 0.0).to(gl.float32) * LOG2E)
    return room, shift


@gluon.jit
def raw_step(low_s, w, shift, RANK: gl.constexpr, W: gl.constexpr):
    """Δ log2(e) before softplus [T, D]; the columns after those of Δ are cleared: a weight of 0 would not keep a NaN
    of theirs out."""
    low = low_s.load(operand(0, W))
    o_r = gl.arange(0, low.shape[1], gl.SliceLayout(0, low.type.layout))
    low = gl.where((o_r < RANK)[None, :], low, 0.0).to(low_s.dtype)
    return mma_v2(low, w, gl.zeros([T, w.shape[1]], gl.float32, products(W)) + shift[None, :])


@gluon.jit
def pair(low_s, RANK: gl.constexpr, SCALE: gl.constexpr, W: gl.constexpr):
    """B times SCALE, and C, of the single state [T]."""
    both = low_s.slice(RANK, 2, dim=1).load(gl.BlockedLayout([1, 2], [32, 1], [1, W], [1, 0])).to(gl.float32)
    b, c = gl.split(both)
    LAYOUT: gl.constexpr = gl.SliceLayout(1, by_columns(W))
    return gl.convert_layout(b * SCALE, LAYOUT), gl.convert_layout(c, LAYOUT)


@gluon.jit
def cells_of(cells, i, layout: gl.constexpr):
    return cells.index(i % SLOTS).load(gl.SliceLayout(1, layout))


@gluon.jit
def fetch_before(
    tiles, slot, sources, row, segment, CHANNELS, d0, left, SPLIT: gl.constexpr, W: gl.constexpr
):  # fmt: skip
    """Starts the copy of what ``state_before`` needs: the state that a segment of its own has before a block and, if
    routes are cut, ΣΔ up to it and the state that comes into the segment."""
    history, prefix, start = sources
    fetch_states(tiles[0].index(slot), history + row * CHANNELS + d0, CHANNELS, 1, left, W)
    if SPLIT:
        fetch_states(tiles[1].index(slot), prefix + row * CHANNELS + d0, CHANNELS, 1, left, W)
        fetch_states(tiles[2].index(slot), start + segment * CHANNELS + d0, CHANNELS, 1, left, W)


@gluon.jit
def state_before(tiles, slot, decay, SPLIT: gl.constexpr, W: gl.constexpr):
    """The state before a block [D]: what its segment left behind, and what came into the segment, decayed."""
    h = gl.sum(tiles[0].index(slot).load(by_columns(W)), axis=0)
    if SPLIT:
        since = gl.sum(tiles[1].index(slot).load(by_columns(W)), axis=0)
        h += gl.exp2(since * decay) * gl.sum(tiles[2].index(slot).load(by_columns(W)), axis=0)
    return h


@gluon.jit
def room_before(D: gl.constexpr):
    """Shared memory for ``fetch_before``."""
    return (
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, D], shared([1, 0])),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, D], shared([1, 0])),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, D], shared([1, 0])),
    )


@gluon.jit
def direction(low_s, u, cell_m, w, shift, decay, h, RANK: gl.constexpr, REVERSE: gl.constexpr, W: gl.constexpr):
    """C_t h_t [T, D] of a block, walked ahead or in reverse, and the last state. One state."""
    L: gl.constexpr = by_columns(W)
    dt = softplus2(raw_step(low_s, w, shift, RANK, W))
    dt = gl.convert_layout(gl.where((cell_m >= 0)[:, None], dt, 0.0), L)
    b, c = pair(low_s, RANK, LN2, W)
    hs, h = advance(gl.exp2(dt * decay[None, :]), dt * u * b[:, None], h, REVERSE)
    return hs * c[:, None], h


@gluon.jit
def store_output(
    partial, y, old, cell, pitch, left, out, ADD: gl.constexpr, LAST: gl.constexpr, W: gl.constexpr
):  # fmt: skip
    """Writes a block's outputs, with the ``old`` ones if ADD, to y if LAST, else to ``partial``."""
    Y: gl.constexpr = by_rows(out.shape[1], 4, W)
    out = gl.convert_layout(out, Y)
    if ADD:
        out += old.load(Y)
    o_c = gl.arange(0, out.shape[1], gl.SliceLayout(0, Y))
    mask = (cell >= 0)[:, None] & (o_c < left)[None, :]
    o_y = (cell * pitch)[:, None] + o_c[None, :]
    if LAST:
        gl.store(y + o_y, out.to(y.dtype.element_ty), mask)
    else:
        gl.store(partial + o_y, out, mask)


@gluon.jit
def only(n, rows: gl.constexpr, width: gl.constexpr, W: gl.constexpr, dtype: gl.constexpr):
    """A second operand [rows, width] of ones in column n: a product with it sums into that column."""
    LAYOUT: gl.constexpr = operand(1, W)
    o_r = gl.arange(0, rows, gl.SliceLayout(1, LAYOUT))
    o_c = gl.arange(0, width, gl.SliceLayout(0, LAYOUT))
    return ((o_c == n)[None, :] & (o_r >= 0)[:, None]).to(dtype)


@gluon.jit
def step_of(low_s, cell_m, projected, RANK: gl.constexpr, W: gl.constexpr):
    """Δ log2(e) [T, D], and the slope of softplus; zeros where there is no cell."""
    weights, shift = projected
    w, shift = weights.load(operand(1, W)), shift.load(gl.SliceLayout(0, products(W)))
    raw = gl.where((cell_m >= 0)[:, None], raw_step(low_s, w, shift, RANK, W), -1e30)
    raw = gl.convert_layout(raw, by_columns(W))
    dt = softplus2(raw)
    return dt, gl.exp2(raw - dt)  # the sigmoid


@gluon.jit
def gradients(
    low_s, terms, u, v, cell_m, projected, decay, h, g, sum_w, sum_b, sum_A,
    RANK: gl.constexpr, REVERSE: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """The gradients of a block by x, that by D x not counted, [T, D], by the columns of Δ [T, R] and by B and C [T, 8];
    the sums of those by the weights, with the block (that by dt_weight log2(e)); the state after the block and the
    gradient before it. One state."""
    half: gl.constexpr = low_s.dtype
    dt, slope = step_of(low_s, cell_m, projected, RANK, W)
    delta = dt * LN2
    du = delta * u
    b, c = pair(low_s, RANK, 1.0, W)
    a = gl.exp2(dt * decay[None, :])
    s = du * b[:, None]
    kept, h = keep(a, s, h, REVERSE)
    gs, g = retreat(a, v * c[:, None], g, REVERSE)
    log_a = gs * kept  # the gradient by Δ A
    sum_A += gl.sum(log_a * delta, axis=0)
    db = gs * b[:, None]
    terms.store((gs * du).to(half))
    channels: gl.constexpr = sum_w.shape[1]
    acc_bc = gl.zeros([T, 8], gl.float32, products(W))
    acc_bc = mma_v2(terms.load(operand(0, W)), only(0, channels, 8, W, half), acc_bc)
    terms.store((v * (kept + s)).to(half))
    acc_bc = mma_v2(terms.load(operand(0, W)), only(1, channels, 8, W, half), acc_bc)
    draw = (log_a * decay[None, :] + db * u) * slope
    sum_b += gl.sum(draw, axis=0)
    terms.store((draw * LN2).to(half))
    acc = gl.zeros([T, sum_w.shape[0]], gl.float32, products(W))
    acc = mma_v2(terms.load(operand(0, W)), projected[0].permute([1, 0]).load(operand(1, W)), acc)
    sum_w = mma_v2(low_s.permute([1, 0]).load(operand(0, W)), terms.load(operand(1, W)), sum_w)
    return db * delta, acc, acc_bc, sum_w, sum_b, sum_A, h, g


@gluon.jit
def store_low_rank(out, cell_m, pitch, acc, acc_bc, RANK: gl.constexpr, W: gl.constexpr):
    """Writes the gradients by the columns of Δ, B and C at ``cell_m``. One state."""
    o_r = gl.arange(0, acc.shape[1], gl.SliceLayout(0, products(W)))
    o_n = gl.arange(0, 8, gl.SliceLayout(0, products(W)))
    out += (cell_m * pitch)[:, None]
    there = (cell_m >= 0)[:, None]
    gl.store(out + o_r[None, :], acc.to(out.dtype.element_ty), there & (o_r < RANK)[None, :])
    gl.store(out + RANK + o_n[None, :], acc_bc.to(out.dtype.element_ty), there & (o_n < 2)[None, :])


@gluon.jit
def store_sums(out, first, sum_w, sum_b, sum_A, sum_D, STRIDE, left, RANK: gl.constexpr, W: gl.constexpr):
    """Writes the sums of ``gradients`` as those by dt_weight (k, c, r), dt_bias (k, c), A (k, c) and D (k, c), which
    lie in a row; STRIDE is k c."""
    o_r = gl.arange(0, sum_w.shape[0], gl.SliceLayout(1, products(W)))
    o_m = gl.arange(0, sum_w.shape[1], gl.SliceLayout(0, products(W)))
    mask = (o_r < RANK)[:, None] & (o_m < left)[None, :]
    gl.store(out + (first + o_m)[None, :] * RANK + o_r[:, None], sum_w * LOG2E, mask)
    o_d = gl.arange(0, sum_w.shape[1], gl.SliceLayout(0, by_columns(W)))
    out += STRIDE * RANK + first
    gl.store(out + o_d, sum_b, o_d < left)
    gl.store(out + STRIDE + o_d, sum_A, o_d < left)
    gl.store(out + 2 * STRIDE + o_d, sum_D, o_d < left)
