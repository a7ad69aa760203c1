"""The Triton kernels of the scalar-decay scan: chunks as matrix products on the tensor cores, the state in registers.

1. ``decay``: the decays of every step, summed up inside its chunk;
2. ``scan``: walks a run of consecutive chunks of one head, with a block of its state, to the outputs;
3. ``gradient``: walks a run back, to the gradients;
4. ``carry``: the states between the runs, where a sequence is cut into several.

Steps are counted in the order of the visit, so that a reversed scan differs by the addresses alone. Products take x, B
and C as they are and what is computed from them as bfloat16 beside bfloat16, else as float32: in TF32 beside float16,
whose range a state can leave, and in three TF32 products beside float32.
"""

import triton
import triton.language as tl

_SIZES = ["BATCH", "LENGTH", "HEADS", "GROUPS", "RUNS", "CHUNKS", "REVERSE"]  # no kernel is compiled for them


@triton.jit
def product(a, b, ACC: tl.constexpr):
    """a b on the tensor cores; float64 without them."""
    if tl.float64 == ACC:
        out = tl.sum(a.to(ACC)[:, :, None] * b.to(ACC)[None, :, :], axis=1)
    elif a.dtype == b.dtype:
        out = tl.dot(a, b, input_precision="tf32x3")
    else:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    return out


@triton.jit
def add_exactly(a, a_rest, b, b_rest):
    """A sum, and what its rounding left (D. Knuth's two-sum)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part) + (a_rest + b_rest)


@triton.jit
def add_before(a, a_before, b, b_before):
    """Running sums with each entry and without it, the latter found without a subtraction."""
    return a + b, a + b_before


@triton.jit
def place(BATCH, HEADS, WIDTH, STATE, RUNS, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a program owns: run, head, sample; block of channels, their numbers; block of states, their numbers.

    Heads of a sample follow each other, since they share B and C.
    """
    blocks_p, program = tl.cdiv(WIDTH, BLOCK_P), tl.program_id(0)
    head, rest = program % HEADS, program // HEADS
    run, rest = rest % RUNS, rest // RUNS
    sample, part = rest % BATCH, rest // BATCH
    part_p, part_n = part % blocks_p, part // blocks_p
    o_p, o_n = part_p * BLOCK_P + tl.arange(0, BLOCK_P), part_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return run, head, sample, part_p, o_p, part_n, o_n


@triton.jit
def steps_of(chunk, sample, LENGTH, REVERSE, BLOCK_L: tl.constexpr):
    """Of a chunk: the place in the batch of its first step, the others' distance from it [L], and which there are."""
    o_l, start = tl.arange(0, BLOCK_L), chunk * BLOCK_L
    first = sample.to(tl.int64) * LENGTH + tl.where(REVERSE > 0, LENGTH - 1 - start, start)  # offsets pass 2**31
    return first, tl.where(REVERSE > 0, -o_l, o_l), start + o_l < LENGTH


@triton.jit
def vectors(pointer, first, o_l, m_l, index, COUNT, o_v, SIZE):
    """Where the vectors ``index`` of COUNT of each step lie, [L, V], and which of their entries there are."""
    at = pointer + (first * COUNT + index) * SIZE + ((o_l * COUNT * SIZE)[:, None] + o_v[None, :])
    return at, m_l[:, None] & (o_v < SIZE)[None, :]


@triton.jit
def read(pointer, first, o_l, m_l, index, COUNT, o_v, SIZE):
    """The vectors ``index`` of COUNT of each step, [L, V]; zeros beyond them."""
    at, mask = vectors(pointer, first, o_l, m_l, index, COUNT, o_v, SIZE)
    return tl.load(at, mask, 0.0)


@triton.jit
def write(pointer, m, first, o_l, m_l, index, COUNT, o_v, SIZE):
    """Stores vectors as ``read`` loads them."""
    at, mask = vectors(pointer, first, o_l, m_l, index, COUNT, o_v, SIZE)
    tl.store(at, m, mask)


