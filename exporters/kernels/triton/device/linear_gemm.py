"""Code of `linear.py` for many rows of x: tiles on tensor cores with float32 sums.

The weight is the left operand: its words go through shared memory into the layout of that operand and become float16
there, plane by plane (16 inputs, one matrix instruction deep). Codes less their zero are exact in float16, and scales
multiply the sum of each group. bfloat16 weights are rounded to float16, which changes only those below 2^-14.
"""

from arkinfer.exporters.kernels.triton.device.language import jit, tl


@jit
def _x(x, order, token, present, k, WIDTH: tl.constexpr, ORDER: tl.constexpr, EXACT: tl.constexpr):
    """Return a tile (inputs, tokens) of x; ``EXACT``: all of k lies inside."""
    inside = present[None, :] if EXACT else present[None, :] & (k < WIDTH)[:, None]
    if ORDER:
        k = tl.load(order + k, mask=k < WIDTH, other=0)
    return tl.load(x + token[None, :] * WIDTH + k[:, None], mask=inside, other=0.0)


@jit
def _numbers(words, shift, BITS: tl.constexpr):
    """Return codes as float16: with 1024's exponent above it, a code is 1024 + code."""
    codes = ((words >> shift) & ((1 << BITS) - 1)) | 0x6400
    return codes.to(tl.int16).to(tl.float16, bitcast=True)


@jit
def gemm(
    x, weight, scales, zeros, order, bias, out, count,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr,
    DENSE: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, ZERO: tl.constexpr, WORDS: tl.constexpr,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, ORDER: tl.constexpr, GATED: tl.constexpr, FACTOR: tl.constexpr,
    SHARED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    valid = place < ROWS
    if GATED:
        row = place // 2 + (place % 2) * COLUMNS  # gate and up alternate
    else:
        row = place
    far = row.to(tl.int64)[:, None]
    token = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    present = token < count
    sums = tl.zeros((TILE_N, TILE_M), tl.float32)
    if DENSE:
        for start in range(0, WIDTH, STEP):
            k = start + tl.arange(0, STEP)
            inside = valid[:, None] if WIDTH % STEP == 0 else valid[:, None] & (k < WIDTH)[None, :]
            w = tl.load(weight + far * WIDTH + k[None, :], mask=inside, other=0.0)
            values = _x(x, order, token, present, k, WIDTH, ORDER, WIDTH % STEP == 0)
            sums = tl.dot(w.to(tl.float16), values, sums)
    else:
        SPAN: tl.constexpr = 16 * TAKEN  # inputs of an iteration: all planes of a chunk, or half of them
        PARTS: tl.constexpr = PLANES // TAKEN
        GROUPS: tl.constexpr = WIDTH // GROUP if GROUP else 1
        if ZEROS and not GROUP:
            zero = tl.load(zeros + row, mask=valid, other=0).to(tl.float16)[:, None] + 1024.0
        for step in range(WORDS // 16 * PARTS):
            word = step // PARTS * 16 + tl.arange(0, 16)
            w = tl.load(weight + far * WORDS + word[None, :], mask=valid[:, None], other=0)
            lowest = step % PARTS * (TAKEN * BITS)
            for shared in tl.static_range(0, TAKEN, SHARED):
                if GROUP:
                    group = (step * SPAN + shared * 16) // GROUP
                    group = tl.minimum(group, GROUPS - 1)  # the row's padding, where x counts as zeros
                    scale = tl.load(scales + row * GROUPS + group, mask=valid, other=0.0).to(tl.float32)
                    if ZEROS:
                        zero = tl.load(zeros + row * GROUPS + group, mask=valid, other=0)
                        zero = zero.to(tl.float16)[:, None] + 1024.0
                    products = tl.zeros((TILE_N, TILE_M), tl.float32)
                else:
                    products = sums
                for plane in tl.static_range(shared, shared + SHARED):
                    k = step * SPAN + plane * 16 + tl.arange(0, 16)
                    values = _x(x, order, token, present, k, WIDTH, ORDER, WIDTH % (16 * PLANES) == 0)
                    numbers = _numbers(w, lowest + plane * BITS, BITS)
                    numbers -= zero if ZEROS else 1024.0 + ZERO
                    products = tl.dot(numbers, values, products)
                if GROUP:
                    sums += products * scale[:, None]
                else:
                    sums = products
        if GROUP == 0:
            sums *= tl.load(scales + row, mask=valid, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        sums += tl.load(bias + row, mask=valid, other=0.0)[:, None]
    if GATED:
        gate, up = tl.split(tl.trans(tl.reshape(sums, (TILE_N // 2, 2, TILE_M)), (0, 2, 1)))
        sums = gate / (1.0 + tl.exp(-gate)) * up
        column = tl.program_id(1) * (TILE_N // 2) + tl.arange(0, TILE_N // 2)
    else:
        column = place
    target = out + token.to(tl.int64)[None, :] * STRIDE + column[:, None]
    wanted = present[None, :] & (column < COLUMNS)[:, None]
    tl.store(target, (sums * FACTOR).to(out.dtype.element_ty), mask=wanted)
