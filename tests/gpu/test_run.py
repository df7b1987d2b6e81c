"""What can be said of the GPU suite without a GPU: every part runs at tiny shapes, and finds what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from arkinfer.artifact import Artifact

pytest.importorskip("triton")
from tests.gpu import prepare, run, shapes, speed

SCRIPT = Path(run.__file__)
NAME = "random-llama-int4"


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
    from tests.gpu.kernels import larger

    launches = list(larger())
    assert {launch.kernel for launch in launches} >= {"linear_gemv", "linear_gemm", "attention_decode", "select_scores"}
    for launch in launches:
        for arch in ("sm_87", "sm_89", "sm_90"):
            assert len(launch.described.variant(launch.parsed, arch).grid) == 3


@pytest.fixture
def carried(llama: Artifact, tmp_path: Path) -> Path:
    """What prepare.py makes, of one artifact and with few tokens."""
    folder = tmp_path / "carried"
    shutil.copytree(llama.path, folder / f"{NAME}.ark")
    prepare.expect(folder, NAME, Artifact.open(folder / f"{NAME}.ark"), 12)
    return folder


def results(out: Path) -> Any:
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_part_runs_and_calls_are_gathered(carried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "TINY", (("tiny-sparse", "ternary"), ("tiny-dense", "fp16")))
    out, options = tmp_path / "results.json", ["--dry", "--carried", str(carried)]
    assert run.main(["kernels", "engine", "timings", "sanitizer", *options, "--out", str(out)]) == 0
    assert run.main(["decode", "prefill", "peers", *options, "--out", str(out)]) == 0
    parts = results(out)["parts"]
    assert set(parts) == set(run.PARTS) - {"needle"}  # tests/cuda/test_sparse.py looks for these through a plan
    assert all(part["complete"] for part in parts.values())
    (engine,) = parts["engine"]["rows"]
    assert engine["exact"] and engine["host_is_device"] and engine["tokens"] == 12
    assert [(row["shape"], row["depth"]) for row in parts["decode"]["rows"]] == [
        ("tiny-sparse", 200), ("tiny-sparse", 0), ("tiny-dense", 200), ("tiny-dense", 0),
    ]  # fmt: skip
    assert all(row["tok_s"] > 0 for row in parts["decode"]["rows"] + parts["prefill"]["rows"])
    assert any("skipped" in row for row in parts["peers"]["rows"])
    assert not any("failure" in row for row in parts["peers"]["rows"])


def test_other_tokens_than_the_reference_wrote_are_found(carried: Path, tmp_path: Path) -> None:
    file = carried / f"{NAME}.expected.json"
    expected = results(file)
    expected["tokens"][5] += 1
    file.write_text(json.dumps({**expected, "margins": [1.0] * 12}), encoding="utf-8")
    out = tmp_path / "results.json"
    assert run.main(["engine", "--dry", "--carried", str(carried), "--out", str(out)]) == 1
    (row,) = results(out)["parts"]["engine"]["rows"]
    assert (row["ok"], row["first_difference"], row["margin_there"]) == (False, 5, 1.0)


def test_what_time_did_not_suffice_for_is_not_called_done(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    assert run.main(["peers", "--dry", "--minutes", "0", "--out", str(out)]) == 1
    part = results(out)["parts"]["peers"]
    assert len(part["rows"]) == 1 and part["complete"] is False
    out.write_text(json.dumps({**results(out), "hardware": {"device": "another"}}), encoding="utf-8")
    with pytest.raises(SystemExit):
        run.main(["peers", "--dry", "--out", str(out)])


def test_goals_are_judged_by_what_was_measured() -> None:
    def row(shape: str, what: str, at: dict[str, int], tok_s: float, **more: Any) -> dict[str, Any]:
        return {"shape": shape, "weights": "fp16", "what": what, **at, "tok_s": tok_s, **more}

    rows = [
        row("minicpm4-8b", "decode", {"depth": 0}, 200.0, share_of_copy=0.7),
        row("minicpm4-8b", "decode", {"depth": 8192}, 180.0),
        row("minicpm4-8b", "decode", {"depth": 131072}, 150.0),
        row("minicpm4-8b", "decode", {"depth": 0}, 150.0, peer=True),
        row("qwen3-8b", "decode", {"depth": 131072}, 20.0),
    ]
    found = {goal["goal"]: (round(goal["value"], 3), goal["reached"]) for goal in speed.goals(rows)}
    assert found == {
        "decode fp16 at 8B: 80 % of the copy bandwidth": (0.7, False),
        "decode fp16: 128K within 1.25 of the time at 8K": (1.2, True),
        "decode fp16: faster than torch": (1.333, True),
        "decode at 128K: 7.0 times the dense 8B shape": (7.5, True),
    }
    assert speed.goals([]) == []
