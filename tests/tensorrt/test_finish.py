"""Finishing an artifact on its device: checked first, built once, kept whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from arkinfer import backends
from arkinfer.artifact import Artifact, tensorrt
from arkinfer.cli import main
from arkinfer.errors import ArtifactError, UnsupportedError, UserError
from arkinfer.targets import probe
from tests.tensorrt.conftest import Orin

ROOT = Path(__file__).resolve().parents[2]


def entries(cache: Path) -> list[str]:
    """Return what is left in the folder of the engines, the timings aside."""
    return sorted(
        file.name for file in (cache / "engines").rglob("*") if file.is_file() and not file.name.startswith("timing-")
    )


def test_an_engine_is_built_once_and_recorded(jetson: Artifact, orin: Orin, tmp_path: Path) -> None:
    orin(jetson, cache=tmp_path)
    said: list[str] = []
    seen: list[tuple[str, int, int]] = []
    first = backends.finish(jetson, said.append, lambda *each: seen.append(each))
    again = backends.finish(jetson, said.append)
    assert first is not None and again is not None
    assert (first.built, again.built) == (True, False) and first.engine == again.engine
    assert len(said) == 1 and "10.16.2.10" in said[0] and str(tmp_path) in said[0]
    assert [name for name, _, _ in seen] == ["engine"] * len(seen) and seen[-1][1:] == (1000, 1000)
    record = first.record
    assert (record["library"], record["version"], record["level"]) == ("tensorrt", "10.16.2.10", "sm_87")
    assert record["layers"]["KV_CACHE_UPDATE"] == 2 and record["engine"]["size"] == first.engine.stat().st_size
    assert entries(tmp_path) == ["engine.plan", "record.json"]
    assert Artifact.open(jetson.path, "full").manifest.digest == jetson.manifest.digest
    forced = backends.finish(jetson, said.append, force=True)
    assert forced is not None and forced.built


def test_a_umask_that_lets_the_group_write(jetson: Artifact, orin: Orin, tmp_path: Path) -> None:
    """As Ubuntu sets it for its users, whose folders nobody else may write to all the same."""
    orin(jetson, cache=tmp_path / "cache")
    before = os.umask(0o002)
    try:
        first = backends.finish(jetson)
    finally:
        os.umask(before)
    assert first is not None and first.built
    again = backends.finish(jetson)
    assert again is not None and not again.built


@pytest.mark.parametrize("change", [{"version": "10.17.0.1"}, {"level": "sm_89"}])
def test_another_tensorrt_or_gpu_builds_anew(
    change: dict[str, str], orin: Orin, tmp_path: Path, jetson: Artifact
) -> None:
    from tests.tensorrt import decoder

    recipe = decoder.recipe(levels=("sm_87", "sm_89"))
    artifact = decoder.write_artifact(tmp_path / "two.ark", recipe)
    cache = tmp_path / "cache"
    orin(artifact, cache=cache)
    first = backends.finish(artifact)
    orin(artifact, cache=cache, **change)
    second = backends.finish(artifact)
    assert first is not None and second is not None and second.built
    assert first.engine != second.engine
    assert not first.engine.exists() and second.engine.exists()  # nobody can run the old one any more


def refused(artifact: Artifact) -> UnsupportedError:
    with pytest.raises(UnsupportedError) as caught:
        backends.finish(artifact)
    return caught.value


def test_what_is_missing_is_said_in_one_error(
    jetson: Artifact, orin: Orin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "gpu", lambda: None)
    assert refused(jetson).code == "ARK-E341"
    orin(jetson, cache=tmp_path, version="10.3.0.30")
    error = refused(jetson)
    assert error.code == "ARK-E345" and "10.3.0.30" in error.message and ">=10.15,<12" in error.message
    assert "JetPack 6.2 brings 10.3" in str(error.facts["reason"]) and "jetson-orin-cuda" in error.hint
    orin(jetson, cache=tmp_path, level="sm_72")
    assert refused(jetson).code == "ARK-E311"
    orin(jetson, cache=tmp_path)

    def absent(name: str) -> Any:
        raise ImportError("No module named 'tensorrt'")

    monkeypatch.setattr(tensorrt, "library", absent)
    error = refused(jetson)
    assert error.code == "ARK-E344" and "python3-libnvinfer" in error.hint
    assert not (tmp_path / "engines").exists()


def test_the_system_of_a_jetson_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def system(text: str) -> str | None:
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
        return probe.jetson()

    assert system("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic") == "L4T 36.4.3 (JetPack 6)"
    assert system("# R39 (release), REVISION: 2.0, GCID: 1, BOARD: generic") == "L4T 39.2.0 (JetPack 7)"
    assert system("something else") == "L4T of an unknown release"


def test_a_damaged_engine_is_built_again(jetson: Artifact, orin: Orin, tmp_path: Path) -> None:
    orin(jetson, cache=tmp_path)
    first = backends.finish(jetson)
    assert first is not None
    spoilt = bytearray(first.engine.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    first.engine.write_bytes(bytes(spoilt))
    second = backends.finish(jetson)
    assert second is not None and second.built and second.engine == first.engine
    digest = hashlib.sha256(second.engine.read_bytes()).hexdigest()
    assert digest == second.record["engine"]["sha256"] != hashlib.sha256(spoilt).hexdigest()
    (second.engine.parent / "record.json").write_text("{", encoding="utf-8")
    third = backends.finish(jetson)
    assert third is not None and third.built


def test_a_model_whose_weights_lie_elsewhere_is_refused(orin: Orin, tmp_path: Path) -> None:
    from tests.tensorrt import decoder

    artifact = decoder.write_artifact(tmp_path / "far.ark", decoder.recipe(), data="../ghts-decoder.data")
    orin(artifact, cache=tmp_path / "cache")
    with pytest.raises(ArtifactError, match="outside the artifact") as caught:
        backends.finish(artifact)
    assert caught.value.code == "ARK-E513" and entries(tmp_path / "cache") == []


def test_a_folder_that_others_can_write_to_is_refused(jetson: Artifact, orin: Orin, tmp_path: Path) -> None:
    orin(jetson, cache=tmp_path)
    finished = backends.finish(jetson)
    assert finished is not None
    finished.engine.parent.chmod(0o777)
    with pytest.raises(UserError) as caught:
        backends.finish(jetson)
    assert caught.value.code == "ARK-E156"


def test_a_full_disk_leaves_nothing(
    jetson: Artifact, orin: Orin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orin(jetson, cache=tmp_path)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(UserError, match="no room") as caught:
            backends.finish(jetson)
    assert caught.value.code == "ARK-E155"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # what the building process writes ends there
    try:
        with pytest.raises(UserError, match="could not be written") as caught:
            backends.finish(jetson)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == "ARK-E155" and "large" in str(caught.value.facts["reason"])
    assert entries(tmp_path) == []
    assert backends.finish(jetson) is not None


def test_an_interrupt_leaves_nothing(
    jetson: Artifact, orin: Orin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orin(jetson, cache=tmp_path)

    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backends.finish(jetson, progress=interrupt)
    assert entries(tmp_path) == []
    assert backends.finish(jetson) is not None


_FINISH = """
import sys
from dataclasses import replace
from arkinfer import backends
from arkinfer.artifact import Artifact
from arkinfer.targets import probe
gpu = probe.Gpu("A GPU that is not there", "sm_87", 1 << 34, "13.0")
probe.gpu = lambda: gpu
print(backends.finish(Artifact.open(sys.argv[1]), print).built, flush=True)
"""


def start(artifact: Artifact) -> subprocess.Popen[str]:
    """Start another process that finishes ``artifact``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-c", _FINISH, str(artifact.path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_is_no_obstacle(jetson: Artifact, orin: Orin, tmp_path: Path) -> None:
    orin(jetson, cache=tmp_path)
    with start(jetson) as process:
        assert process.stdout is not None and "building the engine" in process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    finished = backends.finish(jetson)
    assert finished is not None and finished.built
    assert entries(tmp_path) == ["engine.plan", "record.json"]


