"""Ask the torch reference for every needle of a long haystack.

    python -m examples.needle.retrieve --length 131072 --attention sparse --kv float32

Hides all 32 needles, evenly spread, reads the haystack once and asks for each; prints the share of right answers.
"""

from __future__ import annotations

import argparse
import random
import time

import torch

from arkinfer.checkpoint import open_checkpoint
from arkinfer.models import create
from arkinfer.models.decoder import CausalLM
from arkinfer.ops.attention import LayerCache, new_caches
from arkinfer.quant.packed import dense
from examples.needle import make


def open_model(attention: str) -> CausalLM:
    """Return the bundled model in float32, its attention "dense" or "sparse" (from dense_len tokens on)."""
    checkpoint = open_checkpoint("needle")
    with torch.device("meta"):
        model = create(checkpoint.config)
    model.load_state_dict({name: dense(stored).float() for name, stored in checkpoint.weights.items()}, assign=True)
    if attention == "dense":
        for layer in model.model.layers:
            layer.self_attn.sparse = None
    return model.eval()


def haystack(length: int, seed: int = 0) -> tuple[list[int], dict[int, int]]:
    """Return ``length`` tokens that hide every key once, evenly spread, and the value token of each key token."""
    draw = random.Random(seed)
    words = make.vocabulary()
    filler = range(words.index(make.FILLER[0]), len(words))
    tokens = [1] + [draw.choice(filler) for _ in range(length - 1)]
    keys, values = ([words.index(word) for word in names] for names in (make.KEYS, make.VALUES))
    draw.shuffle(keys)
    answers = {key: draw.choice(values) for key in keys}
    for index, key in enumerate(keys):
        place = 1 + index * (length - 4) // (len(keys) - 1)
        tokens[place : place + 2] = [key, answers[key]]
    return tokens, answers


def retrieve(model: CausalLM, length: int, dtype: torch.dtype = torch.float32, chunk: int = 4096) -> float:
    """Return the share of needles that greedy decoding answers exactly, value and end of text."""
    tokens, answers = haystack(length)
    sequence = torch.tensor(tokens)
    with torch.no_grad():
        caches = new_caches(model.config, length + 4, dtype)
        for start in range(0, length, chunk):
            part = sequence[start : start + chunk]
            model(part, torch.arange(start, start + len(part)), caches)
        right = sum(_answer(model, key, length, caches) == [value, 2] for key, value in answers.items())
    return right / len(answers)


def _answer(model: CausalLM, key: int, position: int, caches: list[LayerCache]) -> list[int]:
    # Every question overwrites the one before it: the haystack in the cache stays as it is.
    tokens = [key]
    for offset in range(2):
        hidden = model(torch.tensor(tokens[-1:]), torch.tensor([position + offset]), caches)
        tokens.append(int(model.head(hidden).argmax()))
    return tokens[1:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Find needles with the torch reference.")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--attention", choices=("dense", "sparse"), default="sparse")
    parser.add_argument("--kv", choices=("float32", "float16", "bfloat16", "int8"), default="float32")
    options = parser.parse_args()
    begin = time.perf_counter()
    share = retrieve(open_model(options.attention), options.length, getattr(torch, options.kv))
    seconds = time.perf_counter() - begin
    print(f"{options.length} tokens, {options.attention}, {options.kv} cache: {share:.1%} in {seconds:.0f} s")
