"""Artifacts for machines that this one is not: what they hold, what fits them, what is said when they are opened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from arkinfer import backends, parity, pipeline, planning
from arkinfer.errors import ParityError, UnsupportedError
from arkinfer.exporters import emulation, emulator, macho
from arkinfer.runtime.engine import open_engine
from arkinfer.targets import probe
from tests.checkpoints import CONFIGS, write_checkpoint

CODE = {"iphone": macho.IOS, "macos-arm64": 1}  # Apple's number of the system
GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cross") / "llama", CONFIGS["llama"])


@pytest.fixture(scope="session")
def minicpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cross") / "minicpm", CONFIGS["minicpm"])


def board(folder: Path, text: str) -> Path:
    file = folder / "board.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("target", CODE)
def test_code_is_in_the_format_of_the_target(llama: Path, target: str, tmp_path: Path) -> None:
    one_level = board(tmp_path, f"extends: {target}\narch: [aarch64-dotprod]\n")
    artifact = pipeline.build(llama, one_level, out=tmp_path / "out.ark", verify="none")
    for name in ("payload/aarch64-dotprod.dylib", "payload/native/libarkinfer.dylib"):
        code = artifact.file(name).read_bytes()
        assert code.startswith(b"\xcf\xfa\xed\xfe")
        place = next(offset for kind, offset in macho.commands(code) if kind == 0x32)
        assert int.from_bytes(code[place + 8 : place + 12], "little") == CODE[target]
    assert artifact.manifest.parity is None
    with pytest.raises(UnsupportedError, match="no code for this machine") as caught:
        backends.open(artifact)
    assert caught.value.code == "ARK-E311"
    assert "aarch64-dotprod" in str(caught.value.facts["artifact"])
    assert "--target cpu" in caught.value.hint


def test_the_right_processor_under_another_system_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "isa_levels", lambda: ("aarch64-i8mm", "aarch64-dotprod"))
    assert probe.usable(["aarch64-dotprod"]) == "aarch64-dotprod"
    assert probe.usable(["aarch64-dotprod"], "linux-aarch64") == "aarch64-dotprod"
    for other in ("android-aarch64", "macos-arm64", "ios-arm64"):
        assert probe.usable(["aarch64-dotprod"], other) is None
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert probe.usable(["aarch64-i8mm"], "macos-arm64") == "aarch64-i8mm"
    assert probe.usable(["aarch64-i8mm"]) is None


def test_levels_of_two_architectures_do_not_go_together(llama: Path, tmp_path: Path) -> None:
    mixed = board(tmp_path, "extends: cpu\ndescription: Both\narch: [x86-64-v3, aarch64-dotprod]\n")
    with pytest.raises(UnsupportedError) as caught:
        pipeline.build(llama, mixed, out=tmp_path / "out.ark")
    assert "aarch64-dotprod is not for linux-x86_64" in str(caught.value.facts)
    assert planning.plan(llama, mixed).refused


def test_the_context_is_what_the_targets_memory_allows(llama: Path, tmp_path: Path) -> None:
    wide = planning.plan(llama, board(tmp_path, "extends: android\n"))
    assert (wide.weights, wide.kv, wide.context, wide.fits) == ("int4", "int8", 1024, True)
    total = wide.memory.total - 600 * (wide.memory.kv // 1024)
    tight = board(tmp_path, f"extends: android\narch: [aarch64-dotprod]\nmemory: {total}\n")
    plan = planning.plan(llama, tight)
    assert plan.fits
    assert plan.context == plan.largest_context
    assert 384 <= plan.context <= 448
    artifact = pipeline.build(llama, tight, out=tmp_path / "out.ark", verify="none")
    assert artifact.manifest.context == plan.context
    assert planning.plan(llama, tight, context=1000).fits is False
    hopeless = planning.plan(llama, board(tmp_path, "extends: android\nmemory: 1 MB\n"))
    assert (hopeless.fits, hopeless.context) == (False, 1024)


def test_a_build_for_aarch64_is_verified_under_qemu(
    minicpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "SUITES", {"fast": 600})  # positions: emulation is slow
    artifact = pipeline.build(minicpm, "android", out=tmp_path / "out.ark", quality="off")
    report = artifact.manifest.parity
    assert report is not None
    assert report["passed"] is True
    assert report["positions"] > 500
    levels = "aarch64-i8mm and aarch64-dotprod"
    assert report["evidence"] == f"emulated, {levels} under qemu, driven by the runner for Linux"
    assert artifact.manifest.provenance["notes"] == []
    assert artifact.file("payload/aarch64-i8mm.so").read_bytes().startswith(b"\x7fELF")
    runtime = [entry.size for name, entry in artifact.manifest.files.items() if name.startswith("payload/")]
    assert sum(runtime) < 8 << 20


def test_golden_text_under_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU target answers, from the files of an artifact for aarch64."""
    target = board(tmp_path, "extends: linux-aarch64\narch: [aarch64-dotprod]\n")
    exact = {"weights": "ternary", "activations": "float", "kv": "fp32"}
    artifact = pipeline.build("tiny-bitcpm", target, out=tmp_path / "out.ark", verify="none", **exact)
    emulated = emulation.stand_in(artifact)
    assert emulated is not None
    assert emulated.executor.isa == "aarch64-dotprod"
    monkeypatch.setattr(backends, "open", lambda *_: emulated.executor)
    with open_engine(artifact) as engine:
        answer = engine.generate(GOLDEN["messages"], max_tokens=60, temperature=0, thinking=False)
    assert len(answer.text) > 100
    assert GOLDEN["tiny-bitcpm"].startswith(answer.text)


