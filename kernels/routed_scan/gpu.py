"""Routed scan on the GPU, in Triton: no route is materialised and Δ is never written in the forward pass.

One launch a route: the launches run in order, so that each adds its steps to the map without atomics and two runs
agree bit for bit. A cell's address is arithmetic in the step (``Route.affine``), so image size is no constant and
nothing recompiles for a new one.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import compute_dtype
from ..routes import Route, Routes
from ..selective_scan.gpu import TRITON_DTYPE, advance, block_sizes, retreat, softplus

_AXES = 3
_RUNTIME = [
    "CELLS",
    "LENGTH",
    "STATE",
    "RANK",
    "COLUMNS",
    "COLUMN",
    "SIZE1",
    "SIZE2",
    "STEP0",
    "STEP1",
    "STEP2",
    "FIRST",
]


@triton.jit
def _cell(step, SIZE1, SIZE2, STEP0, STEP1, STEP2, FIRST):
    """The cell that a route visits at a step, from the step's digits."""
    return FIRST + step // SIZE2 // SIZE1 * STEP0 + step // SIZE2 % SIZE1 * STEP1 + step % SIZE2 * STEP2


@triton.jit
def _step_size(low_rank, weight, bias, rows, m_l, o_d, m_d, CHANNELS, RANK, BLOCK_L: tl.constexpr, ACC: tl.constexpr):
    """Δ [L, D] before and after softplus, from the low-rank columns at ``rows``; 0 after it where the mask ends."""
    raw = tl.zeros([BLOCK_L, 1], ACC) + bias[None, :]
    for r in range(RANK):
        column = tl.load(low_rank + rows + r, m_l, 0.0).to(ACC)
        raw += column[:, None] * tl.load(weight + o_d * RANK + r, m_d, 0.0).to(ACC)[None, :]
    return raw, tl.where(m_l[:, None] & m_d[None, :], softplus(raw), 0.0)


