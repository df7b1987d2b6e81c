"""Weights from an artifact's file to a device, a piece at a time: at no moment does the host hold more than one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from arkinfer.artifact import tensors
from arkinfer.errors import ArtifactError

PIECE = 64 << 20  # bytes


def upload(file: Path, sizes: Mapping[str, int], put: Callable[[str, int, np.ndarray], None], drop: bool) -> None:
    """Call ``put(name, offset, bytes)`` for every piece of the tensors that ``sizes`` (bytes by name) lists.

    ``drop``: give the system's cached copy of the file back as well, where device and host share their memory. Raises
    ArtifactError, before the first piece, where the file holds other tensors.
    """
    entries = tensors.read_header(file, ArtifactError, "ARK-E511")
    for name, size in sizes.items():
        found = entries[name].nbytes if name in entries else None
        if found != size:
            raise ArtifactError(
                "the artifact's weights are not those of its plan",
                facts={"file": file.name, "tensor": name, "bytes": found or "none", "planned": size},
                hint="arkinfer build MODEL -o NAME.ark --force",
                code="ARK-E511",
            )
    room = np.empty(min(PIECE, max(sizes.values(), default=0)), np.uint8)
    with file.open("rb", buffering=0) as stream:
        for name, entry in sorted(((name, entries[name]) for name in sizes), key=lambda item: item[1].start):
            for start in range(0, entry.nbytes, PIECE):
                piece = room[: min(PIECE, entry.nbytes - start)]
                stream.seek(entry.start + start)
                _fill(stream.readinto, piece, file)
                put(name, start, piece)
                if drop:  # all that was read so far; pages that two pieces share go with the second
                    os.posix_fadvise(stream.fileno(), 0, entry.start + start + piece.size, os.POSIX_FADV_DONTNEED)
        if drop:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # to its end


def _fill(read: Callable[[memoryview], int | None], piece: np.ndarray, file: Path) -> None:
    view, done = piece.data, 0
    while done < len(view):
        count = read(view[done:])
        if not count:
            raise ArtifactError("a weight file ends early", facts={"file": file.name}, code="ARK-E511")
        done += count
