"""What a user without a GPU sees: everything but running, and why that is not possible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arkinfer import targets
from arkinfer.artifact import Artifact
from arkinfer.targets import probe

ROOT = Path(__file__).resolve().parents[2]
CUDA = ("h100", "h200", "jetson-orin-cuda", "rtx-4090")

pytestmark = pytest.mark.skipif(probe.gpu() is not None, reason="there is a GPU here")


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "arkinfer", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def report(*arguments: str, status: int = 0) -> Any:
    done = shell(*arguments, "--json")
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


def test_running_it_ends_with_what_is_missing(llama: Artifact) -> None:
    done = shell("run", "--artifact", str(llama.path), "Hello")
    assert done.returncode == 3 and done.stdout == ""
    for words in ("ARK-E341", "NVIDIA GPU", "rtx-4090 (sm_89)", "libcuda.so.1", "arkinfer verify"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_it_can_be_verified_and_says_how(llama: Artifact) -> None:
    facts = report("verify", str(llama.path))
    assert facts["passed"] is True and facts["evidence"] == "compiled, plan interpreted"


def test_it_can_be_inspected(llama: Artifact) -> None:
    done = shell("inspect", str(llama.path))
    assert done.returncode == 0, done.stderr
    for words in ("rtx-4090 (backend cuda)", "activations float", "triton 3.9", "cache_bytes", "000-embedding.cubin"):
        assert words in done.stdout


def test_targets_are_listed() -> None:
    listed = {target["name"]: target for target in report("targets")}
    for name in CUDA:
        assert listed[name]["backend"] == "cuda" and listed[name]["can_build"] is True
        assert listed[name]["runs_here"] is None
        assert targets.load(name).memory and targets.load(name).bandwidth


def test_doctor_knows_what_a_gpu_target_needs() -> None:
    facts = report("doctor", "--target", "rtx-4090")
    found = {item["name"]: item for item in facts["findings"]}
    assert (facts["build"], facts["run"]) == (True, False)
    assert found["GPU"]["verdict"] == "missing" and "libcuda" in found["GPU"]["value"]
    assert found["triton"]["verdict"] == "ok" and "cuda-bindings" in found and "apache-tvm" not in found
