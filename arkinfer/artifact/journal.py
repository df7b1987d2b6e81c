"""The journal of an unfinished weight file: what of it is complete, so that another build can go on where one died.

A line is a checksum and a JSON object: first the key of the build, then one for each finished part. It is written only
after the bytes that it speaks of are on the disk; whoever resumes compares them with its digest all the same.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NAME = ".journal"  # artifacts hold no hidden files, so this can never be taken for a part of one
_FORMAT = 1
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Part:
    """A finished part of the file: it ends before byte ``stop`` and begins where the part before it ends.

    ``sha256`` digests its bytes in the file; ``origin`` what they were made from, see exporters.base.Payload.
    """

    name: str
    stop: int
    sha256: str
    origin: str


@dataclass(frozen=True)
class Journal:
    """A journal at ``path`` of a build that ``key`` determines byte for byte."""

    path: Path
    key: str

    @staticmethod
    def key_of(path: Path) -> str | None:
        """Return the key of the journal at ``path``, or None if there is no sound one."""
        lines = _lines(path)
        if not lines or lines[0].get("format") != _FORMAT:
            return None
        key = lines[0].get("key")
        return key if isinstance(key, str) else None

    def read(self) -> list[Part]:
        """Return the finished parts in order; a line that was cut off ends the list."""
        if self.key_of(self.path) != self.key:
            return []
        parts: list[Part] = []
        for line in _lines(self.path)[1:]:
            try:
                part = Part(**line)
            except TypeError:
                break
            if not isinstance(part.stop, int) or part.stop <= (parts[-1].stop if parts else 0):
                break
            parts.append(part)
        return parts

    def start(self, parts: Iterable[Part] = ()) -> None:
        """Begin anew with ``parts``."""
        staging = self.path.with_name(NAME + "-new")
        staging.write_text(_text({"format": _FORMAT, "key": self.key}), encoding="utf-8")
        os.replace(staging, self.path)
        self.append(parts)

    def append(self, parts: Iterable[Part]) -> None:
        """Add finished parts; their bytes must be on the disk."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.writelines(_text(asdict(part)) for part in parts)
            stream.flush()
            os.fsync(stream.fileno())


def _text(line: dict[str, object]) -> str:
    text = json.dumps(line, separators=(",", ":"))
    return f"{_checksum(text)} {text}\n"


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of the journal up to the first line that is damaged or was cut off."""
    found: list[dict[str, Any]] = []
    try:
        if path.is_symlink() or path.stat().st_size > _MAX_BYTES:
            return []
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    for line in text.split("\n")[:-1]:
        checksum, _, body = line.partition(" ")
        try:
            value = json.loads(body) if checksum == _checksum(body) else None
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return found
