"""What can be said of the GPU suite without a GPU: it says that there is none, and its launches are well-formed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("run.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run the script itself")
def test_without_a_gpu_nothing_is_called_checked(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", out],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "no CUDA device" in done.stderr
    assert not out.exists()


def test_its_launches_are_described() -> None:
    from tests.gpu.run import larger

    launches = list(larger())
    assert {launch.kernel for launch in launches} >= {"linear_gemv", "linear_gemm", "attention_decode", "select_scores"}
    for launch in launches:
        for arch in ("sm_87", "sm_89", "sm_90"):
            assert len(launch.described.variant(launch.parsed, arch).grid) == 3