@triton.jit(do_not_specialize=_RUNTIME)
def routed_scan_fwd_kernel(
    x, low_rank, weight, bias, A, D, y, carries,
    CHANNELS, CELLS, LENGTH, STATE, RANK, COLUMNS, COLUMN, SIZE1, SIZE2, STEP0, STEP1, STEP2, FIRST,
    ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One route of h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t;  y_t = C_t h_t + D u_t, added to y (arXiv:2401.10166).

    A program owns BLOCK_D channels of one sample and walks the route chunk by chunk with the state in registers;
    weight, bias, A and D are the route's. Adds to y, or, for backward, writes the state before every chunk.
    """
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    program = tl.program_id(0).to(tl.int64)  # offsets pass 2**31
    sample = program // blocks
    o_d = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_d, m_n = o_d < CHANNELS, o_n < STATE
    m_dn = m_d[:, None] & m_n[None, :]
    o_dn = o_d[:, None] * STATE + o_n[None, :]

    decay = tl.load(A + o_dn, m_dn, 0.0).to(ACC)
    shift = tl.load(bias + o_d, m_d, 0.0).to(ACC)
    skip = tl.load(D + o_d, m_d, 0.0).to(ACC)
    h = tl.zeros([BLOCK_D, BLOCK_N], ACC)
    chunks = tl.cdiv(LENGTH, BLOCK_L)
    for chunk in range(chunks):
        o_l = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
        m_l = o_l < LENGTH
        cell = sample * CELLS + _cell(o_l, SIZE1, SIZE2, STEP0, STEP1, STEP2, FIRST)
        rows = cell * COLUMNS + COLUMN
        o_ln = (rows + RANK)[:, None] + o_n[None, :]
        m_ln = m_l[:, None] & m_n[None, :]
        offset = cell[:, None] * CHANNELS + o_d[None, :]
        mask = m_l[:, None] & m_d[None, :]
        if carries is not None:
            tl.store(carries + (sample * chunks + chunk) * CHANNELS * STATE + o_dn, h, m_dn)
        u = tl.load(x + offset, mask, 0.0).to(ACC)
        _, dt = _step_size(low_rank, weight, shift, rows, m_l, o_d, m_d, CHANNELS, RANK, BLOCK_L, ACC)
        states, h = advance(u, dt, decay, tl.load(low_rank + o_ln, m_ln, 0.0).to(ACC), h, BLOCK_L)
        if y is not None:
            read = tl.load(low_rank + o_ln + STATE, m_ln, 0.0).to(ACC)
            out = tl.sum(states * read[:, None, :], axis=2) + u * skip[None, :]
            tl.store(y + offset, tl.load(y + offset, mask, 0.0) + out, mask)


@triton.jit(do_not_specialize=_RUNTIME)
def routed_scan_bwd_kernel(
    dy, x, low_rank, weight, bias, A, D, carries, dx, draw, dBC, dA, dD,
    CHANNELS, CELLS, LENGTH, STATE, RANK, COLUMNS, COLUMN, SIZE1, SIZE2, STEP0, STEP1, STEP2, FIRST,
    ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Walks one route backwards, recomputing the states of each chunk from the carry before it.

    Adds to dx; writes the gradient by Δ before softplus (``draw``), cell by cell, from which the launcher gets those
    of the low-rank projection. dBC is per block of channels, dA and dD per sample: added up in a fixed order.
    """
    blocks = tl.cdiv(CHANNELS, BLOCK_D)
    program = tl.program_id(0).to(tl.int64)
    block, sample = program % blocks, program // blocks
    samples = tl.num_programs(0).to(tl.int64) // blocks
    o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_d, m_n = o_d < CHANNELS, o_n < STATE
    m_dn = m_d[:, None] & m_n[None, :]
    o_dn = o_d[:, None] * STATE + o_n[None, :]

    decay = tl.load(A + o_dn, m_dn, 0.0).to(ACC)
    shift = tl.load(bias + o_d, m_d, 0.0).to(ACC)
    skip = tl.load(D + o_d, m_d, 0.0).to(ACC)
    g = tl.zeros([BLOCK_D, BLOCK_N], ACC)
    sum_A, sum_D = tl.zeros([BLOCK_D, BLOCK_N], ACC), tl.zeros([BLOCK_D], ACC)
    chunks = tl.cdiv(LENGTH, BLOCK_L)
    for step in range(chunks):
        chunk = chunks - 1 - step
        o_l = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
        m_l, m_next = o_l < LENGTH, o_l + 1 < LENGTH
        cell = sample * CELLS + _cell(o_l, SIZE1, SIZE2, STEP0, STEP1, STEP2, FIRST)
        following = sample * CELLS + _cell(o_l + 1, SIZE1, SIZE2, STEP0, STEP1, STEP2, FIRST)
        rows, rows_next = cell * COLUMNS + COLUMN, following * COLUMNS + COLUMN
        o_ln = (rows + RANK)[:, None] + o_n[None, :]
        m_ln = m_l[:, None] & m_n[None, :]
        offset = cell[:, None] * CHANNELS + o_d[None, :]
        mask = m_l[:, None] & m_d[None, :]
        u = tl.load(x + offset, mask, 0.0).to(ACC)
        dout = tl.load(dy + offset, mask, 0.0).to(ACC)
        raw, dt = _step_size(low_rank, weight, shift, rows, m_l, o_d, m_d, CHANNELS, RANK, BLOCK_L, ACC)
        _, dt_next = _step_size(low_rank, weight, shift, rows_next, m_next, o_d, m_d, CHANNELS, RANK, BLOCK_L, ACC)
        write = tl.load(low_rank + o_ln, m_ln, 0.0).to(ACC)
        read = tl.load(low_rank + o_ln + STATE, m_ln, 0.0).to(ACC)
        h = tl.load(carries + (sample * chunks + chunk) * CHANNELS * STATE + o_dn, m_dn, 0.0)
        du, ddt, part_A, part_B, part_C, g, _ = retreat(dout, u, dt, dt_next, decay, write, read, h, g, BLOCK_L)
        tl.store(dx + offset, tl.load(dx + offset, mask, 0.0) + du + dout * skip[None, :], mask)
        tl.store(draw + offset, ddt * tl.sigmoid(raw), mask)
        o_part = ((block * samples * CELLS + cell) * 2 * STATE)[:, None] + o_n[None, :]
        tl.store(dBC + o_part, part_B, m_ln)
        tl.store(dBC + o_part + STATE, part_C, m_ln)
        sum_A += part_A
        sum_D += tl.sum(dout * u, axis=0)
    tl.store(dA + sample * CHANNELS * STATE + o_dn, sum_A, m_dn)
    tl.store(dD + sample * CHANNELS + o_d, sum_D, m_d)


def forward(
    x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: Routes
) -> Tensor:
    """See :func:`vision_ssm.kernels.routed_scan.op.routed_scan`."""
    x, low_rank, dt_weight, dt_bias, A, D = (m.contiguous() for m in (x, low_rank, dt_weight, dt_bias, A, D))
    dtype = compute_dtype(x, A)
    y = x.new_zeros(x.shape, dtype=dtype)
    grid, constants = _launch(x, A, routes, dtype)
    for k, route in enumerate(routes):
        sizes = _sizes(x, low_rank, dt_weight, A, route, k)
        routed_scan_fwd_kernel[grid](x, low_rank, dt_weight[k], dt_bias[k], A[k], D[k], y, None, *sizes, **constants)
    return y.to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, low_rank: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, routes: Routes
) -> tuple[Tensor, ...]:
    """Gradients by x, low_rank, dt_weight, dt_bias, A and D, in the dtype that the scan computes in."""
    dy, x, low_rank, dt_weight, dt_bias, A, D = (m.contiguous() for m in (dy, x, low_rank, dt_weight, dt_bias, A, D))
    dtype = compute_dtype(x, A)
    grid, constants = _launch(x, A, routes, dtype)
    (batch, *sides, channels), (rank, state) = x.shape, (dt_weight.shape[-1], A.shape[-1])
    cells, length = math.prod(sides), routes[0].length(sides)
    dx = x.new_zeros(x.shape, dtype=dtype)
    dlow_rank = x.new_zeros(batch * cells, len(routes), rank + 2 * state, dtype=dtype)
    steps = low_rank.view(batch * cells, len(routes), -1)
    grads = []
    for k, route in enumerate(routes):
        weights = dt_weight[k], dt_bias[k], A[k], D[k]
        sizes = _sizes(x, low_rank, dt_weight, A, route, k)
        carries = dx.new_empty(batch, triton.cdiv(length, constants["BLOCK_L"]), channels, state)
        routed_scan_fwd_kernel[grid](x, low_rank, *weights, None, carries, *sizes, **constants)
        # cells that the route does not visit have no gradient
        draw = dx.new_zeros(batch * cells, channels)
        dBC = dx.new_zeros(grid[0] // batch, batch * cells, 2 * state)
        dA, dD = dx.new_empty(batch, channels, state), dx.new_empty(batch, channels)
        routed_scan_bwd_kernel[grid](dy, x, low_rank, *weights, carries, dx, draw, dBC, dA, dD, *sizes, **constants)
        dlow_rank[:, k, :rank] = draw @ dt_weight[k].to(dtype)
        dlow_rank[:, k, rank:] = dBC.sum(0)
        grads.append((draw.T @ steps[:, k, :rank].to(dtype), draw.sum(0), dA.sum(0), dD.sum(0)))
    return dx, dlow_rank.view(low_rank.shape), *(torch.stack(parts) for parts in zip(*grads, strict=True))


def _launch(x: Tensor, A: Tensor, routes: Routes, dtype: torch.dtype) -> tuple[tuple[int], dict[str, object]]:
    blocks = block_sizes(routes[0].length(x.shape[1:-1]), x.shape[-1], A.shape[-1])
    programs = x.shape[0] * triton.cdiv(x.shape[-1], blocks["BLOCK_D"])
    return (programs,), {"ACC": TRITON_DTYPE[dtype], **blocks}


def _sizes(x: Tensor, low_rank: Tensor, dt_weight: Tensor, A: Tensor, route: Route, k: int) -> tuple[int, ...]:
    """The kernels' integers from CHANNELS to FIRST."""
    _, *grid, channels = x.shape
    if len(grid) > _AXES:
        raise ValueError(f"routed_scan on a GPU takes grids of up to {_AXES} axes; got {tuple(grid)}")
    order = route.affine(grid)
    missing = _AXES - len(grid)
    _, size1, size2 = (1,) * missing + order.sizes
    steps = (0,) * missing + order.steps
    rank, state = dt_weight.shape[-1], A.shape[-1]
    column = k * (rank + 2 * state)
    cells, length, columns = math.prod(grid), route.length(grid), low_rank.shape[-1]
    return channels, cells, length, state, rank, columns, column, size1, size2, *steps, order.first
