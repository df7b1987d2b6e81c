"""Golden text: the bundled models, greedy, word for word what the torch reference writes and what is recorded here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import arkinfer
from arkinfer import pipeline
from arkinfer.checkpoint import open_checkpoint
from arkinfer.recipe import Recipe
from arkinfer.reference import Reference
from arkinfer.weights import CheckpointWeights

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))
LENGTH = 120


def reference_tokens(model: str, recipe: Recipe, prompt: list[int], count: int) -> list[int]:
    """Decode greedily with the torch reference."""
    checkpoint = open_checkpoint(model)
    lowered = pipeline.lower(checkpoint.config, 2048, recipe, checkpoint.layouts(), "fp32")
    reference = Reference(lowered.graph, CheckpointWeights(checkpoint), "fp32")
    state = reference.new_state(len(prompt) + count)
    logits = reference.step(prompt, state)
    tokens = []
    for _ in range(count):
        tokens.append(int(logits[-1].argmax()))
        logits = reference.step(tokens[-1:], state)
    return tokens


@pytest.mark.parametrize("model", ["tiny-minicpm", "tiny-bitcpm"])
def test_greedy_text_is_the_references_and_the_recorded_one(model: str, tmp_path: Path) -> None:
    weights = "fp32" if model == "tiny-minicpm" else "ternary"
    artifact = pipeline.build(
        model, out=tmp_path / "m.ark", weights=weights, activations="float", kv="fp32", verify="none"
    )
    with arkinfer.load(artifact.path) as engine:
        result = engine.generate(GOLDEN["messages"], max_tokens=LENGTH, temperature=0, thinking=False)
        assert result.text == GOLDEN[model]
        prompt = [5, 9, 300, 41, 77]
        session = engine.session()
        logits = session.step(prompt)
        tokens = []
        for _ in range(LENGTH):
            tokens.append(int(np.argmax(logits[-1])))
            logits = session.step(tokens[-1:])
    recipe = Recipe.from_dict(weights, "float", artifact.manifest.model["recipe"])
    assert tokens == reference_tokens(model, recipe, prompt, LENGTH)
