"""Code of `embedding.py`."""

from arkinfer.exporters.kernels.triton.device.language import jit, tl


@jit
def embedding(
    tokens, weight, scales, zeros, out,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, DENSE: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    ZERO: tl.constexpr, WORDS: tl.constexpr, ZEROS: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    token = tl.load(tokens + row).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < WIDTH
    if DENSE:
        values = tl.load(weight + token * WIDTH + k, mask=inside, other=0.0).to(tl.float32)
    else:
        plane = k // 16 % PLANES
        word = k // (16 * PLANES) * 16 + k % 16
        codes = tl.load(weight + token * WORDS + word, mask=inside, other=0) >> (plane * BITS)
        values = (codes & ((1 << BITS) - 1)).to(tl.float32)
        place = token * (WIDTH // GROUP) + k // GROUP
        if ZEROS:
            values -= tl.load(zeros + place, mask=inside, other=0).to(tl.float32)
        else:
            values -= ZERO
        values *= tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + k, values * SCALE, mask=inside)
