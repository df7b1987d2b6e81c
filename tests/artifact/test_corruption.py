"""Every byte of an artifact counts: flips, truncation, foreign files and links are all refused."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import samples

from arkinfer.artifact import Artifact
from arkinfer.errors import ArtifactError, UserError


def refused(folder: Path, check: str = "auto") -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(folder, check)
    assert caught.value.hint or caught.value.facts
    return caught.value


def test_single_bit_flips(artifact: Artifact) -> None:
    """All of manifest.json's bytes, one random bit each, and a sample of the other files' bits."""
    generator = random.Random(1)
    for name, content in samples.contents(artifact.path).items():
        place = artifact.path / name
        offsets = (
            range(len(content))
            if name == "manifest.json"
            else generator.sample(range(len(content)), min(len(content), 60))
        )
        for offset in offsets:
            flipped = bytearray(content)
            flipped[offset] ^= 1 << generator.randrange(8)
            place.write_bytes(flipped)
            refused(artifact.path)
        place.write_bytes(content)
    Artifact.open(artifact.path)


def test_truncation(artifact: Artifact) -> None:
    """manifest.json cut at every byte, the other files every 512 bytes."""
    for name, content in samples.contents(artifact.path).items():
        place = artifact.path / name
        for length in range(0, len(content), 1 if name == "manifest.json" else 512):
            place.write_bytes(content[:length])
            refused(artifact.path)
        place.write_bytes(content + b"\n")
        refused(artifact.path)
        place.write_bytes(content)
    Artifact.open(artifact.path)


def test_equal_length_exchange(artifact: Artifact) -> None:
    """Files that trade places have the right sizes and digests, under the wrong names."""
    one, other = artifact.file("tokenizer.json"), artifact.file("generation.json")
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    refused(artifact.path)


def _missing(folder: Path) -> None:
    (folder / "payload/empty").unlink()


def _extra(folder: Path) -> None:
    (folder / "payload/evil.so").write_bytes(b"\x7fELF")


def _extra_folder(folder: Path) -> None:
    (folder / "plugins").mkdir()


def _hidden(folder: Path) -> None:
    (folder / ".hidden").write_bytes(b"")


def _pipe(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def _pipe_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def _folder_for_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()


def _file_for_folder(folder: Path) -> None:
    for file in (folder / "payload").iterdir():
        file.unlink()
    (folder / "payload").rmdir()
    (folder / "payload").write_bytes(b"")


def _link_same_content(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder.parent / "outside.json")
    (folder / "tokenizer.json").symlink_to(folder.parent / "outside.json")


def _link_inside(folder: Path) -> None:
    (folder / "payload/again.so").symlink_to("x86-64-v3.so")


def _link_dangling(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("nowhere")


def _link_loop(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("tokenizer.json")


def _link_folder(folder: Path) -> None:
    (folder / "payload").rename(folder.parent / "outside")
    (folder / "payload").symlink_to(folder.parent / "outside")


def _link_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "outside.json")
    (folder / "manifest.json").symlink_to(folder.parent / "outside.json")


def _link_special(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _manifest_folder(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()


def _empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"")


def _huge_manifest(folder: Path) -> None:
    with open(folder / "manifest.json", "wb") as stream:
        stream.truncate(1 << 34)  # sparse: only reading it would take memory


SPOILERS: list[Callable[[Path], None]] = [
    _missing, _extra, _extra_folder, _hidden, _pipe, _pipe_manifest, _folder_for_file, _file_for_folder,
    _link_same_content, _link_inside, _link_dangling, _link_loop, _link_folder, _link_manifest, _link_special,
    _no_manifest, _manifest_folder, _empty_manifest, _huge_manifest,
]  # fmt: skip


@pytest.mark.parametrize("check", ["auto", "full"])
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__.strip("_"))
def test_spoiled_folders(artifact: Artifact, spoil: Callable[[Path], None], check: str) -> None:
    spoil(artifact.path)
    refused(artifact.path, check)


def test_foreign_places(tmp_path: Path) -> None:
    (tmp_path / "file.ark").write_bytes(b"GGUF")
    assert "is not an artifact" in refused(tmp_path / "file.ark").message
    (tmp_path / "folder").mkdir()
    assert "is not an artifact" in refused(tmp_path / "folder").message


def test_absent_names_the_nearest(artifact: Artifact) -> None:
    with pytest.raises(UserError, match="no artifact") as caught:
        Artifact.open(artifact.path.with_name("smaple.ark"))
    assert "sample.ark" in caught.value.hint


def test_unknown_check(artifact: Artifact) -> None:
    with pytest.raises(UserError, match="unknown check"):
        Artifact.open(artifact.path, check="ful")
