"""Code of `linear.py` for one row of x: every lane reads 16 bytes of each of TILE rows, so one block reads whole rows.

x is float16 and is read as often as there are tiles, from the caches of the chip. Nothing is exchanged between lanes
before the end.
"""

from arkinfer.exporters.kernels.triton.device.codes import PRODUCT, bits_of, raised
from arkinfer.exporters.kernels.triton.device.language import jit, tl


@jit
def _rows(ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, GATED: tl.constexpr):
    """Return the rows of this tile, and whether each is one; gate and up alternate."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if GATED:
        return place // 2 + (place % 2) * COLUMNS, place < ROWS
    return place, place < ROWS


@jit
def _x(x, order, k, inside, ORDER: tl.constexpr):
    """Return x[k] as float32."""
    if ORDER:
        k = tl.load(order + k, mask=inside, other=0)
    return tl.load(x + k, mask=inside, other=0.0).to(tl.float32)


@jit
def _write(out, bias, y, COLUMNS: tl.constexpr, TILE: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
           FACTOR: tl.constexpr, row, valid):  # fmt: skip
    if BIAS:
        y += tl.load(bias + row, mask=valid, other=0.0)
    if GATED:
        gate, up = tl.split(tl.reshape(y, (TILE // 2, 2)))
        column = tl.program_id(0) * (TILE // 2) + tl.arange(0, TILE // 2)
        y = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out + column, (y * FACTOR).to(out.dtype.element_ty), mask=column < COLUMNS)
    else:
        tl.store(out + row, (y * FACTOR).to(out.dtype.element_ty), mask=valid)


@jit
def gemv(
    x, weight, scales, zeros, order, bias, out,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr,
    DENSE: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr, ZERO: tl.constexpr, WORDS: tl.constexpr,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, ORDER: tl.constexpr, GATED: tl.constexpr, FACTOR: tl.constexpr,
    SHARED: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row, valid = _rows(ROWS, COLUMNS, TILE, GATED)
    row = row.to(tl.int64)
    if DENSE:
        sums = tl.zeros((TILE, STEP), tl.float32)
        for start in range(0, WIDTH, STEP):
            k = start + tl.arange(0, STEP)
            inside = k < WIDTH
            w = tl.load(
                weight + row[:, None] * WIDTH + k[None, :],
                mask=valid[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first",
            )  # fmt: skip
            sums += w.to(tl.float32) * _x(x, order, k, inside, ORDER)[None, :]
        y = tl.sum(sums, axis=1)
    else:
        SPAN: tl.constexpr = 16 * PLANES  # inputs of a chunk
        EXTENT: tl.constexpr = GROUP if GROUP else WIDTH
        QUADS: tl.constexpr = STEP // 4
        total = tl.zeros((TILE, QUADS), tl.float32)
        for start in range(0, WORDS, STEP):
            word = start + tl.arange(0, STEP)
            there = word < WORDS
            w = tl.load(
                weight + row[:, None] * WORDS + word[None, :],
                mask=valid[:, None] & there[None, :], other=0, eviction_policy="evict_first",
            )  # fmt: skip
            first = word // 16 * SPAN + word % 16  # the input of plane 0
            quad = start // 4 + tl.arange(0, QUADS)
            for shared in tl.static_range(0, PLANES, SHARED):
                products = tl.zeros((TILE, STEP), tl.float32)
                inputs = tl.zeros((STEP,), tl.float32)  # what the code of zero multiplies
                for plane in tl.static_range(shared, shared + SHARED):
                    k = first + plane * 16
                    values = _x(x, order, k, there & (k < WIDTH), ORDER)
                    products += bits_of(w, plane, BITS) * raised(values, plane, BITS)[None, :]
                    inputs += values
                dots = tl.sum(tl.reshape(products, (TILE, QUADS, 4)), axis=2)
                inputs_sum = tl.sum(tl.reshape(inputs * PRODUCT, (QUADS, 4)), axis=1)[None, :]
                if GROUP:
                    group = (quad // 4 * SPAN + shared * 16) // EXTENT
                    wanted = valid[:, None] & (quad < WORDS // 4)[None, :] & (group < WIDTH // EXTENT)[None, :]
                    place = row[:, None] * (WIDTH // EXTENT) + group[None, :]
                    if ZEROS:
                        dots -= tl.load(zeros + place, mask=wanted, other=0).to(tl.float32) * inputs_sum
                    else:
                        dots -= ZERO * inputs_sum
                    dots *= tl.load(scales + place, mask=wanted, other=0.0).to(tl.float32)
                elif ZEROS:
                    dots -= tl.load(zeros + row, mask=valid, other=0).to(tl.float32)[:, None] * inputs_sum
                else:
                    dots -= ZERO * inputs_sum
                total += dots
        y = tl.sum(total, axis=1) * (1.0 / PRODUCT)
        if GROUP == 0:
            y *= tl.load(scales + row, mask=valid, other=0.0).to(tl.float32)
    _write(out, bias, y, COLUMNS, TILE, GATED, BIAS, FACTOR, row, valid)
