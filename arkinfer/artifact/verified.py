"""This user's record of artifacts whose digests were checked, so that the second open need not read every byte.

A record is an empty file whose name digests the manifest and the device, inode, size and times of every file: any
write, copy or replacement changes the name. ctime is part of it because, unlike mtime, it cannot be set back.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

_LIMIT = 500


def folder() -> Path:
    """Return the folder of the records: below $ARKINFER_CACHE, $XDG_CACHE_HOME/arkinfer or ~/.cache/arkinfer."""
    own = os.environ.get("ARKINFER_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arkinfer"
    return base / "verified"


def key(digest: str, files: Mapping[str, os.stat_result]) -> str:
    """Return the record's name for the artifact with manifest ``digest`` whose files have these stats."""
    state = hashlib.sha256(digest.encode())
    for name, status in sorted(files.items()):
        facts = (name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        state.update(repr(facts).encode())
    return state.hexdigest()


def known(record: str) -> bool:
    """Tell whether this user recorded the check; never true if others could have written the record."""
    place = _private()
    return place is not None and (place / record).is_file()


def remember(record: str) -> None:
    """Record a check that passed. Without a writable private folder nothing is kept and the next open checks again."""
    place = _private(create=True)
    if place is None:
        return
    try:
        os.close(os.open(place / record, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        records = sorted(place.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)
        for old in records[:-_LIMIT]:
            old.unlink(missing_ok=True)
    except OSError:
        return


def _private(create: bool = False) -> Path | None:
    try:
        place = folder()
        if create:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.lstat()
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return place if private else None
