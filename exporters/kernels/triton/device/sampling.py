"""Code of `sampling.py`."""

from arkinfer.exporters.kernels.triton.device.language import jit, tl


@jit
def argmax_partial(logits, values, ids, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.program_id(0)
    place = part * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(logits + place, mask=place < VOCAB, other=-float("inf"))
    broken = tl.max((found != found).to(tl.int32), axis=0)
    found = tl.where(found != found, -float("inf"), found)
    largest = tl.max(found, axis=0)
    tl.store(values + part, tl.where(broken > 0, float("nan"), largest))
    # The lowest id among equals; places past the vocabulary hold -inf and the highest ids.
    lowest = tl.min(tl.where(found == largest, place, VOCAB), axis=0)
    tl.store(ids + part, tl.where(broken > 0, part * BLOCK, lowest))


@jit
def _sound(found):
    """Whether the largest values of the parts are numbers, and one of them finite."""
    broken = tl.max(((found != found) | (found == float("inf"))).to(tl.int32), axis=0)
    return (broken == 0) & (tl.max(found, axis=0) > -float("inf"))


@jit
def _finish(chosen, position, control, tokens, token):
    """Say what was chosen, put it where the next step reads it, and move on."""
    tl.store(token, chosen)
    tl.store(tokens, tl.maximum(chosen, 0))
    tl.store(control, position + 1)


@jit
def argmax(values, ids, control, tokens, token, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.arange(0, BLOCK)
    inside = part < PARTS
    found = tl.load(values + part, mask=inside, other=-float("inf"))
    chosen = tl.load(ids + part, mask=inside, other=2147483647)
    best = tl.min(tl.where(found == tl.max(found, axis=0), chosen, 2147483647), axis=0)
    _finish(tl.where(_sound(found), best, -1), tl.load(control), control, tokens, token)


DIGITS = tl.constexpr(32)
HALF = tl.constexpr(6)  # steps that count tokens; as many then add up weights
KEPT = tl.constexpr(12)  # places in the state
TOTAL = tl.constexpr(13)
BOUND = tl.constexpr(14)
FARTHEST = tl.constexpr(0x43000000)  # the bits of 128
NEAREST = tl.constexpr(0x03000001)


@jit
def _largest(values, PARTS: tl.constexpr, PARTS_TILE: tl.constexpr):
    part = tl.arange(0, PARTS_TILE)
    return tl.max(tl.load(values + part, mask=part < PARTS, other=-float("inf")), axis=0)


@jit
def _weights(logits, control, best, part, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Return ids of a part, their weights and ranks; places past the vocabulary weigh nothing and rank -1."""
    place = part * BLOCK + tl.arange(0, BLOCK)
    inside = place < VOCAB
    inverse = tl.load(control + 3).to(tl.float32, bitcast=True)
    distance = (best - tl.load(logits + place, mask=inside, other=0.0)) * inverse
    ranks = -(tl.maximum(tl.minimum(distance, 128.0).to(tl.int32, bitcast=True), NEAREST) - FARTHEST)
    return place, tl.where(inside, tl.exp(-distance), 0.0), tl.where(inside, ranks, -1)


@jit
def _advance(control, state, partial, step, VOCAB: tl.constexpr, PARTS: tl.constexpr, PARTS_TILE: tl.constexpr):
    """Return the bound with which ``step`` starts and the bound of top-k, from what the step before it found.

    Every block computes the same; the first one notes it for later steps.
    """
    before = step - 1
    p = tl.arange(0, PARTS_TILE)
    d = tl.arange(0, DIGITS)
    place = (before % 2 * PARTS + p)[:, None] * DIGITS + d[None, :]
    sums = tl.sum(tl.load(partial + place, mask=(p < PARTS)[:, None], other=0.0), axis=0)
    total = tl.load(state + TOTAL).to(tl.float32, bitcast=True)
    total = tl.where(before == HALF, tl.sum(tl.where(d == 0, sums, 0.0), axis=0), total)
    top_k = tl.load(control + 4)
    count = tl.where(top_k > 0, top_k, VOCAB).to(tl.float32)
    limit = tl.where(before >= HALF, tl.load(control + 5).to(tl.float32, bitcast=True) * total, count)
    digit = tl.sum(((sums >= limit) & (d > 0)).to(tl.int32), axis=0)
    start = tl.where(before > 0, tl.load(state + before), 0)
    bound = start + (digit << (5 * (HALF - 1 - before % HALF)))
    kept = tl.where(step == HALF, bound, tl.load(state + KEPT))
    if tl.program_id(0) == 0:
        if step == HALF:
            tl.store(state + KEPT, kept)
        if before == HALF:
            tl.store(state + TOTAL, total.to(tl.int32, bitcast=True))
    return tl.where(step == HALF, 0, bound), kept


@jit
def sample_narrow(
    logits, values, control, state, partial, step,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, PARTS_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(control + 3) == 0:
        return
    bound = 0
    kept = 0
    if step > 0:
        bound, kept = _advance(control, state, partial, step, VOCAB, PARTS, PARTS_TILE)
    part = tl.program_id(0)
    if part == 0:
        tl.store(state + step, bound)
    _, weights, ranks = _weights(logits, control, _largest(values, PARTS, PARTS_TILE), part, VOCAB, BLOCK)
    amount = tl.where(ranks >= 0, 1.0, 0.0)
    if step >= HALF:
        amount = tl.where(ranks >= kept, weights, 0.0)
    shift = 5 * (HALF - 1 - step % HALF)
    for digit in tl.static_range(DIGITS):
        reached = tl.sum(tl.where(ranks >= bound + (digit << shift), amount, 0.0), axis=0)
        tl.store(partial + (step % 2 * PARTS + part) * DIGITS + digit, reached)


@jit
def sample_mass(
    logits, values, control, state, partial, above, equal,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, PARTS_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(control + 3) == 0:
        return
    bound, kept = _advance(control, state, partial, 2 * HALF, VOCAB, PARTS, PARTS_TILE)
    bound = tl.where(tl.load(control + 5).to(tl.float32, bitcast=True) >= 1.0, -1, bound)
    part = tl.program_id(0)
    if part == 0:
        tl.store(state + BOUND, bound)
    _, weights, ranks = _weights(logits, control, _largest(values, PARTS, PARTS_TILE), part, VOCAB, BLOCK)
    counted = (ranks >= kept) & (ranks >= 0)
    tl.store(above + part, tl.sum(tl.where(counted & (ranks > bound), weights, 0.0), axis=0))
    tl.store(equal + part, tl.sum(tl.where(counted & (ranks == bound), 1.0, 0.0), axis=0))


@jit
def sample(
    logits, values, ids, state, above, equal, random, control, tokens, token,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, PARTS_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p = tl.arange(0, PARTS_TILE)
    inside = p < PARTS
    position = tl.load(control)
    best = _largest(values, PARTS, PARTS_TILE)
    found = tl.load(values + p, mask=inside, other=-float("inf"))
    if (tl.load(control + 3) == 0) | (tl.load(control + 4) == 1):
        chosen = tl.load(ids + p, mask=inside, other=2147483647)
        chosen = tl.min(tl.where(found == best, chosen, 2147483647), axis=0)
    else:
        kept = tl.load(state + KEPT)
        bound = tl.load(state + BOUND)
        distance = -(tl.maximum(bound, 0) - FARTHEST)
        weight = tl.exp(-distance.to(tl.float32, bitcast=True))  # of those at the bound
        masses = tl.load(above + p, mask=inside, other=0.0)
        equals = tl.load(equal + p, mask=inside, other=0.0)
        total = tl.load(state + TOTAL).to(tl.float32, bitcast=True)
        missing = tl.load(control + 5).to(tl.float32, bitcast=True) * total - tl.sum(masses, axis=0)
        room = tl.where(weight > 0.0, tl.ceil(missing / tl.where(weight > 0.0, weight, 1.0)), VOCAB * 1.0)
        room = tl.maximum(room, 1.0)
        # The equals that a part has room for: lower ids first.
        room_of_part = room - (tl.cumsum(equals, axis=0) - equals)
        masses += tl.minimum(tl.maximum(room_of_part, 0.0), equals) * weight
        passed = tl.cumsum(masses, axis=0)
        target = tl.load(random + position) * tl.sum(masses, axis=0)
        # The first part, of those that weigh anything, whose running sum passes the target; the last one if rounding
        # ate it. Running sums in parallel are not monotone, and differ from the sum that is taken off below.
        last = tl.max(tl.where(masses > 0.0, p, 0), axis=0)
        part = tl.min(tl.where((passed > target) & (masses > 0.0), p, last), axis=0)
        rest = target - tl.sum(tl.where(p < part, masses, 0.0), axis=0)
        left = tl.sum(tl.where(p == part, room_of_part, 0.0), axis=0)
        place, weights, ranks = _weights(logits, control, best, part, VOCAB, BLOCK)
        counted = (ranks >= kept) & (ranks >= 0)
        same = (counted & (ranks == bound)).to(tl.int32)
        fits = (same != 0) & (tl.cumsum(same, axis=0).to(tl.float32) <= left)
        taken = (counted & (ranks > bound)) | fits
        weights = tl.where(taken, weights, 0.0)
        sums = tl.cumsum(weights, axis=0)
        final = tl.max(tl.where(weights > 0.0, place, 0), axis=0)
        chosen = tl.min(tl.where((sums > rest) & (weights > 0.0), place, final), axis=0)
    _finish(tl.where(_sound(found), chosen, -1), position, control, tokens, token)
