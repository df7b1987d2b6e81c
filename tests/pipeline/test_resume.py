"""Builds that are killed, interrupted, or run out of disk leave no half artifact, and the next one goes on."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import arkinfer
from arkinfer import cli, pipeline, planning, resume
from arkinfer.artifact import Writer, staging, tensors
from arkinfer.artifact.tensors import TensorWriter
from arkinfer.errors import UserError
from tests.checkpoints import CONFIGS, write_checkpoint
from tests.pipeline import interrupted

ROOT = Path(arkinfer.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("interrupted")
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.interrupted", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kill_at_any_point_then_resume(report: Any) -> None:
    assert len(report["killed"]) == interrupted.POINTS >= 25
    for point in report["killed"]:
        assert point["status"] == signal.SIGKILL
        assert point["whole"] or "m.ark" not in point["left"], point
        if not point["whole"]:
            assert point["resumed"]["files"] == report["files"], point
            assert point["left after"] == ["m.ark"], point
    finished = [point["resumed"]["finished"] for point in report["killed"] if not point["whole"]]
    assert max(finished) > 10  # work was taken over ...
    assert len(set(finished)) > 5  # ... as much as each had done


def test_interrupt_keeps_what_is_finished_and_says_so(report: Any) -> None:
    point = report["interrupted"]
    assert point["answer"]["error"] == "KeyboardInterrupt"
    (kept,) = point["left"]
    (note,) = point["answer"]["notes"]
    assert kept in note and "the same command" in note
    assert point["resumed"]["finished"] > 0
    assert point["resumed"]["files"] == report["files"]
    assert point["left after"] == ["m.ark"]


def test_full_disk_keeps_what_is_finished_and_says_so(report: Any) -> None:
    point = report["full"]
    assert point["answer"]["error"] == "UserError"
    (kept,) = point["left"]
    facts = point["answer"]["facts"]
    assert kept in facts["kept"] and "the same command" in facts["kept"]
    assert point["resumed"]["finished"] > 0
    assert point["resumed"]["files"] == report["files"]
    assert point["left after"] == ["m.ark"]


def test_concurrent_builders_of_one_artifact(report: Any) -> None:
    """Each succeeds, or is told that the artifact exists; one adopts what a killed one left."""
    (outcome,) = report["together"]
    codes = ast.literal_eval(outcome.pop("codes"))
    assert set(codes) <= {0, 10} and 0 in codes
    assert outcome.pop("left") == "['m.ark']"
    assert outcome == report["files"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", CONFIGS["llama"])


def stop_at_third_weight(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    finish, count = TensorWriter.finish, iter(range(1000))

    def stopping(writer: TensorWriter, part: str, origin: str) -> None:
        finish(writer, part, origin)
        if next(count) == 2:
            raise error

    monkeypatch.setattr(TensorWriter, "finish", stopping)


def test_the_command_line_says_what_is_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensors, "SAVE_SECONDS", 0.0)
    stop_at_third_weight(monkeypatch, KeyboardInterrupt())
    with pytest.raises(SystemExit) as caught:
        cli.main(["build", str(checkpoint), "-o", str(tmp_path / "m.ark"), "--weights", "int8", "--verify", "none"])
    assert caught.value.code == cli.INTERRUPTED
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-2] == "interrupted"
    assert "finished weights are kept in" in lines[-1]
    assert not (tmp_path / "m.ark").exists()


def test_other_failures_leave_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "SAVE_SECONDS", 0.0)
    stop_at_third_weight(monkeypatch, ValueError("a fault"))
    with pytest.raises(ValueError, match="a fault"):
        pipeline.build(checkpoint, out=tmp_path / "m.ark", weights="int8", verify="none")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def left(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Interrupt a build and return the folder that it leaves."""
    monkeypatch.setattr(tensors, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        stop_at_third_weight(patched, KeyboardInterrupt())
        pipeline.build(checkpoint, out=tmp_path / "m.ark", weights="int8", verify="none")
    (folder,) = tmp_path.glob(".m.ark.*")
    return folder


def test_a_changed_checkpoint_or_option_starts_anew(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[int] = []
    enter = TensorWriter.__enter__

    def counted(writer: TensorWriter) -> TensorWriter:
        result = enter(writer)
        entered.append(len(writer.finished))
        return result

    left(tmp_path, checkpoint, monkeypatch)
    monkeypatch.setattr(TensorWriter, "__enter__", counted)
    (checkpoint / "model.safetensors").touch()
    left(tmp_path, checkpoint, monkeypatch)  # sweeps the work of the checkpoint as it was
    pipeline.build(checkpoint, out=tmp_path / "m.ark", weights="int8", attention="dense", verify="none")
    assert entered == [0, 0]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.ark", "model"]


def test_work_on_other_artifacts_is_kept_for_a_while(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = left(tmp_path, checkpoint, monkeypatch)
    with Writer(tmp_path / "other.ark"):
        pass
    assert folder.exists()
    monkeypatch.setattr(staging, "KEEP_SECONDS", -1)
    with Writer(tmp_path / "other.ark"):
        pass
    assert not folder.exists()


def test_work_on_an_artifact_whose_name_begins_alike_is_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = left(tmp_path, checkpoint, monkeypatch)
    assert staging.adopt(tmp_path / "m", "another key") is None
    assert folder.exists()


def test_bytes_that_are_kept_count_as_room(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left(tmp_path, checkpoint, monkeypatch)
    needed = planning.plan(checkpoint, weights="int8").build.disk_bytes
    assert 0 < staging.reclaimable(tmp_path / "m.ark") < needed
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=needed - 1))
    pipeline.build(checkpoint, out=tmp_path / "m.ark", weights="int8", verify="none")
    with pytest.raises(UserError, match="no room"):
        pipeline.build(checkpoint, out=tmp_path / "n.ark", weights="int8", verify="none")


def test_a_link_among_what_is_left_is_not_followed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept,) = left(tmp_path, checkpoint, monkeypatch).glob("*.safetensors")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    kept.unlink()
    kept.symlink_to(precious)
    pipeline.build(checkpoint, out=tmp_path / "m.ark", weights="int8", verify="none")
    assert precious.read_text() == "mine"


def test_calibration_texts_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arkinfer, "__file__", str(tmp_path / "__init__.py"))
    found = []
    for text in ("one", "two", "two"):
        (tmp_path / "text.txt").write_text(text)
        found.append(resume._code.__wrapped__())
    assert found[0] != found[1] == found[2]
