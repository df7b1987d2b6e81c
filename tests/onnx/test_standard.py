"""Models of standard operators alone: in onnxruntime they compute what the reference computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from arkinfer import parity
from tests.onnx import standard

TOKENS = [(17 * index + index * index) % 200 for index in range(60)]


@pytest.mark.parametrize(
    ("model", "weights", "form"),
    [
        ("qwen3", "int4", "portable"),
        ("llama", "fp16", "portable"),
        ("qwen3", "int8", "tensorrt"),
        ("bitcpm", "ternary", "tensorrt"),
        ("llama", "int4", "tensorrt"),
    ],
)
def test_standard_operators_compute_the_same(
    checkpoints: dict[str, Path], tmp_path: Path, model: str, weights: str, form: str
) -> None:
    built = standard.build(checkpoints[model], tmp_path, weights, form, 128)
    loaded = onnx.load(str(built.file), load_external_data=False)
    assert {node.domain for function in loaded.functions for node in function.node} == {""}
    runner = standard.Runner(built.file)
    steps = [(TOKENS[:40], range(40)), (TOKENS[40:41], range(1)), (TOKENS[41:], range(19))]
    logits = np.concatenate([runner.step(tokens, rows) for tokens, rows in steps])
    right = built.reference.step(TOKENS, built.reference.new_state(len(TOKENS)), "all")
    gate = parity.GATES["float" if form == "portable" else "fp16"]
    kl = parity.divergence(right, logits)
    assert kl.mean() <= gate.mean_kl and kl.max() <= gate.max_kl
    best = np.partition(right, -2, axis=1)[:, -2:]
    assert (parity.agreement(right, logits) | (best[:, 1] - best[:, 0] < gate.margin)).all()
