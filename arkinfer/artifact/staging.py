"""Folders in which artifacts are written, beside their destination: locked while their builder lives.

A builder that died leaves its folder. Where that holds finished parts of a weight file, the next build of the same
artifact adopts it; everything else is swept.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from arkinfer.artifact import journal
from arkinfer.artifact.journal import Journal
from arkinfer.artifact.lock import FolderLock
from arkinfer.errors import UserError

ATTEMPTS = 100  # names and renames lost to concurrent builders before giving up
KEEP_SECONDS = 7 * 24 * 3600  # how long finished parts wait for the build that goes on with them
_KIND = "ark-staging"


@dataclass(frozen=True)
class Staging:
    """A staging folder of this process."""

    path: Path
    lock: FolderLock

    def finished_bytes(self) -> int:
        """Return the bytes of finished parts of its weight file, which the next build need not write again."""
        key = Journal.key_of(self.path / journal.NAME)
        parts = [] if key is None else Journal(self.path / journal.NAME, key).read()
        return parts[-1].stop if parts else 0

    def leave(self) -> None:
        """Release the folder for whoever goes on with it."""
        self.lock.release()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()


def make(destination: Path) -> Staging:
    """Make an empty folder for the artifact at ``destination``."""
    for _ in range(ATTEMPTS):
        folder = hidden(destination, _KIND)
        folder.mkdir()
        lock = FolderLock.take(folder)
        # A sweeper may have seen the folder in the instant before it was locked, and removed it.
        if lock is not None and folder.exists():
            return Staging(folder, lock)
        shutil.rmtree(folder, ignore_errors=True)
    raise UserError(f"cannot make a staging folder beside {destination}", code="ARK-E152")


def adopt(destination: Path, key: str) -> Staging | None:
    """Take over what an earlier build of ``destination`` with the same ``key`` finished, or return None.

    Dead builders' work on the same destination under other keys is removed.
    """
    found: Staging | None = None
    for dead in _dead(destination.parent, lambda name: is_hidden(name, destination, _KIND)):
        if Journal.key_of(dead.path / journal.NAME) != key or found is not None:
            dead.remove()
            continue
        # A compiler of the dead builder may be alive and would write into the folder: it must not find it.
        place = hidden(destination, _KIND)
        os.rename(dead.path, place)
        found = Staging(place, FolderLock(place, dead.lock.descriptor))
        for entry in list(place.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.is_symlink() or (entry.name != journal.NAME and entry.suffix != ".safetensors"):
                entry.unlink()  # a link would have its target written over
    return found


def reclaimable(destination: Path) -> int:
    """Return the bytes on disk that dead builders of ``destination`` left: the next one goes on with them, or frees
    them before it writes."""
    total = 0
    for dead in _dead(destination.parent, lambda name: is_hidden(name, destination, _KIND)):
        for folder, _, names in os.walk(dead.path):
            total += sum(os.lstat(os.path.join(folder, name)).st_blocks * 512 for name in names)
        dead.leave()
    return total


def sweep(parent: Path) -> None:
    """Remove what dead builders left in ``parent``, but for finished parts that are not old."""
    for dead in _dead(parent, lambda name: name.startswith(".") and name.endswith(f".{_KIND}")):
        if _is_fresh(dead.path / journal.NAME) and dead.finished_bytes():
            dead.leave()
        else:
            dead.remove()


def _dead(parent: Path, wanted: Callable[[str], bool]) -> Iterator[Staging]:
    """Yield the staging folders in ``parent`` of ``wanted`` names whose builder is certainly dead, locked."""
    for entry in list(parent.iterdir()):
        if wanted(entry.name) and not entry.is_symlink():
            lock = FolderLock.take(entry)
            if lock is not None and lock.held:
                yield Staging(entry, lock)


def _is_fresh(file: Path) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - file.stat().st_mtime < KEEP_SECONDS
    return False


def hidden(destination: Path, kind: str) -> Path:
    """Return a new name of a hidden folder beside ``destination``."""
    return destination.with_name(f".{destination.name}.{secrets.token_hex(8)}.{kind}")


def is_hidden(name: str, destination: Path, kind: str) -> bool:
    """Tell whether ``hidden`` gave ``name`` for ``destination``, and not for one whose name only begins alike."""
    return re.fullmatch(rf"\.{re.escape(destination.name)}\.[0-9a-f]{{16}}\.{kind}", name) is not None
