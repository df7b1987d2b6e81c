"""Artifacts for machines that this one is not: what they hold, what fits them, what is said when they are opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from arkinfer import backends, pipeline, planning
from arkinfer.errors import UnsupportedError
from arkinfer.targets import probe
from tests.checkpoints import CONFIGS, write_checkpoint

CODE = {"android": (".so", b"\x7fELF"), "iphone": (".a", b"!<arch>\n"), "macos-arm64": (".dylib", b"\xcf\xfa\xed\xfe")}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cross") / "llama", CONFIGS["llama"])


def board(folder: Path, text: str) -> Path:
    file = folder / "board.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("target", CODE)
def test_code_is_in_the_format_of_the_target(llama: Path, target: str, tmp_path: Path) -> None:
    one_level = board(tmp_path, f"extends: {target}\narch: [aarch64-dotprod]\n")
    artifact = pipeline.build(llama, one_level, out=tmp_path / "out.ark", verify="none")
    suffix, magic = CODE[target]
    code = artifact.file(f"payload/aarch64-dotprod{suffix}").read_bytes()
    assert code.startswith(magic)
    assert b"TVMFFIErrorSetRaised" in code
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
