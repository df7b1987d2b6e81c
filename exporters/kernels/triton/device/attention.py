"""Code of `attention.py`: flash attention over tiles of cached keys, tile rows being query heads of one kv head."""

from arkinfer.exporters.kernels.triton.device.language import jit, tl

LOG2E = tl.constexpr(1.4426950408889634)


@jit
def _half(codes):
    """Return int8 codes as float16: with 1024's exponent above it, code + 128 is 1152 + code."""
    return ((codes.to(tl.int16) + 128) | 0x6400).to(tl.float16, bitcast=True) - 1152.0


@jit
def _attend(
    q, k, v, k_scale, v_scale, head, key, seen, inside, highest, total, mixed,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SCALE: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into account. q (rows, dim); key (keys,); seen (rows, keys); state in base 2."""
    d = tl.arange(0, PADDED_DIM)
    row = key * KV_HEADS + head
    place = row[:, None] * DIM + d[None, :]
    there = inside[:, None] if DIM == PADDED_DIM else inside[:, None] & (d < DIM)[None, :]
    keys = tl.load(k + place, mask=there, other=0)
    if INT8:
        keys = _half(keys)
    logits = tl.dot(q, tl.trans(keys)) * (SCALE * LOG2E)
    if INT8:
        logits *= tl.load(k_scale + row, mask=inside, other=0.0)[None, :]
    logits = tl.where(seen, logits, -float("inf"))
    above = tl.maximum(highest, tl.max(logits, axis=1))
    finite = tl.where(above == -float("inf"), 0.0, above)  # a row that sees nothing yet
    weights = tl.exp2(logits - finite[:, None])
    shrink = tl.exp2(highest - finite)
    total = total * shrink + tl.sum(weights, axis=1)
    values = tl.load(v + place, mask=there, other=0)
    if INT8:
        scale = tl.load(v_scale + row, mask=inside, other=0.0)
        values = (_half(values).to(tl.float32) * scale[:, None]).to(tl.float16)
    mixed = tl.dot(weights.to(tl.float16), values, mixed * shrink[:, None])
    return above, total, mixed


@jit
def decode(
    q, k, v, k_scale, v_scale, control, blocks, counts, partial, lse,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    SCALE: tl.constexpr, INT8: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, BUDGET: tl.constexpr,
    GROUP_TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    split = tl.program_id(1)
    position = tl.load(control)
    blocks_seen = position // BLOCK + 1
    count = blocks_seen
    if BUDGET:
        chosen = tl.load(counts + head)
        sparse = chosen >= 0
        count = tl.where(sparse, chosen, blocks_seen)
    each = (count + SPLITS - 1) // SPLITS
    g = tl.arange(0, GROUP_TILE)
    d = tl.arange(0, PADDED_DIM)
    real = (g < GROUP)[:, None] & (d < DIM)[None, :]
    queries = tl.load(q + (head * GROUP + g)[:, None] * DIM + d[None, :], mask=real, other=0.0)
    highest = tl.full((GROUP_TILE,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP_TILE,), tl.float32)
    mixed = tl.zeros((GROUP_TILE, PADDED_DIM), tl.float32)
    for index in range(split * each, tl.minimum((split + 1) * each, count)):
        block = index
        if BUDGET:
            block = tl.where(sparse, tl.load(blocks + head * BUDGET + index, mask=index < BUDGET, other=0), index)
        key = block * BLOCK + tl.arange(0, BLOCK)
        inside = key <= position
        highest, total, mixed = _attend(
            queries, k, v, k_scale, v_scale, head, key, inside[None, :], inside, highest, total, mixed,
            KV_HEADS, DIM, PADDED_DIM, SCALE, INT8,
        )  # fmt: skip
    place = (head * SPLITS + split) * GROUP + g
    shares = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(partial + place[:, None] * DIM + d[None, :], shares, mask=real)
    tl.store(lse + place, (highest + tl.log2(total)) / LOG2E, mask=g < GROUP)  # -inf where it had no keys


@jit
def combine(
    partial, lse, out,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    SCALE: tl.constexpr, INT8: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SPLITS_TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    s = tl.arange(0, SPLITS_TILE)
    d = tl.arange(0, PADDED_DIM)
    place = (head // GROUP * SPLITS + s) * GROUP + head % GROUP
    sums = tl.load(lse + place, mask=s < SPLITS, other=-float("inf"))
    weights = tl.exp(sums - tl.max(sums, axis=0))
    real = (s < SPLITS)[:, None] & (d < DIM)[None, :]
    shares = tl.load(partial + place[:, None] * DIM + d[None, :], mask=real, other=0.0)
    mixed = tl.sum(shares * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out + head * DIM + d, mixed.to(tl.float16), mask=d < DIM)


@jit
def prefill(
    q, k, v, k_scale, v_scale, control, out, count,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    SCALE: tl.constexpr, INT8: tl.constexpr, BLOCK: tl.constexpr, BUDGET: tl.constexpr, TOKENS: tl.constexpr,
    GROUP_TILE: tl.constexpr,
):  # fmt: skip
    # Later tokens have more keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(control)
    stop = count
    if BUDGET:  # rows from here on are sparse, and not this kernel's
        stop = tl.minimum(count, tl.maximum(tl.load(control + 1) - 1 - start, 0))
    first = tile * TOKENS
    if first >= stop:
        return
    row = tl.arange(0, TOKENS * GROUP_TILE)
    token = first + row // GROUP_TILE
    g = row % GROUP_TILE
    d = tl.arange(0, PADDED_DIM)
    present = (token < stop) & (g < GROUP)
    real = present[:, None] & (d < DIM)[None, :]
    place = (token * (KV_HEADS * GROUP) + head * GROUP + g)[:, None] * DIM + d[None, :]
    queries = tl.load(q + place, mask=real, other=0.0)
    position = start + token
    highest = tl.full((TOKENS * GROUP_TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TOKENS * GROUP_TILE,), tl.float32)
    mixed = tl.zeros((TOKENS * GROUP_TILE, PADDED_DIM), tl.float32)
    last = start + tl.minimum(first + TOKENS, stop)  # keys that some row of the tile sees
    for begin in range(0, last, BLOCK):
        key = begin + tl.arange(0, BLOCK)
        inside = key < last
        highest, total, mixed = _attend(
            queries, k, v, k_scale, v_scale, head, key, key[None, :] <= position[:, None], inside,
            highest, total, mixed, KV_HEADS, DIM, PADDED_DIM, SCALE, INT8,
        )  # fmt: skip
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + place, mixed.to(tl.float16), mask=real)


@jit
def sparse(
    q, k, v, k_scale, v_scale, control, blocks, counts, out,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    SCALE: tl.constexpr, INT8: tl.constexpr, BLOCK: tl.constexpr, BUDGET: tl.constexpr, GROUP_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1)
    chosen = row * KV_HEADS + head
    count = tl.load(counts + chosen)
    if count < 0:  # a dense row: not this kernel's
        return
    position = tl.load(control) + row
    g = tl.arange(0, GROUP_TILE)
    d = tl.arange(0, PADDED_DIM)
    real = (g < GROUP)[:, None] & (d < DIM)[None, :]
    place = (chosen * GROUP + g)[:, None] * DIM + d[None, :]
    queries = tl.load(q + place, mask=real, other=0.0)
    highest = tl.full((GROUP_TILE,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP_TILE,), tl.float32)
    mixed = tl.zeros((GROUP_TILE, PADDED_DIM), tl.float32)
    for index in range(count):
        key = tl.load(blocks + chosen * BUDGET + index) * BLOCK + tl.arange(0, BLOCK)
        inside = key <= position
        highest, total, mixed = _attend(
            queries, k, v, k_scale, v_scale, head, key, inside[None, :], inside, highest, total, mixed,
            KV_HEADS, DIM, PADDED_DIM, SCALE, INT8,
        )  # fmt: skip
    tl.store(out + place, (mixed / tl.where(total == 0.0, 1.0, total)[:, None]).to(tl.float16), mask=real)
