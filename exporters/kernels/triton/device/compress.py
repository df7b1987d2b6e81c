"""Code of `compress.py`: one block for each kernel that may be completed."""

from arkinfer.exporters.kernels.triton.device.language import jit, tl


@jit
def _complete(length, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Return how many kernels ``length`` tokens complete."""
    return tl.maximum(length - (SIZE - STRIDE), 0) // STRIDE


@jit
def _mean(
    k, k_scale, out, start, count, head, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    kernel = _complete(start, SIZE, STRIDE) + tl.program_id(0)
    if kernel < _complete(start + count, SIZE, STRIDE):
        d = tl.arange(0, PADDED_DIM)
        sums = tl.zeros((PADDED_DIM,), tl.float32)
        for begin in range(0, SIZE, TILE):
            t = begin + tl.arange(0, TILE)
            place = (kernel * STRIDE + t) * KV_HEADS + head
            inside = t < SIZE
            keys = tl.load(
                k + place[:, None] * DIM + d[None, :], mask=inside[:, None] & (d < DIM)[None, :], other=0
            ).to(tl.float32)
            if INT8:
                keys *= tl.load(k_scale + place, mask=inside, other=0.0)[:, None]
            sums += tl.sum(keys, axis=0)
        tl.store(out + (kernel * KV_HEADS + head) * DIM + d, (sums / SIZE).to(tl.float16), mask=d < DIM)


@jit
def compress(
    k, k_scale, control, fine, coarse, count,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    TILE: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    start = tl.load(control)
    head = tl.program_id(1)
    if tl.program_id(2) == 0:
        _mean(k, k_scale, fine, start, count, head, KV_HEADS, DIM, PADDED_DIM, SIZE, STRIDE, TILE, INT8)
    else:
        _mean(k, k_scale, coarse, start, count, head, KV_HEADS, DIM, PADDED_DIM, 4 * SIZE, 4 * STRIDE, TILE, INT8)
