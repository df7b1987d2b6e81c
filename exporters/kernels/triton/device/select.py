"""Code of `select.py`. Tile rows are query heads of one kv head, of several tokens."""

from arkinfer.exporters.kernels.triton.device.language import jit, tl

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)
INFINITE = tl.constexpr(0x7F800000)  # the bits of infinity: above those of every score


@jit
def _visible(position, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Return how many kernels end at or before ``position``."""
    return tl.maximum(position + 1 - (SIZE - STRIDE), 0) // STRIDE


@jit
def _rows(control, count, TOKENS: tl.constexpr, GROUP_TILE: tl.constexpr):
    """Return token, its position, and whether it is there and sparse, for each row of the tile."""
    start = tl.load(control)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS * GROUP_TILE) // GROUP_TILE
    position = start + token
    return token, position, (token < count) & (position + 1 >= tl.load(control + 1))


@jit
def _queries(
    q, token, present, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, TOKENS: tl.constexpr,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """Return queries (rows, dim), and for each row its head's place among all and whether it is one."""
    g = tl.arange(0, TOKENS * GROUP_TILE) % GROUP_TILE
    place = token * (KV_HEADS * GROUP) + tl.program_id(1) * GROUP + g
    real = present & (g < GROUP)
    d = tl.arange(0, PADDED_DIM)
    loaded = tl.load(q + place[:, None] * DIM + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    return loaded, place, real


@jit
def _logits(
    queries, keys, kernel, inside, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """Return queries . keys[kernel] in units of log 2, (rows, kernels)."""
    d = tl.arange(0, PADDED_DIM)
    place = (kernel * KV_HEADS + tl.program_id(1))[:, None] * DIM + d[None, :]
    loaded = tl.load(keys + place, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
    return tl.dot(queries, tl.trans(loaded)) * (SCALE * LOG2E)


@jit
def lse(
    q, keys, control, lse, count,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, SCALE: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    token, position, present = _rows(control, count, TOKENS, GROUP_TILE)
    queries, place, real = _queries(q, token, present, KV_HEADS, GROUP, GROUP_TILE, TOKENS, DIM, PADDED_DIM)
    visible = _visible(position, SIZE, STRIDE)
    start = tl.load(control)
    every = _visible(start + count - 1, SIZE, STRIDE)
    each = ((every + KEYS - 1) // KEYS + SPLITS - 1) // SPLITS * KEYS
    split = tl.program_id(2)
    # What the tile's last row sees; nothing where that row is dense.
    last = start + tl.minimum((tl.program_id(0) + 1) * TOKENS, count) - 1
    stop = tl.where(last + 1 >= tl.load(control + 1), _visible(last, SIZE, STRIDE), 0)
    highest = tl.full((TOKENS * GROUP_TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TOKENS * GROUP_TILE,), tl.float32)
    for begin in range(split * each, tl.minimum((split + 1) * each, stop), KEYS):
        kernel = begin + tl.arange(0, KEYS)
        logits = _logits(queries, keys, kernel, kernel < stop, KV_HEADS, DIM, PADDED_DIM, SCALE)
        logits = tl.where(kernel[None, :] < visible[:, None], logits, -float("inf"))
        above = tl.maximum(highest, tl.max(logits, axis=1))
        finite = tl.where(above == -float("inf"), 0.0, above)
        total = total * tl.exp2(highest - finite) + tl.sum(tl.exp2(logits - finite[:, None]), axis=1)
        highest = above
    tl.store(lse + place * SPLITS + split, (highest + tl.log2(total)) / LOG2E, mask=real)


@jit
def scores(
    q, fine, control, lse, scores, count,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, SCALE: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, HELD: tl.constexpr, BLOCKS: tl.constexpr, PER: tl.constexpr,
    SPLITS_TILE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(2) * BLOCKS
    start = tl.load(control)
    last = start + tl.minimum((tl.program_id(0) + 1) * TOKENS, count) - 1
    if (first * BLOCK > last) | (last + 1 < tl.load(control + 1)):
        return
    token, position, present = _rows(control, count, TOKENS, GROUP_TILE)
    queries, place, real = _queries(q, token, present, KV_HEADS, GROUP, GROUP_TILE, TOKENS, DIM, PADDED_DIM)
    s = tl.arange(0, SPLITS_TILE)
    parts = tl.load(
        lse + place[:, None] * SPLITS + s[None, :], mask=real[:, None] & (s < SPLITS)[None, :], other=-float("inf")
    ) * LOG2E  # fmt: skip
    highest = tl.max(parts, axis=1)
    finite = tl.where(highest == -float("inf"), 0.0, highest)
    normaliser = finite + tl.log2(tl.sum(tl.exp2(parts - finite[:, None]), axis=1))  # -inf where nothing is visible
    kernel = first * PER + tl.arange(0, BLOCKS * PER)
    there = kernel < _visible(last, SIZE, STRIDE)
    logits = _logits(queries, fine, kernel, there, KV_HEADS, DIM, PADDED_DIM, SCALE)
    seen = kernel[None, :] < _visible(position, SIZE, STRIDE)[:, None]
    counted = seen & (real & (normaliser != -float("inf")))[:, None]
    weights = tl.where(counted, tl.exp2(logits - tl.where(counted, normaliser[:, None], 0.0)), 0.0)
    # The sum over the heads of the group, then the largest of a block's kernels and its last one: the kernel that the
    # next block shares. Both are taken from the same sums, so that equal scores are equal in every bit.
    sums = tl.sum(tl.reshape(weights, (TOKENS, GROUP_TILE, BLOCKS * PER)), axis=1)
    sums = tl.reshape(tl.minimum(sums, LARGEST), (TOKENS, BLOCKS, PER))
    own = tl.max(sums, axis=2)
    shared = tl.sum(tl.where(tl.arange(0, PER)[None, None, :] == PER - 1, sums, 0.0), axis=2)
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = start + row
    block = first + tl.arange(0, BLOCKS)
    wanted = ((row < count) & (at + 1 >= tl.load(control + 1)))[:, None]
    wanted = wanted & (block[None, :] * BLOCK <= at[:, None]) & (block < HELD)[None, :]
    target = scores + ((row * KV_HEADS + tl.program_id(1)) * (2 * HELD))[:, None] + block[None, :]
    tl.store(target, own, mask=wanted)
    tl.store(target + HELD, shared, mask=wanted)


@jit
def blocks(
    scores, control, blocks, counts,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr, INIT: tl.constexpr,
    NEAR: tl.constexpr, BUDGET: tl.constexpr, BUDGET_TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = row * KV_HEADS + tl.program_id(1)
    position = tl.load(control) + row
    if position + 1 < tl.load(control + 1):
        tl.store(counts + place, -1)
        return
    own = position // BLOCK
    b = tl.arange(0, TILE)
    seen = b <= own
    source = scores + place * (2 * HELD)
    score = tl.load(source + b, mask=seen, other=0.0)
    before = tl.load(source + HELD + b - 1, mask=seen & (b > 0), other=0.0)
    # Scores are not negative, and the bits of such floats order like integers.
    bits = tl.maximum(score, before).to(tl.int32, bitcast=True)
    bits = tl.where((b < INIT) | (b >= own - NEAR), INFINITE, bits)
    bits = tl.where(seen, bits, -1)
    # The largest bound that at least BUDGET blocks reach, bit by bit; 0 where there are not so many.
    bound = 0
    for bit in tl.static_range(30, -1, -1):
        tried = bound | (1 << bit)
        bound = tl.where(tl.sum((bits >= tried).to(tl.int32), axis=0) >= BUDGET, tried, bound)
    above = (bits > bound).to(tl.int32)
    equal = (bits == bound).to(tl.int32)
    # Of those that equal the bound, the first ones fill up the budget.
    left = BUDGET - tl.sum(above, axis=0)
    chosen = above | (equal & (tl.cumsum(equal, axis=0) <= left).to(tl.int32))
    total = tl.sum(chosen, axis=0)
    target = blocks + place * BUDGET
    index = tl.cumsum(chosen, axis=0) - 1
    tl.store(target + index, b, mask=chosen != 0)
    unused = tl.arange(0, BUDGET_TILE)
    tl.store(target + unused, -1, mask=(unused >= total) & (unused < BUDGET))
    tl.store(counts + place, total)
