"""Triton kernels of the linear recurrence. A program walks BLOCK numbers of a step through a run of time.

Numbers of a step are contiguous, so that every step is read and written whole, and the next one is on its way while
the last is computed. Real numbers carry imaginary parts of zero, which the compiler drops.
"""

import triton
import triton.language as tl

_SIZES = ["LENGTH", "BATCH", "STEPS", "RUNS", "CHANNELS", "SPAN", "ROWS"]
"""No kernel is compiled for them. It is for WIDTH: whether 16 divides it decides how wide memory is read."""


@triton.jit
def place(WIDTH, BLOCK: tl.constexpr):
    """What a program owns: run and block of numbers."""
    blocks, program = tl.cdiv(WIDTH, BLOCK), tl.program_id(0)
    return program // blocks, (program % blocks).to(tl.int64)  # offsets pass 2**31


@triton.jit
def read(pointer, row, block, valid, WIDTH, ACC: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Real and imaginary parts of a block of a row, [BLOCK]; zeros beyond the row, and if not ``valid``."""
    if PAIRS:
        o = block * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        m = tl.load(pointer + tl.cast(row, tl.int64) * (2 * WIDTH) + o, (o < 2 * WIDTH) & valid, 0.0).to(ACC)
        re, im = tl.split(tl.reshape(m, [BLOCK, 2]))
    else:
        o = block * BLOCK + tl.arange(0, BLOCK)
        re = tl.load(pointer + tl.cast(row, tl.int64) * WIDTH + o, (o < WIDTH) & valid, 0.0).to(ACC)
        im = tl.zeros_like(re)
    return re, im


@triton.jit
def write(pointer, row, block, re, im, WIDTH, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores a block as ``read`` loads it."""
    if PAIRS:
        o = block * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        m = tl.reshape(tl.join(re, im), [2 * BLOCK])
        tl.store(pointer + tl.cast(row, tl.int64) * (2 * WIDTH) + o, m.to(pointer.dtype.element_ty), o < 2 * WIDTH)
    else:
        o = block * BLOCK + tl.arange(0, BLOCK)
        at = pointer + tl.cast(row, tl.int64) * WIDTH + o
        tl.store(at, re.to(pointer.dtype.element_ty), o < WIDTH)


@triton.jit
def read_decays(
    a, row, block, valid, WIDTH, CHANNELS, SPAN, ROWS,
    ACC: tl.constexpr, WHOLE: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The decays of a block: a step has ROWS times CHANNELS of them, or, if WHOLE, one for each number.

    A row of decays serves SPAN numbers that follow each other, and its channels take turns.
    """
    if WHOLE:
        re, im = read(a, row, block, valid, WIDTH, ACC, PAIRS, BLOCK)
    else:
        o = block * BLOCK + tl.arange(0, BLOCK)
        mask = (o < WIDTH) & valid
        index = tl.cast(row, tl.int64) * ROWS * CHANNELS + o // SPAN % ROWS * CHANNELS + o % CHANNELS
        if PAIRS:
            re, im = tl.load(a + 2 * index, mask, 0.0).to(ACC), tl.load(a + 2 * index + 1, mask, 0.0).to(ACC)
        else:
            re = tl.load(a + index, mask, 0.0).to(ACC)
            im = tl.zeros_like(re)
    return re, im


@triton.jit
def read_stops(resets, row, block, WIDTH, BATCH, ALONE: tl.constexpr, BLOCK: tl.constexpr):
    """Whether the samples of a block start anew at a step; one answer if blocks are of one sample (ALONE)."""
    at = resets + tl.cast(row, tl.int64) * BATCH
    if ALONE:
        stop = tl.load(at + block * BLOCK // (WIDTH // BATCH)) != 0
    else:
        o = block * BLOCK + tl.arange(0, BLOCK)
        stop = tl.load(at + o // (WIDTH // BATCH), o < WIDTH, 0) != 0
    return stop


@triton.jit
def keep(re, im, stop):
    """A number, and zero where the sequence starts anew: not a product, which would keep NaN."""
    return tl.where(stop, 0.0, re), tl.where(stop, 0.0, im)


@triton.jit
def times(a_re, a_im, re, im, PAIRS: tl.constexpr):
    if PAIRS:
        out_re, out_im = a_re * re - a_im * im, a_re * im + a_im * re
    else:
        out_re, out_im = a_re * re, im
    return out_re, out_im


@triton.jit(do_not_specialize=_SIZES)
def scan_kernel(
    a, b, entering, resets, h, leaving, decays,
    WIDTH, LENGTH, BATCH, STEPS, RUNS, CHANNELS, SPAN, ROWS,
    ACC: tl.constexpr, VARIES: tl.constexpr, WHOLE: tl.constexpr, ALONE: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h_t = a_t h_{t-1} + b_t

    Walks a run of STEPS steps from the state that is ``entering``, or zeros. Writes what is not None: h, the state
    ``leaving`` the run, and the run's decay, which is zero from where the sequence starts anew.
    """
    run, block = place(WIDTH, BLOCK)
    begin, end = run * STEPS, tl.minimum((run + 1) * STEPS, LENGTH)
    h_re, h_im = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    if entering is not None:
        h_re, h_im = read(entering, run, block, True, WIDTH, ACC, PAIRS, BLOCK)
    d_re, d_im = tl.full([BLOCK], 1.0, ACC), tl.zeros([BLOCK], ACC)
    row = begin if VARIES else begin * 0
    a_re, a_im = read_decays(a, row, block, True, WIDTH, CHANNELS, SPAN, ROWS, ACC, WHOLE, PAIRS, BLOCK)
    b_re, b_im = read(b, begin, block, True, WIDTH, ACC, PAIRS, BLOCK)
    for t in range(begin, end):
        now_re, now_im, by_re, by_im = b_re, b_im, a_re, a_im
        b_re, b_im = read(b, t + 1, block, t + 1 < end, WIDTH, ACC, PAIRS, BLOCK)
        if VARIES:
            a_re, a_im = read_decays(
                a, t + 1, block, t + 1 < end, WIDTH, CHANNELS, SPAN, ROWS, ACC, WHOLE, PAIRS, BLOCK
            )
        if resets is not None:
            stop = read_stops(resets, t, block, WIDTH, BATCH, ALONE, BLOCK)
            h_re, h_im = keep(h_re, h_im, stop)
            d_re, d_im = keep(d_re, d_im, stop)
        h_re, h_im = times(by_re, by_im, h_re, h_im, PAIRS)
        h_re += now_re
        h_im += now_im
        if decays is not None:
            d_re, d_im = times(by_re, by_im, d_re, d_im, PAIRS)
        if h is not None:
            write(h, t, block, h_re, h_im, WIDTH, PAIRS, BLOCK)
    if leaving is not None:
        write(leaving, run, block, h_re, h_im, WIDTH, PAIRS, BLOCK)
    if decays is not None:
        write(decays, run, block, d_re, d_im, WIDTH, PAIRS, BLOCK)


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    dh, a, h, initial, resets, leaving, da, db, entering, decays,
    WIDTH, LENGTH, BATCH, STEPS, RUNS, CHANNELS, SPAN, ROWS,
    ACC: tl.constexpr, VARIES: tl.constexpr, WHOLE: tl.constexpr, ALONE: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Walks a run back from the gradient by the state ``leaving`` it, to that by the one ``entering`` it.

    If db is not None, writes it, and da of every step (VARIES) or of every run: the launcher adds them up in a fixed
    order, so that two runs agree bit for bit. Else writes the run's decay, as ``scan_kernel`` does.
    """
    run, block = place(WIDTH, BLOCK)
    begin, end = run * STEPS, tl.minimum((run + 1) * STEPS, LENGTH)
    g_re, g_im = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    if leaving is not None:
        g_re, g_im = read(leaving, run, block, True, WIDTH, ACC, PAIRS, BLOCK)
    d_re, d_im = tl.full([BLOCK], 1.0, ACC), tl.zeros([BLOCK], ACC)
    sum_re, sum_im = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    row = end - 1 if VARIES else end * 0
    a_re, a_im = read_decays(a, row, block, True, WIDTH, CHANNELS, SPAN, ROWS, ACC, WHOLE, PAIRS, BLOCK)
    dh_re, dh_im = read(dh, end - 1, block, True, WIDTH, ACC, PAIRS, BLOCK)
    if db is not None:
        h_re, h_im = read(h, end - 2, block, end >= 2, WIDTH, ACC, PAIRS, BLOCK)
    for i in range(begin, end):
        t = end - 1 - (i - begin)
        now_re, now_im, by_re, by_im = dh_re, dh_im, a_re, a_im
        dh_re, dh_im = read(dh, t - 1, block, t > begin, WIDTH, ACC, PAIRS, BLOCK)
        if VARIES:
            a_re, a_im = read_decays(a, t - 1, block, t > begin, WIDTH, CHANNELS, SPAN, ROWS, ACC, WHOLE, PAIRS, BLOCK)
        g_re += now_re
        g_im += now_im
        if db is not None:
            before_re, before_im = h_re, h_im
            h_re, h_im = read(h, t - 2, block, (t > begin) & (t >= 2), WIDTH, ACC, PAIRS, BLOCK)
            if initial is not None:
                initial_re, initial_im = read(initial, run * 0, block, t == 0, WIDTH, ACC, PAIRS, BLOCK)
                before_re += initial_re
                before_im += initial_im
            write(db, t, block, g_re, g_im, WIDTH, PAIRS, BLOCK)
        if resets is not None:
            stop = read_stops(resets, t, block, WIDTH, BATCH, ALONE, BLOCK)
        if db is not None:
            if resets is not None:
                before_re, before_im = keep(before_re, before_im, stop)
            da_re, da_im = times(before_re, -before_im, g_re, g_im, PAIRS)
            if VARIES:
                write(da, t, block, da_re, da_im, WIDTH, PAIRS, BLOCK)
            else:
                sum_re += da_re
                sum_im += da_im
        else:
            d_re, d_im = times(by_re, by_im, d_re, d_im, PAIRS)
            if resets is not None:
                d_re, d_im = keep(d_re, d_im, stop)
        g_re, g_im = times(by_re, -by_im, g_re, g_im, PAIRS)
        if resets is not None:
            g_re, g_im = keep(g_re, g_im, stop)
    if db is None:
        write(decays, run, block, d_re, d_im, WIDTH, PAIRS, BLOCK)
    elif not VARIES:
        write(da, run, block, sum_re, sum_im, WIDTH, PAIRS, BLOCK)
    if entering is not None:
        write(entering, run, block, g_re, g_im, WIDTH, PAIRS, BLOCK)


@triton.jit(do_not_specialize=_SIZES)
def carry_kernel(
    states, decays, first, last, WIDTH, RUNS,
    ACC: tl.constexpr, BACK: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From what each run makes of zeros to what comes into it, in place, run by run from ``first`` to ``last``.

    Nothing passes a run whose decay is zero, NaN neither.
    """
    _run, block = place(WIDTH, BLOCK)
    s_re, s_im = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    if first is not None:
        s_re, s_im = read(first, _run, block, True, WIDTH, ACC, PAIRS, BLOCK)
    for i in range(RUNS):
        run = RUNS - 1 - i if BACK else i
        own_re, own_im = read(states, run, block, True, WIDTH, ACC, PAIRS, BLOCK)
        d_re, d_im = read(decays, run, block, True, WIDTH, ACC, PAIRS, BLOCK)
        write(states, run, block, s_re, s_im, WIDTH, PAIRS, BLOCK)
        s_re, s_im = keep(s_re, s_im, (d_re == 0) & (d_im == 0))
        s_re, s_im = times(d_re, -d_im if BACK else d_im, s_re, s_im, PAIRS)
        s_re += own_re
        s_im += own_im
    write(last, _run, block, s_re, s_im, WIDTH, PAIRS, BLOCK)
