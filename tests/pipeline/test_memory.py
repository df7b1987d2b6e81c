"""Weights stream: memory is that of a few slices when they are written, and of one weight when they are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import arkinfer
from arkinfer import pipeline, reference
from arkinfer.checkpoint import open_checkpoint
from arkinfer.graph import Weight
from arkinfer.quant.packed import Packed
from arkinfer.recipe import Recipe
from arkinfer.weights import CheckpointWeights
from tests.checkpoints import CONFIGS, write_checkpoint

ROOT = Path(arkinfer.__file__).resolve().parents[1]
# Bytes: 68e6 are usual; where the writer is slow, six slices wait for it, which still is less than the weights.
LIMIT = 175e6
# Writes the weight file of a checkpoint on two cores; prints its bytes and by how much memory grew at its peak.
WRITE = """
import json, os, sys
from pathlib import Path
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
from arkinfer import pipeline
from arkinfer.checkpoint import open_checkpoint
from arkinfer.exporters import weights
from arkinfer.exporters.base import BuildOptions
from arkinfer.exporters.lowering import Lowering
from arkinfer.recipe import Recipe
from arkinfer.weights import CheckpointWeights
checkpoint = open_checkpoint(sys.argv[1])
recipe = Recipe("int4", "int8", checkpoint.layouts())
lowered = pipeline.lower(checkpoint.config, 1024, recipe, checkpoint.layouts(), "fp16")
lowering = Lowering(lowered.graph, BuildOptions("fp16", "auto", 1024))
program = lowering.run()
def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
source = CheckpointWeights(checkpoint)
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = kilobytes("VmRSS")
file = Path(sys.argv[2])
weights.write(program, lowering.stored, source, file, None, lambda *_: None)
print(json.dumps({"file": file.stat().st_size, "grown": 1024 * (kilobytes("VmHWM") - before)}))
"""


def test_writing_takes_the_memory_of_some_slices(tmp_path: Path) -> None:
    """The table alone is 150 MB in the checkpoint and 75 MB in the file; all of it is 206 MB and 90 MB."""
    script = ROOT / "tests" / "benchmarks" / "random_checkpoint.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model"), "--layers", "2"],
        check=True, cwd=ROOT, env=environment, capture_output=True,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path / "model"), str(tmp_path / "weights.safetensors")],
        check=False, cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout)
    assert measured["file"] > 85e6
    assert measured["grown"] < LIMIT


class Counted:
    """Counts how often each weight is asked for."""

    def __init__(self, inner: CheckpointWeights) -> None:
        self.inner = inner
        self.asked: dict[str, int] = {}

    def packed(self, weight: Weight) -> Packed:
        self.asked[weight.name] = self.asked.get(weight.name, 0) + 1
        return self.inner.packed(weight)


def test_the_reference_of_a_large_model_holds_one_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", CONFIGS["qwen3"]))
    recipe = Recipe("int4", "int8", checkpoint.layouts())
    lowered = pipeline.lower(checkpoint.config, 256, recipe, checkpoint.layouts(), "fp16")
    results = []
    for limit, times in ((reference.KEEP_BYTES, 1), (0, 2)):
        monkeypatch.setattr(reference, "KEEP_BYTES", limit)
        source = Counted(CheckpointWeights(checkpoint))
        oracle = reference.Reference(lowered.graph, source, "fp16")
        state = oracle.new_state(64)
        results.append(np.concatenate([oracle.step(tokens, state, "all") for tokens in ([5, 9, 300], [41])]))
        asked = {name: count for name, count in source.asked.items() if "embed" not in name}
        assert set(asked.values()) == {times}
        assert (len(oracle._weights._kept) == 1) == (limit == 0)
    assert np.array_equal(*results)