@triton.jit(do_not_specialize=_SIZES)
def decay_kernel(
    dt, A, decays, BATCH, LENGTH, HEADS, REVERSE, ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Δ of each step and ΣΔA of its chunk up to and with it, in two parts: (3, b, h, steps of whole chunks).

    The second part is what rounding left of the first: a difference of two rounded sums would lose the short steps
    between them beside a long one before.
    """
    blocks, chunks = tl.cdiv(HEADS, BLOCK_H), tl.cdiv(LENGTH, BLOCK_L)
    program = tl.program_id(0)
    o_h = program % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    chunk, sample = program // blocks % chunks, program // blocks // chunks
    m_h = (o_h < HEADS)[None, :]
    first, o_l, m_l = steps_of(chunk, sample, LENGTH, REVERSE, BLOCK_L)
    step = read(dt, first, o_l, m_l, 0, 1, o_h, HEADS).to(ACC)
    exponents = step * tl.load(A + o_h, o_h < HEADS, 0.0).to(ACC)[None, :]
    up_to, rest = tl.associative_scan((exponents, tl.zeros_like(exponents)), 0, add_exactly)
    size = BATCH.to(tl.int64) * HEADS * chunks * BLOCK_L
    at = decays + ((sample.to(tl.int64) * HEADS + o_h)[None, :] * chunks + chunk) * BLOCK_L
    at += tl.arange(0, BLOCK_L)[:, None]
    tl.store(at, step, m_h)
    tl.store(at + size, up_to, m_h)
    tl.store(at + 2 * size, rest, m_h)


@triton.jit
def decays_of(decays, first, size, BLOCK_L: tl.constexpr):
    """Of a chunk: Δ [L]; ΣΔA up to and with each step [L] and over all, each in two parts."""
    at, last = decays + first + tl.arange(0, BLOCK_L), decays + first + BLOCK_L - 1 + size
    return tl.load(at), tl.load(at + size), tl.load(at + 2 * size), tl.load(last), tl.load(last + size)


@triton.jit
def reaches(up_to, rest, BLOCK_L: tl.constexpr):
    """Decay from step j to step i, [L i, L j]; 0 where j comes after i."""
    o_l = tl.arange(0, BLOCK_L)
    between = (up_to[:, None] - up_to[None, :]) + (rest[:, None] - rest[None, :])
    return tl.exp(tl.where(o_l[:, None] >= o_l[None, :], between, float("-inf")))


@triton.jit(do_not_specialize=_SIZES)
def scan_kernel(
    x, B, C, decays, entering, y, carries, leaving,
    BATCH, LENGTH, HEADS, GROUPS, WIDTH, STATE, RUNS, CHUNKS, REVERSE,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """S_t = exp(Δ_t A) S_{t-1} + Δ_t x_t B_tᵀ;  y_t = S_t C_t   (arXiv:2405.21060, section 6)

    Walks a run of CHUNKS chunks from the state that is ``entering``, or zeros. Writes what is not None: y, one for each
    block of states, the state before every chunk (``carries``) and the one ``leaving`` the run.
    """
    run, head, sample, _part_p, o_p, part_n, o_n = place(BATCH, HEADS, WIDTH, STATE, RUNS, BLOCK_P, BLOCK_N)
    group, row_h = head // (HEADS // GROUPS), sample.to(tl.int64) * HEADS + head
    o_s, m_s = o_p[:, None] * STATE + o_n[None, :], (o_p < WIDTH)[:, None] & (o_n < STATE)[None, :]
    at_run = (row_h * RUNS + run) * WIDTH * STATE
    s = tl.zeros([BLOCK_P, BLOCK_N], ACC)
    if entering is not None:
        s += tl.load(entering + at_run + o_s, m_s, 0.0).to(ACC)
    if y is not None:
        y += part_n.to(tl.int64) * BATCH * LENGTH * HEADS * WIDTH
    chunks = tl.cdiv(LENGTH, BLOCK_L)
    size = BATCH.to(tl.int64) * HEADS * chunks * BLOCK_L
    for chunk in range(run * CHUNKS, tl.minimum((run + 1) * CHUNKS, chunks)):
        first, o_l, m_l = steps_of(chunk, sample, LENGTH, REVERSE, BLOCK_L)
        step, up_to, rest, all_, all_rest = decays_of(decays, (row_h * chunks + chunk) * BLOCK_L, size, BLOCK_L)
        u = read(x, first, o_l, m_l, head, HEADS, o_p, WIDTH)
        b = read(B, first, o_l, m_l, group, GROUPS, o_n, STATE)
        if carries is not None:
            tl.store(carries + (row_h * chunks + chunk) * WIDTH * STATE + o_s, s, m_s)
        if y is not None:
            c = read(C, first, o_l, m_l, group, GROUPS, o_n, STATE)
            mixed = product(c, tl.trans(b), ACC) * reaches(up_to, rest, BLOCK_L) * step[None, :]
            out = product(c, tl.trans(s.to(OPERAND)), ACC) * tl.exp(up_to)[:, None]
            write(y, out + product(mixed.to(OPERAND), u, ACC), first, o_l, m_l, head, HEADS, o_p, WIDTH)
        leave = tl.exp((all_ - up_to) + (all_rest - rest)) * step
        s = s * tl.exp(all_) + product(tl.trans(u), (b * leave[:, None]).to(OPERAND), ACC)
    if leaving is not None:
        tl.store(leaving + at_run + o_s, s, m_s)


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    dy, x, A, B, C, decays, leaving, carries, dx, ddt, dA, dB, dC, entering,
    BATCH, LENGTH, HEADS, GROUPS, WIDTH, STATE, RUNS, CHUNKS, REVERSE,
    ACC: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Walks a run back from the gradient g by the state ``leaving`` it, or zeros, to that by the one ``entering`` it.

    If dx is not None, also writes the gradients, with the ``carries`` of ``scan_kernel``: dx for each block of states,
    dB and dC for each head and block of channels, ddt for each of both, and dA of each program. The launcher adds them
    up in a fixed order, so that two runs agree bit for bit.
    """
    run, head, sample, part_p, o_p, part_n, o_n = place(BATCH, HEADS, WIDTH, STATE, RUNS, BLOCK_P, BLOCK_N)
    group, row_h = head // (HEADS // GROUPS), sample.to(tl.int64) * HEADS + head
    o_s, m_s = o_p[:, None] * STATE + o_n[None, :], (o_p < WIDTH)[:, None] & (o_n < STATE)[None, :]
    at_run = (row_h * RUNS + run) * WIDTH * STATE
    rate = tl.load(A + head).to(ACC)
    g = tl.zeros([BLOCK_P, BLOCK_N], ACC)
    if leaving is not None:
        g += tl.load(leaving + at_run + o_s, m_s, 0.0).to(ACC)
    if dx is not None:
        steps = BATCH.to(tl.int64) * LENGTH * HEADS
        dx += part_n * steps * WIDTH
        dB += part_p * steps * STATE
        dC += part_p * steps * STATE
        ddt += (part_n * tl.cdiv(WIDTH, BLOCK_P) + part_p) * steps
    sum_A = rate * 0
    order = tl.arange(0, BLOCK_L)
    chunks = tl.cdiv(LENGTH, BLOCK_L)
    size = BATCH.to(tl.int64) * HEADS * chunks * BLOCK_L
    begin, end = run * CHUNKS, tl.minimum((run + 1) * CHUNKS, chunks)
    for i in range(begin, end):
        chunk = end - 1 - (i - begin)
        first, o_l, m_l = steps_of(chunk, sample, LENGTH, REVERSE, BLOCK_L)
        step, up_to, rest, all_, all_rest = decays_of(decays, (row_h * chunks + chunk) * BLOCK_L, size, BLOCK_L)
        enter, whole = tl.exp(up_to), tl.exp(all_)
        dout = read(dy, first, o_l, m_l, head, HEADS, o_p, WIDTH)
        c = read(C, first, o_l, m_l, group, GROUPS, o_n, STATE)
        if dx is not None:
            u = read(x, first, o_l, m_l, head, HEADS, o_p, WIDTH)
            b = read(B, first, o_l, m_l, group, GROUPS, o_n, STATE)
            s = tl.load(carries + (row_h * chunks + chunk) * WIDTH * STATE + o_s, m_s, 0.0)
            leave = tl.exp((all_ - up_to) + (all_rest - rest))

            # The gradient by Δ A of a step is that by the logarithms of all decays over the step: from the chunk's
            # earlier steps to it and later ones, from before the chunk, to after it, and through the whole chunk.
            reach = reaches(up_to, rest, BLOCK_L)
            mixed = product(c, tl.trans(b), ACC) * reach
            dmixed = product(dout, tl.trans(u), ACC) * step[None, :]
            passed = tl.where(order[:, None] > order[None, :], mixed * dmixed, 0.0)
            over = tl.sum(passed, axis=1) - tl.sum(passed, axis=0)
            dscores, mixed = (dmixed * reach).to(OPERAND), mixed.to(OPERAND)

            dc = product(dout, s.to(OPERAND), ACC) * enter[:, None]
            over += tl.sum(dc * c, axis=1)
            write(dC, dc + product(dscores, b, ACC), first, o_l, m_l, head, HEADS, o_n, STATE)

            db = product(u, g.to(OPERAND), ACC) * (leave * step)[:, None]
            write(dB, db + product(tl.trans(dscores), c, ACC), first, o_l, m_l, head, HEADS, o_n, STATE)

            du = product(b, tl.trans(g.to(OPERAND)), ACC) * leave[:, None]
            out = tl.sum(du * u, axis=1) * step
            du += product(tl.trans(mixed), dout, ACC)
            write(dx, du * step[:, None], first, o_l, m_l, head, HEADS, o_p, WIDTH)

            _, before = tl.associative_scan((out, tl.zeros_like(out)), 0, add_before)
            dexponents = tl.cumsum(over, axis=0, reverse=True) + before + whole * tl.sum(s * g)
            tl.store(ddt + first * HEADS + head + o_l * HEADS, dexponents * rate + tl.sum(du * u, axis=1), m_l)
            sum_A += tl.sum(dexponents * step)
        g = g * whole + product(tl.trans(dout), (c * enter[:, None]).to(OPERAND), ACC)
    if dx is not None:
        tl.store(dA + tl.program_id(0), sum_A)
    if entering is not None:
        tl.store(entering + at_run + o_s, g, m_s)


@triton.jit(do_not_specialize=[*_SIZES, "BACK"])
def carry_kernel(
    states, decays, first, last, BATCH, LENGTH, HEADS, RUNS, CHUNKS, SIZE, BACK,
    ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From what each run makes of zeros to what comes into it, in place, run by run from ``first`` to ``last``."""
    blocks, chunks = tl.cdiv(SIZE, BLOCK), tl.cdiv(LENGTH, BLOCK_L)
    program = tl.program_id(0)
    row_h, o_s = (program // blocks).to(tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < SIZE
    sums = decays + (BATCH * HEADS + row_h) * chunks * BLOCK_L + BLOCK_L - 1  # over the first chunk
    s = tl.zeros([BLOCK], ACC)
    if first is not None:
        s += tl.load(first + row_h * SIZE + o_s, m_s, 0.0).to(ACC)
    for i in range(RUNS):
        run = tl.where(BACK > 0, RUNS - 1 - i, i)
        at = states + (row_h * RUNS + run) * SIZE + o_s
        own = tl.load(at, m_s, 0.0)
        tl.store(at, s, m_s)
        total = tl.zeros([1], ACC)
        for chunk in range(run * CHUNKS, tl.minimum((run + 1) * CHUNKS, chunks)):
            total += tl.load(sums + chunk * BLOCK_L)
        s = s * tl.exp(total) + own
    tl.store(last + row_h * SIZE + o_s, s, m_s)
