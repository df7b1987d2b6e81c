"""A lock on a folder that the system drops when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class FolderLock:
    """An advisory exclusive lock on the folder at ``path``; ``descriptor`` is None where nothing is held.

    Some network file systems have no such locks. There nobody can tell a living holder from a dead one, so what an
    unheld lock names must be left alone.
    """

    path: Path
    descriptor: int | None

    @classmethod
    def take(cls, folder: Path) -> FolderLock | None:
        """Lock ``folder`` without waiting; return None if it is gone or another holder lives."""
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            return cls(folder, None)
        return cls(folder, descriptor)

    @property
    def held(self) -> bool:
        return self.descriptor is not None

    def release(self) -> None:
        """Drop the lock; harmless when repeated."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
