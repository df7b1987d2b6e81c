"""Code of `sampling.py`."""

from arkinfer.exporters.kernels.triton.device.language import jit, tl


@jit
def argmax_partial(logits, values, ids, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.program_id(0)
    place = part * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(logits + place, mask=place < VOCAB, other=-float("inf"))
    largest = tl.max(found, axis=0)
    tl.store(values + part, largest)
    # The lowest id among equals; places past the vocabulary hold -inf and the highest ids.
    tl.store(ids + part, tl.min(tl.where(found == largest, place, VOCAB), axis=0))


@jit
def argmax(values, ids, control, tokens, token, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.arange(0, BLOCK)
    inside = part < PARTS
    found = tl.load(values + part, mask=inside, other=-float("inf"))
    chosen = tl.load(ids + part, mask=inside, other=2147483647)
    best = tl.min(tl.where(found == tl.max(found, axis=0), chosen, 2147483647), axis=0)
    tl.store(token, best)
    tl.store(tokens, best)
    tl.store(control, tl.load(control) + 1)
