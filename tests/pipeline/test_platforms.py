"""Every platform that a target can name is linked for here, whatever this machine is."""

from __future__ import annotations

from pathlib import Path

import pytest

from arkinfer.errors import InternalError
from arkinfer.exporters import linker, macho, platforms
from arkinfer.exporters.platforms import PLATFORMS
from arkinfer.targets import load, schema

CODE = "void *memcpy(void *, const void *, unsigned long);\nvoid copy(void *a, void *b) { memcpy(a, b, 1000); }\n"
MAGIC = {".so": b"\x7fELF", ".dylib": b"\xcf\xfa\xed\xfe"}


def compiled(name: str, folder: Path) -> Path:
    source, item = folder / "code.c", folder / "code.o"
    source.write_text(CODE)
    linker.zig("cc", "-target", PLATFORMS[name].zig, "-O2", "-fPIC", "-g0", "-c", str(source), "-o", str(item))
    return item


def test_the_schema_names_them_all() -> None:
    assert tuple(PLATFORMS) == schema.PLATFORMS


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_library_is_linked_twice_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    item, platform = compiled(name, tmp_path), platforms.find(name)
    out = tmp_path / f"code{platform.suffix}"
    contents = []
    for _ in range(2):
        linker.link(platform, [item], out)
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]
    assert contents[0].startswith(MAGIC[platform.suffix])
    assert b"memcpy" in contents[0]


def test_android_libraries_name_what_they_need_and_lie_on_16_kib_pages(tmp_path: Path) -> None:
    out = tmp_path / "libcode.so"
    linker.link(platforms.find("android-aarch64"), [compiled("android-aarch64", tmp_path)], out)
    data = out.read_bytes()
    assert b"\0libc.so\0" in data
    assert b"\0libm.so\0" in data
    assert b"\0libcode.so\0" in data
    start, size, count = (int.from_bytes(data[at : at + width], "little") for at, width in ((32, 8), (54, 2), (56, 2)))
    headers = [data[start + index * size : start + (index + 1) * size] for index in range(count)]
    loaded = [header for header in headers if int.from_bytes(header[:4], "little") == 1]
    assert loaded
    assert all(int.from_bytes(header[48:56], "little") == 16384 for header in loaded)


@pytest.mark.parametrize("name", ["macos-arm64", "ios-arm64"])
def test_apples_libraries_are_signed(name: str, tmp_path: Path) -> None:
    out = tmp_path / "code.dylib"
    linker.link(platforms.find(name), [compiled(name, tmp_path)], out)
    data = out.read_bytes()
    digests = macho.page_digests(data)
    assert digests
    assert all(data[slot : slot + 32] == digest for slot, digest in digests)


def test_the_target_says_which_c_library(tmp_path: Path) -> None:
    board = tmp_path / "board.yaml"
    board.write_text("backend: tvm\ndescription: A board\narch: [aarch64-dotprod]\nglibc: '2.31'\n")
    assert platforms.of(load(board)).zig == "aarch64-linux-gnu.2.31"
    assert platforms.of(load("cpu")).name == "linux-x86_64"


def test_what_does_not_link_is_an_error_that_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.o"
    broken.write_bytes(b"no object")
    with pytest.raises(InternalError, match="linker failed") as caught:
        linker.link(platforms.find("linux-aarch64"), [broken], tmp_path / "out.so")
    assert "broken.o" in str(caught.value.facts["reason"])
