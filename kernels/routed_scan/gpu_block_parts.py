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
        if REVERSE:
            row = a_rows[T - 1 - i] * row + s_rows[T - 1 - i]
            states = (row,) + states
        else:
            row = a_rows[i] * row + s_rows[i]
            states = states + (row,)
    return as_tile(states, a), as_vector(row, a)


@gluon.jit
def keep(a, s, h):
    """What each step keeps of the state before it, a_t h_{t-1} [T, D], without a subtraction."""
    a_rows, s_rows = unstack(a), unstack(s)
    row = as_row(h, a_rows[0])
    kept = ()
    for i in gl.static_range(T):
        kept = kept + (a_rows[i] * row,)
        row = kept[i] + s_rows[i]
    return as_tile(kept, a)


@gluon.jit
def retreat(a, q, g):
    """g_t = q_t + a_{t+1} g_{t+1}: gradients [T, D] at the states of a block, and the one sent back [D], from the one
    that comes in."""
    a_rows, q_rows = unstack(a), unstack(q)
    row = as_row(g, a_rows[0])
    grads = ()
    for i in gl.static_range(T):
        grads = (q_rows[T - 1 - i] + row,) + grads
        row = a_rows[T - 1 - i] * grads[0]
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
def direction(
    inputs, slot, u, cells, i, w, shift, decay, h, RANK: gl.constexpr, REVERSE: gl.constexpr, W: gl.constexpr
):
    """C_t h_t [T, D] of a block, walked ahead or in reverse."""
    L: gl.constexpr = by_columns(W)
    low_s = inputs.index(slot)
    dt = softplus2(raw_step(low_s, w, shift, RANK, W))
    dt = gl.convert_layout(gl.where((cells_of(cells, i, products(W)) >= 0)[:, None], dt, 0.0), L)
    b, c = pair(low_s, RANK, LN2, W)
    hs, _ = advance(gl.exp2(dt * decay[None, :]), dt * u * b[:, None], h, REVERSE)
    return hs * c[:, None]


@gluon.jit
def only(n, rows: gl.constexpr, width: gl.constexpr, W: gl.constexpr, dtype: gl.constexpr):
    """A second operand [rows, width] of ones in column n: a product with it sums into that column."""
    LAYOUT: gl.constexpr = operand(1, W)
    o_r = gl.arange(0, rows, gl.SliceLayout(1, LAYOUT))
    o_c = gl.arange(0, width, gl.SliceLayout(0, LAYOUT))
    return ((o_c == n)[None, :] & (o_r >= 0)[:, None]).to(dtype)
