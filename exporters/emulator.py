"""qemu's emulation of single programs: how code for processors that this machine is not is run here."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from arkinfer.errors import UnsupportedError

PACKAGES = ("qemu-user-static", "libc6-arm64-cross")  # as Debian and Ubuntu call them
_PROGRAMS = ("qemu-aarch64-static", "qemu-aarch64")
_ROOTS = (Path("/usr/aarch64-linux-gnu"), Path("/"))  # where a C library for aarch64 may be
_LOADER = "lib/ld-linux-aarch64.so.1"

# Level -> a processor that has it and as little more as can be: an instruction beyond the level stops the program.
PROCESSORS: Mapping[str, str] = {
    "aarch64-i8mm": "max,sve=off,sme=off",
    "aarch64-dotprod": "cortex-a76",
}


def find() -> str | None:
    """Return the emulator's path, or None where it is not installed."""
    return next((path for name in _PROGRAMS if (path := shutil.which(name))), None)


def root() -> Path:
    """Return the folder with the C library that programs for aarch64 load. Raises UnsupportedError without one."""
    found = next((folder for folder in _ROOTS if (folder / _LOADER).exists()), None)
    if found is None:
        raise _missing("a C library for it")
    return found


def command(processor: str, root: Path | None = None) -> list[str]:
    """Return what goes before a program for Linux to run it on a ``processor`` of qemu's names.

    ``root`` holds the libraries of a program that loads some. Raises UnsupportedError without the emulator.
    """
    program = find()
    if program is None:
        raise _missing("qemu")
    return [program, "-cpu", processor, *([] if root is None else ["-L", str(root)])]


def _missing(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"code for aarch64 runs here only under emulation, and {what} is not installed",
        hint=f"apt-get install {' '.join(PACKAGES)}",
        code="ARK-E317",
    )
