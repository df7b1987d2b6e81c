"""Where the weights of an ONNX file lie, read from its bytes before any runtime sees them.

Of the format (https://onnx.ai/onnx, a protocol buffer) only what can hold a tensor is followed; the rest is skipped.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from arkinfer.errors import ArtifactError

_DEEPEST = 32
_EXTERNAL_DATA, _KEY, _VALUE, _NAME = 13, 1, 2, 8
# Message -> its fields that are messages worth following, by number.
_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "training": {1: "graph", 2: "graph"},
}


@dataclass(frozen=True)
class External:
    """A tensor outside the file: where it says that its bytes lie."""

    name: str
    location: str
    offset: int
    length: int


def check(file: Path, allowed: Mapping[str, object]) -> None:
    """Compare every tensor that ``file`` keeps outside itself with what lies beside it.

    ``allowed`` are the files that an artifact lists. Raises ArtifactError (ARK-E513) where one is kept elsewhere, in a
    link, or beyond the end of its file.
    """
    for tensor in external(file):
        if tensor.location not in allowed or "/" in tensor.location:
            raise _refused(file, tensor, "it lies outside the artifact")
        try:
            found = os.lstat(file.parent / tensor.location)
        except OSError as error:
            raise _refused(file, tensor, f"its file cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise _refused(file, tensor, "its file is a link, or no plain file")
        if tensor.offset + tensor.length > found.st_size:
            raise _refused(file, tensor, f"it ends at byte {tensor.offset + tensor.length} of {found.st_size}")


def external(file: Path) -> list[External]:
    """Return every tensor that ``file`` keeps outside itself. Raises ArtifactError for what is no ONNX model."""
    data = memoryview(file.read_bytes())
    try:
        return list(_walk(data, "model", 0))
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{file.name} is not a sound ONNX file",
            facts={"file": file, "reason": error},
            hint="build the artifact again: arkinfer build MODEL -o NAME.ark --force",
            code="ARK-E513",
        ) from error


def _refused(file: Path, tensor: External, reason: str) -> ArtifactError:
    return ArtifactError(
        f"a weight of {file.name} is not where it should be: {reason}",
        facts={"weight": tensor.name[:200], "its file": tensor.location[:200]},
        hint="copy the artifact again, or build it again: arkinfer build MODEL -o NAME.ark --force",
        code="ARK-E513",
    )


def _walk(data: memoryview, kind: str, depth: int) -> Iterator[External]:
    if depth > _DEEPEST:
        raise ValueError("it is nested too deep")
    if kind == "tensor":
        yield from _tensor(data)
        return
    for number, value in _fields(data):
        if number in _MESSAGES[kind] and isinstance(value, memoryview):
            yield from _walk(value, _MESSAGES[kind][number], depth + 1)


def _tensor(data: memoryview) -> Iterator[External]:
    name, entries = "", {}
    for number, value in _fields(data):
        if number == _NAME and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif number == _EXTERNAL_DATA and isinstance(value, memoryview):
            pair = {key: str(text, "utf-8") for key, text in _fields(value) if isinstance(text, memoryview)}
            if pair.get(_KEY, "") in entries:  # readers differ in which one counts
                raise ValueError(f"the tensor {name[:80]!r} says twice where it lies")
            entries[pair.get(_KEY, "")] = pair.get(_VALUE, "")
    if entries:
        offset, length = (entries.get(key, "") for key in ("offset", "length"))
        if not (offset.isdecimal() and length.isdecimal() and len(offset) < 20 and len(length) < 20):
            raise ValueError(f"the tensor {name[:80]!r} does not say which bytes it takes")
        yield External(name, entries.get("location", ""), int(offset), int(length))


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield number and value of each field: bytes of a length-delimited one, 0 for fixed ones."""
    place = 0
    while place < len(data):
        key, place = _number(data, place)
        wire = key & 7
        if wire == 0:
            value, place = _number(data, place)
            yield key >> 3, value
        elif wire == 2:
            length, place = _number(data, place)
            if place + length > len(data):
                raise ValueError("a field is longer than what holds it")
            yield key >> 3, data[place : place + length]
            place += length
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
            yield key >> 3, 0
        else:
            raise ValueError(f"a field has the unknown type {wire}")


def _number(data: memoryview, place: int) -> tuple[int, int]:
    """Return the variable-length integer at ``place``, and where it ends."""
    value = 0
    for index in range(10):
        byte = data[place + index]
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, place + index + 1
    raise ValueError("a number is too long")
