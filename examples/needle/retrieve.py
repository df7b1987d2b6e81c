"""Ask the torch reference, or an artifact, for every needle of a long haystack.

    python -m examples.needle.retrieve --length 131072 --attention sparse --kv float32
    python -m examples.needle.retrieve --length 131072 --artifact needle.ark

Hides all 32 needles, evenly spread, reads the haystack once and asks for each; prints the share of right answers.
"""

from __future__ import annotations

import argparse
import random
import time

import torch

from arkinfer import exporters
from arkinfer.artifact import Artifact
from arkinfer.backends.base import Executor
from arkinfer.checkpoint import open_checkpoint
from arkinfer.models import create
from arkinfer.models.decoder import CausalLM
from arkinfer.ops.attention import LayerCache, new_caches
from arkinfer.pipeline import open_executor
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


def ask(executor: Executor, length: int, chunk: int = 4096) -> float:
    """Return the share of needles that an artifact answers exactly, value and end of text."""
    tokens, answers = haystack(length)
    state = executor.new_state(length + 4)
    for start in range(0, length, chunk):
        executor.step(tokens[start : start + chunk], state, "none")
    right = 0
    for key, value in answers.items():
        state.truncate(length)
        found = int(executor.step([key], state)[-1].argmax())
        right += found == value and int(executor.step([found], state)[-1].argmax()) == 2
    return right / len(answers)


def _answer(model: CausalLM, key: int, position: int, caches: list[LayerCache]) -> list[int]:
    # Every question overwrites the one before it: the haystack in the cache stays as it is.
    tokens = [key]
    for offset in range(2):
        hidden = model(torch.tensor(tokens[-1:]), torch.tensor([position + offset]), caches)
        tokens.append(int(model.head(hidden).argmax()))
    return tokens[1:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Find needles with the torch reference, or with an artifact.")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--attention", choices=("dense", "sparse"), default="sparse")
    parser.add_argument("--kv", choices=("float32", "float16", "bfloat16", "int8"), default="float32")
    parser.add_argument(
        "--artifact", help="ask this artifact of the model, in the gear and cache that it was built for"
    )
    options = parser.parse_args()
    begin = time.perf_counter()
    if options.artifact:
        artifact = Artifact.open(options.artifact)
        executor, evidence = open_executor(artifact, exporters.get(artifact.manifest.backend))
        share = ask(executor, options.length)
        what = f"{artifact.manifest.attention}, {artifact.manifest.kv} cache, {artifact.manifest.backend}: {evidence}"
    else:
        share = retrieve(open_model(options.attention), options.length, getattr(torch, options.kv))
        what = f"{options.attention}, {options.kv} cache"
    seconds = time.perf_counter() - begin
    print(f"{options.length} tokens, {what}: {share:.1%} in {seconds:.0f} s")