def test_without_qemu_the_artifact_says_that_it_was_only_compiled(
    minicpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulator, "find", lambda: None)
    said: list[str] = []
    target = board(tmp_path, "extends: linux-aarch64\narch: [aarch64-dotprod]\n")
    artifact = pipeline.build(minicpm, target, out=tmp_path / "out.ark", say=said.append)
    assert artifact.manifest.parity is None
    (note,) = artifact.manifest.provenance["notes"]
    assert note == "compiled, not verified: code for aarch64 runs here only under emulation, and qemu is not installed"
    assert said[-1] == f"warning: {note}; apt-get install qemu-user-static libc6-arm64-cross"
    with pytest.raises(UnsupportedError) as caught:
        pipeline.verify_artifact(artifact)
    assert (caught.value.code, caught.value.exit_code) == ("ARK-E317", 3)


def test_what_nothing_emulates_is_compiled_only(llama: Path, tmp_path: Path) -> None:
    said: list[str] = []
    target = board(tmp_path, "extends: iphone\narch: [aarch64-dotprod]\n")
    artifact = pipeline.build(llama, target, out=tmp_path / "out.ark", say=said.append)
    assert artifact.manifest.parity is None
    assert "nothing here emulates ios-arm64" in artifact.manifest.provenance["notes"][0]
    assert "--target linux-aarch64" in said[-1]


class _Stepper:
    """An executor with random logits, ``noise`` away from those of all others."""

    vocab_size, max_context, isa = 50, 1024, "some-level"

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def new_state(self, capacity: int) -> None:
        pass

    def step(self, tokens: list[int], state: None, logits: str) -> np.ndarray:
        common, own = (np.random.default_rng(seed).normal(size=(len(tokens), self.vocab_size)) for seed in (0, 1))
        return common + self.noise * own


def test_levels_that_differ_are_no_artifact() -> None:
    emulation._compare(_Stepper(0), _Stepper(1e-4))  # type: ignore[arg-type]
    with pytest.raises(ParityError) as caught:
        emulation._compare(_Stepper(0), _Stepper(0.3))  # type: ignore[arg-type]
    assert caught.value.code == "ARK-E403"
    with pytest.raises(ParityError):
        emulation._compare(_Stepper(0), _Stepper(float("nan")))  # type: ignore[arg-type]
