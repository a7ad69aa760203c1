"""Selective scan on the GPU, in Triton: chunks of the sequence by an associative scan, the state carried across.

The functions ``softplus``, ``advance`` and ``retreat`` do one chunk. A chunk is a tile of L steps, D channels and N
states. Rows past the end have Δ = 0, so that they keep the state.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import compute_dtype

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def block_sizes(length: int, channels: int, state: int) -> dict[str, int]:
    """Tile sizes and warps: small tiles, since every lane's registers hold a share of all N states."""
    block_n = triton.next_power_of_2(state)
    return {
        "BLOCK_L": min(16, triton.next_power_of_2(length)),
        "BLOCK_D": min(max(4, 32 // max(1, block_n // 4)), triton.next_power_of_2(channels)),
        "BLOCK_N": block_n,
        "num_warps": 1 if block_n == 1 else 4,
    }


@triton.jit
def compose(a1, b1, a2, b2):
    """The map h -> a2 (a1 h + b1) + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def compose_carried(a1, b1, c1, a2, b2, c2):
    """As ``compose``; c is the result without the last b, that is a_t h_{t-1}, found without a subtraction."""
    return a1 * a2, a2 * b1 + b2, a2 * b1 + c2


@triton.jit
def softplus(x):
    """log(1 + e^x), the identity above 20, exact for small e^x as well (W. Kahan's log1p)."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1 + e
    d = u - 1
    return tl.where(x > 20, x, tl.where(d == 0, e, tl.log(u) * (e / tl.where(d == 0, 1, d))))


@triton.jit
def pick(row, tile, BLOCK_L: tl.constexpr):
    """Row ``row`` of a tile [L, D, N]."""
    here = (tl.arange(0, BLOCK_L) == row)[:, None, None]
    return tl.sum(tl.where(here, tile, 0.0), axis=0)


@triton.jit
def advance(x, dt, A, B, h, BLOCK_L: tl.constexpr):
    """States of a chunk [L, D, N] and the last of them, from x, dt [L, D]; A, h [D, N]; B [L, N]."""
    a = tl.exp(dt[:, :, None] * A[None, :, :])
    b = (dt * x)[:, :, None] * B[:, None, :]
    decay, local = tl.associative_scan((a, b), 0, compose)
    states = local + decay * h[None, :, :]
    return states, pick(BLOCK_L - 1, states, BLOCK_L)


@triton.jit
def retreat(dy, x, dt, dt_next, A, B, C, h, g, BLOCK_L: tl.constexpr):
    """Gradients of a chunk, from those of y [L, D], the state h before it and the gradient g [D, N] after it.

    dt_next [L, D] is Δ one step later. Returns gradients by x and dt [L, D], A [D, N], B and C [L, N], g at the first
    step and the gradient by h, both [D, N].
    """
    a = tl.exp(dt[:, :, None] * A[None, :, :])
    b = (dt * x)[:, :, None] * B[:, None, :]
    decay, local, carried = tl.associative_scan((a, b, tl.zeros_like(b)), 0, compose_carried)
    states = local + decay * h[None, :, :]
    carried += decay * h[None, :, :]
    dC = tl.sum(dy[:, :, None] * states, axis=1)

    a_next = tl.exp(dt_next[:, :, None] * A[None, :, :])
    c = dy[:, :, None] * C[:, None, :]
    decay, local = tl.associative_scan((a_next, c), 0, compose, reverse=True)
    gradient = local + decay * g[None, :, :]
    dB = tl.sum(gradient * (dt * x)[:, :, None], axis=1)
    db = tl.sum(gradient * B[:, None, :], axis=2)
    da = gradient * carried  # by log a
    ddt = tl.sum(da * A[None, :, :], axis=2) + db * x
    dA = tl.sum(da * dt[:, :, None], axis=0)
    return db * dt, ddt, dA, dB, dC, pick(0, gradient, BLOCK_L), pick(0, gradient * a, BLOCK_L)


@triton.jit
def _step_size(delta, offset, mask, bias, SOFTPLUS: tl.constexpr, ACC: tl.constexpr):
    """Δ [L, D] before and after softplus; 0 after it where the mask ends."""
    raw = tl.load(delta + offset, mask, 0.0).to(ACC) + bias[None, :]
    dt = softplus(raw) if SOFTPLUS else raw
    return raw, tl.where(mask, dt, 0.0)


@triton.jit(do_not_specialize=["LENGTH", "GROUPS", "STATE"])
def selective_scan_fwd_kernel(
    u, delta, A, B, C, D, bias, initial, y, last, carries,
    DIM, LENGTH, GROUPS, STATE,
    SOFTPLUS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t;  y_t = C_t h_t + D u_t   (arXiv:2312.00752, algorithm 2)

    A program owns BLOCK_D channels of one group of one sample and walks the sequence chunk by chunk with the state in
    registers. Writes y and the last state, or, for backward, the state before every chunk to ``carries``.
    """
    width = DIM // GROUPS
    blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0).to(tl.int64)  # offsets pass 2**31
    group, sample = program // blocks % GROUPS, program // blocks // GROUPS
    o_d = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_d, m_n = o_d < width, o_n < STATE
    m_dn = m_d[:, None] & m_n[None, :]
    o_d += group * width
    o_dn = o_d[:, None] * STATE + o_n[None, :]
    state_row = sample * DIM * STATE

    decay = tl.load(A + o_dn, m_dn, 0.0).to(ACC)
    shift = tl.zeros([BLOCK_D], ACC)
    if bias is not None:
        shift += tl.load(bias + o_d, m_d, 0.0).to(ACC)
    h = tl.zeros([BLOCK_D, BLOCK_N], ACC)
    if initial is not None:
        h += tl.load(initial + state_row + o_dn, m_dn, 0.0).to(ACC)

    chunks = tl.cdiv(LENGTH, BLOCK_L)
    for chunk in range(chunks):
        o_l = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
        m_l = o_l < LENGTH
        mask = m_l[:, None] & m_d[None, :]
        offset = (sample * DIM + o_d)[None, :] * LENGTH + o_l[:, None]
        o_ln = ((sample * GROUPS + group) * STATE + o_n)[None, :] * LENGTH + o_l[:, None]
        m_ln = m_l[:, None] & m_n[None, :]
        if carries is not None:
            tl.store(carries + (sample * chunks + chunk) * DIM * STATE + o_dn, h, m_dn)
        x = tl.load(u + offset, mask, 0.0).to(ACC)
        _, dt = _step_size(delta, offset, mask, shift, SOFTPLUS, ACC)
        states, h = advance(x, dt, decay, tl.load(B + o_ln, m_ln, 0.0).to(ACC), h, BLOCK_L)
        if y is not None:
            read = tl.load(C + o_ln, m_ln, 0.0).to(ACC)
            out = tl.sum(states * read[:, None, :], axis=2)
            if D is not None:
                out += x * tl.load(D + o_d, m_d, 0.0).to(ACC)[None, :]
            tl.store(y + offset, out, mask)
    if last is not None:
        tl.store(last + state_row + o_dn, h, m_dn)


@triton.jit(do_not_specialize=["LENGTH", "GROUPS", "STATE"])
def selective_scan_bwd_kernel(
    dy, dlast, u, delta, A, B, C, D, bias, carries,
    du, ddelta, dA, dB, dC, dD, dbias, dinitial,
    DIM, LENGTH, GROUPS, STATE,
    SOFTPLUS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Walks the chunks backwards, recomputing the states of each from the carry before it.

    dA, dD and dbias are per sample, dB and dC per block of channels: the launcher adds them up in a fixed order, so
    that two runs agree bit for bit.
    """
    width = DIM // GROUPS
    blocks = tl.cdiv(width, BLOCK_D)
    program = tl.program_id(0).to(tl.int64)
    block, group, sample = program % blocks, program // blocks % GROUPS, program // blocks // GROUPS
    samples = tl.num_programs(0).to(tl.int64) // blocks // GROUPS
    o_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_d, m_n = o_d < width, o_n < STATE
    m_dn = m_d[:, None] & m_n[None, :]
    o_d += group * width
    o_dn = o_d[:, None] * STATE + o_n[None, :]
    state_row = sample * DIM * STATE

    decay = tl.load(A + o_dn, m_dn, 0.0).to(ACC)
    shift, skip = tl.zeros([BLOCK_D], ACC), tl.zeros([BLOCK_D], ACC)
    if bias is not None:
        shift += tl.load(bias + o_d, m_d, 0.0).to(ACC)
    if D is not None:
        skip += tl.load(D + o_d, m_d, 0.0).to(ACC)
    g = tl.load(dlast + state_row + o_dn, m_dn, 0.0).to(ACC)
    sum_A, dh = tl.zeros([BLOCK_D, BLOCK_N], ACC), tl.zeros([BLOCK_D, BLOCK_N], ACC)
    sum_D, sum_bias = tl.zeros([BLOCK_D], ACC), tl.zeros([BLOCK_D], ACC)

    chunks = tl.cdiv(LENGTH, BLOCK_L)
    for step in range(chunks):
        chunk = chunks - 1 - step
        o_l = chunk * BLOCK_L + tl.arange(0, BLOCK_L)
        m_l = o_l < LENGTH
        mask = m_l[:, None] & m_d[None, :]
        offset = (sample * DIM + o_d)[None, :] * LENGTH + o_l[:, None]
        o_ln = ((sample * GROUPS + group) * STATE + o_n)[None, :] * LENGTH + o_l[:, None]
        m_ln = m_l[:, None] & m_n[None, :]
        x = tl.load(u + offset, mask, 0.0).to(ACC)
        dout = tl.load(dy + offset, mask, 0.0).to(ACC)
        raw, dt = _step_size(delta, offset, mask, shift, SOFTPLUS, ACC)
        m_next = (o_l + 1 < LENGTH)[:, None] & m_d[None, :]
        _, dt_next = _step_size(delta, offset + 1, m_next, shift, SOFTPLUS, ACC)
        write = tl.load(B + o_ln, m_ln, 0.0).to(ACC)
        read = tl.load(C + o_ln, m_ln, 0.0).to(ACC)
        h = tl.load(carries + (sample * chunks + chunk) * DIM * STATE + o_dn, m_dn, 0.0)
        dx, ddt, part_A, part_B, part_C, g, dh = retreat(dout, x, dt, dt_next, decay, write, read, h, g, BLOCK_L)
        if SOFTPLUS:
            ddt *= tl.sigmoid(raw)
        ddt = tl.where(mask, ddt, 0.0)
        tl.store(du + offset, dx + dout * skip[None, :], mask)
        tl.store(ddelta + offset, ddt, mask)
        o_part = block * samples * GROUPS * STATE * LENGTH + o_ln
        tl.store(dB + o_part, part_B, m_ln)
        tl.store(dC + o_part, part_C, m_ln)
        sum_A += part_A
        sum_D += tl.sum(dout * x, axis=0)
        sum_bias += tl.sum(ddt, axis=0)
    tl.store(dA + state_row + o_dn, sum_A, m_dn)
    tl.store(dinitial + state_row + o_dn, dh, m_dn)
    tl.store(dD + sample * DIM + o_d, sum_D, m_d)
    tl.store(dbias + sample * DIM + o_d, sum_bias, m_d)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`vision_ssm.kernels.selective_scan.op.selective_scan`."""
    u, delta, A, B, C = (m.contiguous() for m in (u, delta, A, B, C))
    D, delta_bias, initial_state = (m if m is None else m.contiguous() for m in (D, delta_bias, initial_state))
    dtype = compute_dtype(u, A, initial_state)
    y, last = torch.empty_like(u), u.new_empty(u.shape[0], *A.shape, dtype=dtype)
    sizes, grid, blocks = _launch(u, A, B)
    selective_scan_fwd_kernel[grid](
        u, delta, A, B, C, D, delta_bias, initial_state, y, last, None,
        *sizes, SOFTPLUS=delta_softplus, ACC=TRITON_DTYPE[dtype], **blocks,
    )  # fmt: skip
    return y, last


def backward(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients by u, delta, A, B, C, D, delta_bias and the initial state, in the dtype that the scan computes in."""
    dy, dlast, u, delta, A, B, C = (m.contiguous() for m in (dy, dlast, u, delta, A, B, C))
    D, delta_bias, initial_state = (m if m is None else m.contiguous() for m in (D, delta_bias, initial_state))
    dtype = compute_dtype(u, A, initial_state)
    sizes, grid, blocks = _launch(u, A, B)
    batch, dim, length = u.shape
    parts = triton.cdiv(dim // B.shape[1], blocks["BLOCK_D"])
    constants = {"SOFTPLUS": delta_softplus, "ACC": TRITON_DTYPE[dtype], **blocks}

    def empty(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=dtype)

    carries = empty(batch, triton.cdiv(length, blocks["BLOCK_L"]), *A.shape)
    selective_scan_fwd_kernel[grid](
        u, delta, A, B, C, D, delta_bias, initial_state, None, None, carries, *sizes, **constants
    )
    du, ddelta = empty(*u.shape), empty(*u.shape)
    dA, dinitial = empty(batch, *A.shape), empty(batch, *A.shape)
    dB, dC = empty(parts, *B.shape), empty(parts, *B.shape)
    dD, dbias = empty(batch, dim), empty(batch, dim)
    selective_scan_bwd_kernel[grid](
        dy, dlast, u, delta, A, B, C, D, delta_bias, carries,
        du, ddelta, dA, dB, dC, dD, dbias, dinitial, *sizes, **constants,
    )  # fmt: skip
    return du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dbias.sum(0), dinitial


def _launch(u: Tensor, A: Tensor, B: Tensor) -> tuple[tuple[int, ...], tuple[int], dict[str, int]]:
    (batch, dim, length), groups, state = u.shape, B.shape[1], A.shape[1]
    blocks = block_sizes(length, dim // groups, state)
    programs = batch * groups * triton.cdiv(dim // groups, blocks["BLOCK_D"])
    return (dim, length, groups, state), (programs,), blocks
