"""The header of a GGUF file, versions 2 and 3 (ggml's docs/gguf.md), read in Python and trusted in nothing.

Every length is checked against the file, and every count against a limit, before anything of that size is made; tensors
must lie inside the file, aligned and apart.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from arkinfer.errors import UserError

MAX_TENSORS = 1 << 17
MAX_KEYS = 1 << 12
MAX_ITEMS = 1 << 22  # of an array; the largest vocabularies known have 300,000 tokens and as many merges
MAX_STRING = 16 << 20  # a chat template is a string
MAX_NAME = 512
MAX_METADATA_BYTES = 512 << 20
MAX_ALIGNMENT = 1 << 16
MAX_AXES = 4

# ggml's number and name of a type, the weights in a block, the bytes of a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
}  # fmt: skip
_NUMBERS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies; ``shape`` is (N, K) or (K,), rows first, as transformers has it."""

    file: Path
    type: str
    shape: tuple[int, ...]
    start: int
    block: int  # weights
    block_bytes: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.block * self.block_bytes

    @property
    def nbytes(self) -> int:
        rows = 1
        for extent in self.shape[:-1]:
            rows *= extent
        return rows * self.row_bytes


@dataclass(frozen=True)
class GgufHeader:
    """``metadata`` holds numbers, strings, booleans, lists of strings and numpy arrays of numbers."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def unsound(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file.name} is not a sound GGUF file: {reason}",
        facts={"file": file},
        hint="copy or fetch the file again; an interrupted copy is the usual cause",
        code="ARK-E165",
    )


def read_gguf(file: Path) -> GgufHeader:
    """Read and check the header of ``file``; no tensor byte is touched. Raises UserError if it is malformed."""
    with file.open("rb") as stream:
        return _Header(file, stream).read()


class _Header:
    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.stream = file, stream
        self.size = file.stat().st_size
        self.position = 0

    def bad(self, reason: str) -> UserError:
        return unsound(self.file, reason)

    def take(self, count: int, what: str) -> bytes:
        if count > min(self.size, MAX_METADATA_BYTES) - self.position:
            raise self.bad(f"{what} needs {count} bytes at byte {self.position}, and the file has {self.size}")
        data = self.stream.read(count)
        if len(data) != count:
            raise self.bad("it became shorter while it was read")
        self.position += count
        return data

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind), what))[0]

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        length = self.number("<Q", what)
        if length > limit:
            raise self.bad(f"{what} claims a text of {length} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8") from error

    def name(self, what: str, known: dict[str, Any]) -> str:
        name = self.string(f"the name of a {what}", MAX_NAME)
        if not name or not name.isprintable():
            raise self.bad(f"a {what} has the name {name[:80]!r}")
        if name in known:
            raise self.bad(f"the {what} {name} is there twice")
        return name

    def value(self, kind: int, what: str) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _BOOL:
            return self.boolean(self.number("B", what), what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.bad(f"{what} has the unknown type {kind}")
        item, count = self.number("<I", what), self.number("<Q", what)
        if count > MAX_ITEMS:
            raise self.bad(f"{what} claims {count} items")
        if item in _NUMBERS:
            dtype = np.dtype(_NUMBERS[item])
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if item == _BOOL:
            return [self.boolean(byte, what) for byte in self.take(count, what)]
        if item != _STRING:  # arrays of arrays too: nobody writes them
            raise self.bad(f"{what} is an array of the unknown type {item}")
        if count * 8 > self.size - self.position:
            raise self.bad(f"{what} claims {count} texts, and the file has {self.size} bytes")
        return [self.string(what) for _ in range(count)]

    def boolean(self, byte: int, what: str) -> bool:
        if byte > 1:
            raise self.bad(f"{what} is neither true nor false")
        return bool(byte)

    def read(self) -> GgufHeader:
        if self.take(4, "the signature") != b"GGUF":
            raise self.bad("it does not begin with GGUF")
        version = self.number("<I", "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian" if swapped in (2, 3) else f"version {version}"
            raise self.bad(f"it is {what}; versions 2 and 3 in little-endian order are read")
        tensors, keys = self.number("<Q", "the number of tensors"), self.number("<Q", "the number of keys")
        if tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise self.bad(f"it claims {tensors} tensors and {keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.name("key", metadata)
            metadata[key] = self.value(self.number("<I", key), key)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.bad(f"general.alignment is {alignment!r}"[:200])
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self.name("tensor", found)
            found[name] = self.tensor(name)
        base = self.position + -self.position % alignment
        return GgufHeader(metadata, self.place(found, base, alignment))

    def tensor(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Return the shape, type and offset that the file states for a tensor."""
        axes = self.number("<I", f"tensor {name}")
        if not 1 <= axes <= MAX_AXES:
            raise self.bad(f"tensor {name} has {axes} axes")
        shape = tuple(self.number("<Q", f"tensor {name}") for _ in range(axes))[::-1]
        kind, offset = self.number("<I", f"tensor {name}"), self.number("<Q", f"tensor {name}")
        if not all(0 < extent < 1 << 40 for extent in shape):
            raise self.bad(f"tensor {name} has the shape {list(shape)}")
        if kind not in TYPES:
            raise UserError(
                f"tensor {name} is stored in a type that is not read",
                facts={"file": self.file, "ggml type": kind, "read": ", ".join(name for name, _, _ in TYPES.values())},
                hint="convert the model to Q8_0, Q4_0 or F16: llama-quantize",
                code="ARK-E166",
            )
        if shape[-1] % TYPES[kind][1]:
            raise self.bad(f"tensor {name} has rows of {shape[-1]}, which {TYPES[kind][0]} cannot hold")
        return shape, kind, offset

    def place(
        self, found: dict[str, tuple[tuple[int, ...], int, int]], base: int, alignment: int
    ) -> dict[str, GgufTensor]:
        tensors = {}
        for name, (shape, kind, offset) in found.items():
            tensor = GgufTensor(self.file, TYPES[kind][0], shape, base + offset, *TYPES[kind][1:])
            if offset % alignment:
                raise self.bad(f"tensor {name} is not aligned to {alignment} bytes")
            if tensor.start + tensor.nbytes > self.size:
                end = tensor.start + tensor.nbytes
                raise self.bad(f"tensor {name} ends at byte {end}, and the file has {self.size}")
            tensors[name] = tensor
        end = base
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise self.bad(f"tensor {name} overlaps its neighbour")
            end = tensor.start + tensor.nbytes
        return tensors
