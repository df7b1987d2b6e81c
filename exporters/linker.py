"""Linking without the toolchain of any system: what the ziglang package holds serves every platform."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import ziglang

from arkinfer.errors import InternalError
from arkinfer.exporters import macho
from arkinfer.exporters.platforms import Platform

OLDEST_IOS = (14, 0)

_EMULATIONS = {"x86_64": "elf_x86_64", "aarch64": "aarch64linux"}  # as ld.lld names them


def version() -> str:
    """Return the version of the ziglang package."""
    return metadata.version("ziglang")


def zig(*arguments: str) -> None:
    """Run zig. Raises InternalError with its first error where it fails."""
    program = Path(ziglang.__path__[0]) / ("zig.exe" if os.name == "nt" else "zig")
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line]
        raise InternalError(
            "the linker failed",
            facts={"command": f"zig {arguments[0]}", "reason": lines[0] if lines else result.stderr[-300:]},
            code="ARK-E714",
        )


def compile_c(platform: Platform, sources: Sequence[Path], out: Path, *options: str) -> None:
    """Compile C files into one object ``out`` of ``platform``. The same files give the same bytes."""
    target, plain = platform.zig, ["-O2", "-g0", "-fPIC", "-fno-sanitize=all", "-std=gnu11", *options]
    if platform.machine == "aarch64":
        plain.append("-mno-outline-atomics")  # else each would be a call into a library of the compiler's
    if platform.system == "android":
        # zig has no headers of Android's C library; those of musl declare the same functions and structures.
        target = "aarch64-linux-musl"
        plain += ["-fno-stack-protector", "-fno-builtin-bcmp"]
    zig("cc", "-target", target, *plain, "-c", *map(str, sources), "-o", str(out))


def link_c(platform: Platform, item: Path, out: Path, program: bool = False) -> None:
    """Link an object that calls the C library into a shared library, or a program for Linux."""
    if platform.system == "linux":
        kind = [] if program else ["-shared", f"-Wl,-soname,{out.name}"]
        plain = ["-s", "-rtlib=none", "-Wl,--build-id=none", f"-Wl,-z,max-page-size={platform.page}"]
        zig("cc", "-target", platform.zig, *kind, *plain, "-o", str(out), str(item), "-lm", "-lpthread", "-ldl")
    elif platform.system == "android":
        link(replace(platform, needed=(*platform.needed, "libdl.so")), [item], out)
    else:
        link(platform, [item], out)


def link(platform: Platform, objects: Sequence[str | Path], out: Path) -> None:
    """Link ``objects`` into the library ``out`` of ``platform``; symbols that they lack are the loader's to find.

    The same objects give the same bytes.
    """
    files = [str(item) for item in objects]
    if platform.suffix == ".dylib":
        name = f"-Wl,-install_name,@rpath/{out.name}"
        plain = ["-shared", "-nostdlib", "-lSystem", "-Wl,-undefined,dynamic_lookup", name]
        zig("cc", "-target", platform.zig, *plain, "-o", str(out), *files)
        if platform.system == "ios":
            macho.retarget(out, macho.IOS, OLDEST_IOS)
    else:
        with tempfile.TemporaryDirectory() as folder:
            stubs = [stub(platform, soname, Path(folder)) for soname in platform.needed]
            named = ["-soname", out.name] if platform.system == "android" else []
            pages = ["-z", f"max-page-size={platform.page}"]
            _elf(platform, ["-s", *pages, *named, "-o", str(out), *files, *stubs])


def stub(platform: Platform, soname: str, folder: Path) -> str:
    """Make an empty library called ``soname`` in ``folder``: what links with it says that it needs the real one."""
    source, item, out = folder / "empty.c", folder / "empty.o", folder / soname
    source.write_text("")
    zig("cc", "-target", platform.zig, "-g0", "-c", str(source), "-o", str(item))
    _elf(platform, ["-soname", soname, "-o", str(out), str(item)])
    return str(out)


def _elf(platform: Platform, arguments: Sequence[str]) -> None:
    zig("ld.lld", "-m", _EMULATIONS[platform.machine], "-shared", "--build-id=none", *arguments)
