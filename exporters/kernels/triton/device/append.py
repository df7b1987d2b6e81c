"""Code of `append.py`: one warp for each row and head."""

from arkinfer.exporters.kernels.triton.device.language import jit, tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it to |x| < 2^22 rounds to the nearest integer, half to even


@jit
def _store(place, scale_place, first, second, half, inside, DIM: tl.constexpr, INT8: tl.constexpr):
    """Store a row of a cache: its two halves, and in int8 its scale."""
    if INT8:
        largest = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0))
        scale = tl.div_rn(largest, 127.0)
        divisor = tl.where(scale == 0.0, 1.0, scale)
        first = tl.div_rn(first, divisor) + ROUND - ROUND
        second = tl.div_rn(second, divisor) + ROUND - ROUND
        first = tl.minimum(tl.maximum(first, -127.0), 127.0)
        second = tl.minimum(tl.maximum(second, -127.0), 127.0)
        tl.store(scale_place, scale)
    tl.store(place + half, first.to(place.dtype.element_ty), mask=inside)
    tl.store(place + DIM // 2 + half, second.to(place.dtype.element_ty), mask=inside)


@jit
def rope_append(
    qkv, cos, sin, control, q_norm, k_norm, q, q_nope, k, v, k_scale, v_scale, nope,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    INT8: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, NOPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1)
    position = tl.load(control) + row
    half = tl.arange(0, HALF)
    inside = half < DIM // 2
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * DIM + half
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    if head >= HEADS + KV_HEADS:  # a value: neither normalised nor rotated
        index = position * KV_HEADS + head - HEADS - KV_HEADS
        if INT8:
            _store(v + index * DIM, v_scale + index, first, second, half, inside, DIM, INT8)
        else:
            _store(v + index * DIM, v, first, second, half, inside, DIM, INT8)
    else:
        if NORM:
            mean = (tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / DIM
            factor = tl.rsqrt(mean + EPS)
            weight = k_norm + half
            if head < HEADS:
                weight = q_norm + half
            first = first * factor * tl.load(weight, mask=inside, other=0.0)
            second = second * factor * tl.load(weight + DIM // 2, mask=inside, other=0.0)
        c = tl.load(cos + position * (DIM // 2) + half, mask=inside, other=0.0)
        s = tl.load(sin + position * (DIM // 2) + half, mask=inside, other=0.0)
        rotated = first * c - second * s
        turned = second * c + first * s
        index = position * KV_HEADS + head - HEADS
        if head < HEADS:
            place = (row * HEADS + head) * DIM
            _store(q + place, q, rotated, turned, half, inside, DIM, False)
            if NOPE:
                _store(q_nope + place, q_nope, first, second, half, inside, DIM, False)
        else:
            if NOPE:
                _store(nope + index * DIM, nope, first, second, half, inside, DIM, False)
            if INT8:
                _store(k + index * DIM, k_scale + index, rotated, turned, half, inside, DIM, INT8)
            else:
                _store(k + index * DIM, k, rotated, turned, half, inside, DIM, INT8)