def test_processes_that_start_together_build_once(jetson: Artifact, orin: Orin, tmp_path: Path) -> None:
    orin(jetson, cache=tmp_path)
    running = [start(jetson) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        said = [text for text, _ in pool.map(lambda process: process.communicate(), running)]
    assert sorted(text.split()[-1] for text in said) == ["False", "False", "True"]
    assert sum("building the engine" in text for text in said) == 1


def test_a_crash_of_the_library_is_an_error_of_its_process(
    jetson: Artifact, orin: Orin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orin(jetson, cache=tmp_path)
    package = tmp_path / "crash" / "tensorrt"
    package.mkdir(parents=True)
    code = "import os, sys; sys.stderr.write('oh dear\\n'); sys.stderr.flush(); os.abort()"
    (package / "__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ["PYTHONPATH"]]))
    error = refused(jetson)
    assert error.code == "ARK-E347" and error.facts == {"exit status": -6, "last words": "oh dear"}
    assert entries(tmp_path) == []


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(words)
    return int(caught.value.code or 0)


def test_the_command(jetson: Artifact, orin: Orin, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    orin(jetson, cache=tmp_path)
    assert command("finish", str(jetson.path)) == 0
    first = capsys.readouterr()
    assert "building the engine of decoder.ark" in first.err and "engine built in" in first.out
    assert command("finish", "--artifact", str(jetson.path), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["finished"]["built"] is False and facts["digest"] == jetson.manifest.digest
    assert Path(facts["finished"]["file"]).is_file()
    orin(jetson, cache=tmp_path, version="10.3.0.30")
    assert command("finish", str(jetson.path)) == 3
    assert "ARK-E345" in capsys.readouterr().err


def test_other_artifacts_need_no_finishing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.artifact import samples

    artifact = samples.write(tmp_path / "cpu.ark")
    assert command("finish", str(artifact.path)) == 0
    assert "needs no finishing" in capsys.readouterr().out
