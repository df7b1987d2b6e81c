"""Small checkpoints, and artifacts of the onnxruntime backend built once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from arkinfer import pipeline
from arkinfer.artifact import Artifact
from tests.checkpoints import CONFIGS, write_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random checkpoint per family, and a ternary MiniCPM."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {name: write_checkpoint(root / name, raw) for name, raw in CONFIGS.items()}
    found["bitcpm"] = write_checkpoint(root / "bitcpm", CONFIGS["minicpm"], ternary=64)
    return found


@pytest.fixture(scope="session")
def floats(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random Qwen3 that computes in float32, not verified."""
    out = tmp_path_factory.mktemp("onnx") / "qwen3.ark"
    return pipeline.build(checkpoints["qwen3"], target="onnx-cpu", out=out, weights="fp32", verify="none")
