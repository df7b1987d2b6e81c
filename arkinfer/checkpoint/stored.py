"""How a checkpoint holds one logical weight: known from headers alone, read a few rows at a time.

Whatever the file format, a weight has the name, shape (N, K) and row order of transformers' model. Nothing here loads
torch: `arkinfer plan` answers from these layouts.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arkinfer.artifact.tensors import ITEM_BYTES, NUMPY, TensorEntry
from arkinfer.errors import UserError

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Layout:
    """The form of one stored weight.

    ``format`` and ``group`` are those of arkinfer.ops.linear ("dense": floats). ``dtype`` is safetensors' name for the
    dense elements, or for the scales. ``zeros``: it has zero points of its own. ``order`` is empty, or a digest of the
    permutation of its columns (GPTQ act-order): weights with equal digests are permuted alike. ``scheme`` and ``bits``
    tell people what the checkpoint calls it.
    """

    format: str
    shape: tuple[int, ...]
    dtype: str
    group: int = 0
    zeros: bool = False
    order: str = ""
    scheme: str = ""
    bits: int = 0

    @property
    def quantised(self) -> bool:
        return self.format != "dense"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, defaults left out."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value not in ("", 0, False)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layout:
        return cls(**{**values, "shape": tuple(values["shape"])})


@dataclass(frozen=True)
class Parts:
    """Some rows of a weight in the canonical form of arkinfer.quant.packed; bfloat16 comes as its uint16 bits.

    weight (n, bytes or K), scales (n, G) and zeros (n, G) uint8 where the format has them.
    """

    weight: np.ndarray
    scales: np.ndarray | None = None
    zeros: np.ndarray | None = None


class StoredWeight(ABC):
    """One weight of an opened checkpoint."""

    layout: Layout

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that must be read from the files."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Parts:
        """Read rows ``start`` to ``stop`` (of a vector: elements). Raises UserError where the file cannot be read."""

    def order(self) -> np.ndarray | None:
        """Return (K,) int32, the input that each packed column multiplies, or None where columns are in order."""
        return None


class DenseWeight(StoredWeight):
    """Floats as they lie in a safetensors file."""

    def __init__(self, entry: TensorEntry) -> None:
        self.entry = entry
        self.layout = Layout("dense", entry.shape, entry.dtype)

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    def rows(self, start: int, stop: int) -> Parts:
        return Parts(read_rows(self.entry, start, stop))


def read_rows(entry: TensorEntry, start: int, stop: int) -> np.ndarray:
    """Read rows ``start`` to ``stop`` of a tensor's first axis into new memory; bfloat16 comes as its uint16 bits.

    Read, not mapped: the pages of a mapping count as this process's memory for as long as it lasts.
    """
    shape = (stop - start, *entry.shape[1:])
    count = 1
    for extent in shape[1:]:
        count *= extent
    stride = count * ITEM_BYTES[entry.dtype]
    data = read_bytes(entry.file, entry.start + start * stride, stride * shape[0])
    array: np.ndarray = data.view(NUMPY[entry.dtype]).reshape(shape)
    return array


def read_tensor(entry: TensorEntry) -> np.ndarray:
    """Read a whole tensor into new memory."""
    return read_rows(entry, 0, entry.shape[0])


def read_bytes(file: Path, offset: int, count: int) -> np.ndarray:
    """Return ``count`` bytes of ``file`` from ``offset`` on as uint8. Raises UserError if it has fewer by now."""
    data = np.empty(count, np.uint8)
    read_into(file, data[None], [offset])
    return data


def read_into(file: Path, rows: np.ndarray, offsets: Iterable[int]) -> None:
    """Fill each of ``rows`` (n, count) uint8 from its offset in ``file`` on. Raises UserError if that ends earlier."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UserError(
            f"{file.name} is not on this machine: only its header was read",
            facts={"file": file},
            hint="arkinfer build fetches it",
            code="ARK-E164",
        ) from error
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be read", facts={"file": file, "reason": error}, code="ARK-E164"
        ) from error
    try:
        for row, offset in zip(rows, offsets, strict=True):
            view, count, done = row.data, len(row), 0
            while done < count:
                got = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
                if not got:
                    raise UserError(
                        f"{file.name} became shorter while it was read",
                        facts={"file": file},
                        hint="complete the download, and build again",
                        code="ARK-E121",
                    )
                done += got
    finally:
        os.close(descriptor)
