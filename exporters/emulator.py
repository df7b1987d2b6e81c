"""qemu's emulation of single programs: how code for processors that this machine is not is run here."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

PACKAGE = "qemu-user-static"  # as Debian and Ubuntu call it; elsewhere qemu-user
_PROGRAMS = ("qemu-aarch64-static", "qemu-aarch64")

# Level -> a processor that has it and as little more as can be: an instruction beyond the level stops the program.
PROCESSORS: Mapping[str, str] = {
    "aarch64-i8mm": "max,sve=off,sme=off",
    "aarch64-dotprod": "cortex-a76",
}


def find() -> str | None:
    """Return the emulator's path, or None where it is not installed."""
    return next((path for name in _PROGRAMS if (path := shutil.which(name))), None)


def command(emulator: str, processor: str, program: Path) -> list[str]:
    """Return the command that runs ``program``, linked statically for Linux, on a ``processor`` of qemu's names."""
    return [emulator, "-cpu", processor, str(program)]
