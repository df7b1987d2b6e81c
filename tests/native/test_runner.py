"""The runner as a command and as a process that serves an Executor; what of it an artifact holds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

import arkinfer
from arkinfer import backends, targets
from arkinfer.artifact import Artifact
from arkinfer.backends import tvm
from arkinfer.errors import ArtifactError, InternalError, UnsupportedError, UserError
from arkinfer.exporters import native, platforms
from arkinfer.runner import RunnerExecutor
from arkinfer.targets import probe
from tests.runtime.scripted import write_artifact

PROMPT = [5, 9, 300, 41, 77]


def arkrun(artifact: Artifact, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [artifact.file("payload/native/arkrun"), artifact.path, *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def test_command(tiny: Artifact) -> None:
    with arkinfer.load(tiny.path) as engine:
        drawn = engine.generate(PROMPT, max_tokens=20, temperature=0.9, top_k=40, top_p=0.95, seed=8).tokens
        greedy = engine.generate(PROMPT, max_tokens=20, temperature=0).tokens
    sampling = ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--seed", "8"]
    done = arkrun(tiny, "--max-tokens", "20", *sampling, stdin="5 9\n300, 41 77\n")
    assert (done.returncode, tuple(map(int, done.stdout.split()))) == (0, drawn)
    done = arkrun(tiny, "--tokens", "5,9,300,41,77", "--max-tokens", "20", "--threads", "1", "--check")
    assert (done.returncode, tuple(map(int, done.stdout.split()))) == (0, greedy)


@pytest.mark.parametrize(
    ("words", "stdin", "status", "says"),
    [
        (["--tokens", "5,x"], "", 2, "whole numbers"),
        (["--tokens", "99999"], "", 1, "error 7"),
        (["--tokens", "99999999999999999999"], "", 2, "whole numbers"),
        ([], "", 1, "at least one token"),
        (["--top-k", "-1"], "1", 2, "--top-k"),
        (["--colour", "1"], "1", 2, "unknown option"),
        (["--attention", "sparse"], "1", 1, "no sparse attention"),
        (["--libraries", "/nowhere"], "1", 1, "does not load"),
    ],
)
def test_command_refuses(words: list[str], stdin: str, status: int, says: str, tiny: Artifact) -> None:
    done = arkrun(tiny, *words, stdin=stdin)
    assert done.returncode == status and says in done.stderr


def test_code_beside_the_artifact(tiny: Artifact, tmp_path: Path) -> None:
    """An app ships compiled code in its package: a folder, or whatever the system's loader searches."""
    level = probe.level_for(targets.load("cpu"))
    (tmp_path / f"lib{level}.so").write_bytes(tiny.file(f"payload/{level}.so").read_bytes())
    expected = arkrun(tiny, "--tokens", "5,9,300").stdout
    assert expected and arkrun(tiny, "--tokens", "5,9,300", "--libraries", str(tmp_path)).stdout == expected
    command = [tiny.file("payload/native/arkrun"), tiny.path, "--tokens", "5,9,300", "--libraries", ""]
    environment = {"LD_LIBRARY_PATH": str(tmp_path)}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == expected


def test_executor(tiny: Artifact) -> None:
    tokens = np.random.default_rng(1).integers(0, 2048, 200).tolist()
    other = backends.open(tiny)
    expected = other.step(tokens, other.new_state(), "all")
    other.close()
    executor = RunnerExecutor(tiny, threads=2)
    assert (executor.vocab_size, executor.max_context, executor.threads) == (2048, 2048, 2)
    assert executor.isa in tiny.manifest.target["arch"]
    state = executor.new_state(200)
    assert np.array_equal(executor.step(tokens[:90], state, "all"), expected[:90])
    assert executor.step(tokens[90:100], state, "none").shape == (0, 2048)
    twin = state.fork()
    state.truncate(50)
    assert np.array_equal(executor.step(tokens[50:60], state), expected[59:60])
    del state
    assert np.array_equal(executor.step(tokens[100:], twin, "all"), expected[100:])
    with pytest.raises(UserError, match="context is full"):
        executor.step([1] * 100, twin)
    with pytest.raises(UnsupportedError):
        executor.trace([1], twin)
    executor.close()
    executor.close()
    with pytest.raises(InternalError, match="closed"):
        executor.step([1], twin)


def test_as_many_sessions_as_the_runner_serves(tiny: Artifact) -> None:
    """One more is refused; those that are open go on."""
    executor = RunnerExecutor(tiny, threads=1)
    states = [executor.new_state(8) for _ in range(256)]
    with pytest.raises(InternalError, match="256 sessions are open"):
        executor.new_state(8)
    assert executor.step([1], states[0]).shape == (1, executor.vocab_size)
    states.pop()
    executor.new_state(8)
    executor.close()


def test_executor_passes_on_what_the_runner_says(tiny: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not start"):
        RunnerExecutor(tiny, emulator=[str(tmp_path / "absent")])
    with pytest.raises(UnsupportedError, match="no sparse attention"):
        RunnerExecutor(tiny, attention="sparse")
    with pytest.raises(InternalError, match="without an answer"):
        RunnerExecutor(tiny, emulator=["true"])
    (weights := tiny.file("weights-cpu.safetensors")).rename(tmp_path / "aside")
    try:
        with pytest.raises(ArtifactError, match="cannot be opened"):
            RunnerExecutor(tiny)
    finally:
        (tmp_path / "aside").rename(weights)


def test_what_the_artifact_holds(tiny: Artifact, tmp_path: Path) -> None:
    """The same bytes whenever it is built; small; constants that two sides state are equal."""
    platform = platforms.find("linux-x86_64")
    names = native.files(platform)
    assert names == ["libarkinfer.so", "arkrun"]
    for name in names:
        native.build(platform, name, tmp_path / name)
        assert (tmp_path / name).read_bytes() == tiny.file(f"payload/native/{name}").read_bytes()
    held = {name for name in tiny.manifest.files if name.startswith("payload/native/")}
    assert held == {f"payload/native/{name}" for name in [*names, "arkinfer.h"]}
    assert sum(tiny.manifest.files[name].size for name in held) < 200_000
    assert native.BLOCK == tvm.BLOCK
    levels = (native.SOURCES / "level.c").read_text(encoding="utf-8")
    assert all(f'{{"{level}",' in levels for level in probe.LEVELS)


def test_artifacts_without_it(tmp_path: Path) -> None:
    assert not targets.load("cpu").native
    with pytest.raises(ArtifactError, match="arkrun"):
        RunnerExecutor(Artifact.open(write_artifact(tmp_path)))
