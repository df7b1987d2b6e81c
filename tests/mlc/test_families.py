"""A package of another family in the formats that phones get: int4 weights, int8 activations, float16 cache."""

from __future__ import annotations

from pathlib import Path

import arkinfer
from tests.checkpoints import CONFIGS, write_checkpoint


def test_qwen3_with_its_norms_over_heads_passes_the_gates(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "qwen3", CONFIGS["qwen3"])
    artifact = arkinfer.build(folder, "mlc-iphone", out=tmp_path / "q.ark", context=512, quality="off")
    manifest = artifact.manifest
    assert (manifest.weights, manifest.activations, manifest.kv) == ("int4", "int8", "fp16")
    assert manifest.parity is not None and manifest.parity["passed"] and manifest.parity["path"] == "int8"
    with arkinfer.load(artifact.path) as engine:  # the form for this machine answers, by the same calls
        assert engine.generate([5, 6, 7], max_tokens=4, temperature=0).usage.completion_tokens == 4
