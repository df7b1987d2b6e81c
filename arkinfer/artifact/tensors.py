"""Safetensors files, read and written with numpy alone: checked headers, memory maps, 64-byte alignment.

The reader trusts nothing (sizes are checked before anything is allocated, holes and overlaps are refused); the writer
streams tensors one at a time and aligns each to 64 bytes, which vector loads from the mapped file rely on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arkinfer.artifact.journal import Journal, Part
from arkinfer.errors import ArkError, UserError

MAX_HEADER_BYTES = 100 << 20  # the limit that the safetensors format itself sets
MAX_NAME = 512
MAX_AXES = 8
ALIGNMENT = 64
SAVE_BYTES, SAVE_SECONDS = 256 << 20, 1.0  # how much work an interruption may lose

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
NUMPY: Mapping[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: its file, byte range, safetensors dtype name and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def count(self) -> int:
        return self.nbytes // ITEM_BYTES[self.dtype]


def read_header(file: Path, error: type[ArkError] = UserError, code: str = "ARK-E121") -> dict[str, TensorEntry]:
    """Read and check the header of one safetensors file; no tensor byte is touched.

    Raises ``error`` for anything that the format forbids: a header longer than the file, unknown dtypes, shapes that do
    not match their byte range, ranges that overlap, leave holes or pass the end of the file.
    """

    size = file.stat().st_size
    with file.open("rb") as stream:
        length = header_length(stream.read(8), size, file, error, code)
        return parse_header(stream.read(length), size, file, error, code)


def header_length(
    first: bytes, size: int, file: Path, error: type[ArkError] = UserError, code: str = "ARK-E121"
) -> int:
    """Return the bytes of the header of a file of ``size`` bytes that begins with ``first``, its first 8 bytes."""
    length = int.from_bytes(first[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise _unsound(file, f"its header claims {length} bytes and the file has {size}", error, code)
    return length


def parse_header(
    text: bytes, size: int, file: Path, error: type[ArkError] = UserError, code: str = "ARK-E121"
) -> dict[str, TensorEntry]:
    """Check the header ``text`` of ``file``, which has ``size`` bytes: see read_header."""

    def bad(reason: str) -> ArkError:
        return _unsound(file, reason, error, code)

    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as cause:
        raise bad("its header is not JSON, or names something twice") from cause
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    header.pop("__metadata__", None)
    entries: dict[str, TensorEntry] = {}
    base = 8 + len(text)
    for name, fields in header.items():
        if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
            raise bad(f"a tensor has the name {name[:80]!r}")
        try:
            dtype, shape, (start, stop) = fields["dtype"], fields["shape"], fields["data_offsets"]
        except (KeyError, TypeError, ValueError) as cause:
            raise bad(f"tensor {name!r} has a malformed entry") from cause
        if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > MAX_AXES:
            raise bad(f"tensor {name!r} has a malformed entry")
        if dtype not in ITEM_BYTES:
            raise bad(f"tensor {name!r} has the unknown dtype {dtype[:20]!r}")
        if not all(type(value) is int and 0 <= value < 1 << 63 for value in (*shape, start, stop)):
            raise bad(f"tensor {name!r} has a malformed entry")
        count = 1
        for extent in shape:
            count *= extent
        if stop - start != count * ITEM_BYTES[dtype]:
            raise bad(f"tensor {name!r} of shape {shape} does not fill its byte range {start}..{stop}")
        entries[name] = TensorEntry(file, dtype, tuple(shape), base + start, base + stop)
    end = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise bad(f"tensor {name!r} overlaps its neighbour or leaves a hole before it")
        end = entry.stop
    if end != size:
        raise bad(f"its tensors end at byte {end} and the file has {size}")
    return entries


def _unsound(file: Path, reason: str, error: type[ArkError], code: str) -> ArkError:
    return error(
        f"{file.name} is not a sound safetensors file: {reason}",
        facts={"file": file},
        hint="copy or write the file again; an interrupted copy is the usual cause",
        code=code,
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def map_file(file: Path) -> mmap.mmap:
    """Map a file privately. The map is writable (copy on write) because tensor libraries reject read-only buffers."""
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def load(file: Path, error: type[ArkError] = UserError, code: str = "ARK-E121") -> dict[str, np.ndarray]:
    """Return every tensor of ``file`` as a view of its memory map; bfloat16 comes as its uint16 bits."""
    entries = read_header(file, error, code)
    if not any(entry.nbytes for entry in entries.values()):
        return {name: np.empty(entry.shape, NUMPY[entry.dtype]) for name, entry in entries.items()}
    data = map_file(file)
    return {
        name: np.frombuffer(data, NUMPY[entry.dtype], entry.count, entry.start).reshape(entry.shape)
        for name, entry in entries.items()
    }


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = ITEM_BYTES[self.dtype]
        for extent in self.shape:
            count *= extent
        return count


def header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a file that holds ``specs`` in order, and where in the file each tensor ends.

    Every tensor starts at a multiple of 64 bytes in the file; the gaps are tensors of their own named ``~N``, since the
    format allows no holes. An end includes the gap.
    """
    fields: dict[str, Any] = {}
    ends: dict[str, int] = {}
    offset = 0
    for index, (name, spec) in enumerate(specs.items()):
        fields[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
        if gap := -offset % ALIGNMENT:
            fields[f"~{index}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [offset, offset + gap]}
            offset += gap
        ends[name] = offset
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    data = len(text).to_bytes(8, "little") + text
    return data, {name: end + len(data) for name, end in ends.items()}


def write(file: Path, specs: Mapping[str, TensorSpec], chunks: Iterable[tuple[str, Iterable[np.ndarray]]]) -> None:
    """Write ``specs`` in order; ``chunks`` yields each name, in the same order, with its data in consecutive pieces.

    Equal inputs give equal bytes. Raises ValueError when the data do not fill a spec.
    """
    with TensorWriter(file, specs) as writer:
        for (expected, _), (name, pieces) in zip(specs.items(), chunks, strict=True):
            if name != expected:
                raise ValueError(f"tensor {name} was written where {expected} belongs")
            writer.tensor(name, pieces)


class TensorWriter:
    """Writes a safetensors file tensor by tensor, from its beginning or from where a journal says that one stopped.

    ``with TensorWriter(file, specs, journal) as writer``: parts in ``writer.finished`` are in the file already and must
    not be written again; of the others, in order, ``tensor`` writes each tensor and ``finish`` ends the part.
    """

    def __init__(self, file: Path, specs: Mapping[str, TensorSpec], journal: Journal | None = None) -> None:
        self._file, self._specs, self._journal = file, specs, journal
        self._header, self._ends = header(specs)
        self.finished: dict[str, str] = {}  # part -> its origin
        self._digest = hashlib.sha256()
        self._unsaved: list[Part] = []
        self._saved_at = (0, 0.0)  # position and time

    def __enter__(self) -> TensorWriter:
        parts = self._recover() if self._journal is not None else []
        self.finished = {part.name: part.origin for part in parts}
        self._stream = self._file.open("r+b" if parts else "wb")
        if parts:
            self._stream.truncate(parts[-1].stop)
            self._stream.seek(parts[-1].stop)
        else:
            self._stream.write(self._header)
        if self._journal is not None:
            self._journal.start(parts)
        self._saved_at = (self._stream.tell(), time.monotonic())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            # What is finished is worth keeping whatever happened; where the disk is full this fails, once more.
            with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
                self._save()
        finally:
            with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
                self._stream.close()

    def tensor(self, name: str, arrays: Iterable[np.ndarray]) -> None:
        """Write one tensor, given in consecutive pieces. Raises ValueError when they do not fill its spec."""
        for _ in self.pieces(name, arrays):
            pass

    def pieces(self, name: str, arrays: Iterable[np.ndarray]) -> Iterator[int]:
        """Write like ``tensor``, and yield the bytes of each piece when it is written."""
        written = 0
        for array in arrays:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            self._write(data)
            written += data.nbytes
            yield data.nbytes
        if written != self._specs[name].nbytes:
            declared = self._specs[name].nbytes
            raise ValueError(f"tensor {name} has {written} bytes of data and {declared} declared")
        self._write(b"\0" * (-written % ALIGNMENT))
        if self._stream.tell() != self._ends[name]:
            raise ValueError(f"tensor {name} is out of order")

    def finish(self, part: str, origin: str) -> None:
        """End ``part``: everything written since the last call. It is noted in the journal before long."""
        if self._journal is None:
            return
        position = self._stream.tell()
        self._unsaved.append(Part(part, position, self._digest.hexdigest(), origin))
        self._digest = hashlib.sha256()
        if position - self._saved_at[0] >= SAVE_BYTES or time.monotonic() - self._saved_at[1] >= SAVE_SECONDS:
            self._save()

    def _write(self, data: Any) -> None:
        self._stream.write(data)
        if self._journal is not None:
            self._digest.update(data)

    def _save(self) -> None:
        if self._journal is None or not self._unsaved:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._journal.append(self._unsaved)
        self._unsaved = []
        self._saved_at = (self._stream.tell(), time.monotonic())

    def _recover(self) -> list[Part]:
        """Return the parts of the journal whose bytes are in the file as it says."""
        assert self._journal is not None
        parts = self._journal.read()
        try:
            with self._file.open("rb") as stream:
                if stream.read(len(self._header)) != self._header:
                    return []
        except FileNotFoundError:
            return []
        starts = [len(self._header), *(part.stop for part in parts)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            right = list(pool.map(lambda part, start: self._digest_of(start, part.stop) == part.sha256, parts, starts))
        return parts[: right.index(False)] if False in right else parts

    def _digest_of(self, start: int, stop: int) -> str:
        digest = hashlib.sha256()
        with self._file.open("rb") as stream:
            stream.seek(start)
            while start < stop and (data := stream.read(min(1 << 20, stop - start))):
                digest.update(data)
                start += len(data)
        return digest.hexdigest()
