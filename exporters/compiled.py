"""Compiled libraries kept between builds: the same program, kernels and compiler give the same bytes.

Entries lie in this user's cache folder under the SHA-256 of everything that the compiler reads. An entry that was
damaged or only half written does not match its recorded digest and is compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from arkinfer.artifact import verified
from arkinfer.exporters.platforms import Platform

LARGEST = 200  # libraries kept; the oldest go first


@cache
def _sources() -> bytes:
    """Return the digest of the code that turns a program into a library."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    names = ("kernels/raised.c", "linker.py", "macho.py", "platforms.py", "program.py", "relax.py")
    for file in sorted([*(here / name for name in names), *(here / "kernels" / "tir").glob("*.py")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.digest()


def key(program: str, isa: str, platform: Platform, toolchain: str) -> str:
    """Return the name of the library that ``program`` (JSON) compiles to for ``isa`` with these tool versions."""
    parts = (program.encode(), isa.encode(), repr(platform).encode(), toolchain.encode(), _sources())
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _folder() -> Path:
    return verified.folder().parent / "compiled"


def fetch(name: str, out: Path, suffix: str = ".so") -> bool:
    """Copy the file called ``name`` to ``out`` if it is kept and whole; return whether it was."""
    file = _folder() / f"{name}{suffix}"
    try:
        status = file.parent.lstat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return False  # others could have put code there
        recorded = file.with_suffix(".sha256").read_text(encoding="ascii")
        data = file.read_bytes()
    except (OSError, UnicodeDecodeError):
        return False
    if hashlib.sha256(data).hexdigest() != recorded:
        return False
    out.write_bytes(data)
    with contextlib.suppress(OSError):
        os.utime(file)
    return True


def keep(name: str, library: Path, suffix: str = ".so", largest: int = LARGEST) -> None:
    """Keep a copy of ``library`` under ``name``, and the ``largest`` newest of its suffix.

    A cache that cannot be written is no error.
    """
    folder = _folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            copy = Path(staging) / "library"
            shutil.copyfile(library, copy)
            os.replace(copy, folder / f"{name}{suffix}")
            copy.write_text(digest, encoding="ascii")
            os.replace(copy, folder / f"{name}.sha256")
        entries = sorted(folder.glob(f"*{suffix}"), key=lambda file: file.stat().st_mtime)
        for old in entries[:-largest]:
            old.unlink(missing_ok=True)
            old.with_suffix(".sha256").unlink(missing_ok=True)
