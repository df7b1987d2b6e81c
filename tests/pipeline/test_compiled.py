"""Compiled libraries are found again by what they were made from, and only while they are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from arkinfer.exporters import compiled, platforms

LINUX = platforms.find("linux-x86_64")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compiled, "_folder", lambda: tmp_path / "compiled")
    return tmp_path / "compiled"


def test_a_kept_library_comes_back(tmp_path: Path) -> None:
    library, out = tmp_path / "a.so", tmp_path / "b.so"
    library.write_bytes(b"code")
    name = compiled.key("{}", "x86-64-v3", LINUX, "1")
    assert not compiled.fetch(name, out)
    compiled.keep(name, library)
    assert compiled.fetch(name, out)
    assert out.read_bytes() == b"code"


def test_everything_that_the_compiler_reads_is_in_the_name() -> None:
    older = platforms.find("linux-x86_64", "2.27")
    names = {
        compiled.key(*parts)
        for parts in (
            ("a", "b", LINUX, "c"),
            ("a", "b", LINUX, "d"),
            ("a", "d", LINUX, "c"),
            ("d", "b", LINUX, "c"),
            ("ab", "", LINUX, "c"),
            ("a", "b", older, "c"),
        )
    }
    assert len(names) == 6


def test_a_damaged_entry_is_not_used(tmp_path: Path, private_cache: Path) -> None:
    library = tmp_path / "a.so"
    library.write_bytes(b"code")
    compiled.keep("name", library)
    (private_cache / "name.so").write_bytes(b"c0de")
    assert not compiled.fetch("name", tmp_path / "b.so")
    compiled.keep("name", library)
    (private_cache / "name.sha256").unlink()
    assert not compiled.fetch("name", tmp_path / "b.so")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, private_cache: Path) -> None:
    private_cache.write_text("a file where the folder should be")
    library = tmp_path / "a.so"
    library.write_bytes(b"code")
    compiled.keep("name", library)
    assert not compiled.fetch("name", tmp_path / "b.so")
