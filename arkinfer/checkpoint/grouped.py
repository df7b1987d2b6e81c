"""Grouped integers of any checkpoint format on their way into the canonical form of arkinfer.quant.packed."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from arkinfer.artifact.tensors import ITEM_BYTES, NUMPY, TensorEntry
from arkinfer.checkpoint.quantization import misfit
from arkinfer.checkpoint.stored import Layout, Parts, StoredWeight, read_bytes, read_into, read_tensor
from arkinfer.errors import UnsupportedError

FORMATS = {2: "int2", 3: "int4", 4: "int4", 8: "int8"}  # the canonical format that holds codes of so many bits
SCALES = ("F16", "BF16", "F32")
SMALLEST_GROUP = 16
RUN = 32  # columns whose codes fill whole 32-bit words at any width


@dataclass(frozen=True)
class Grid:
    """A quantised weight's numbers: ``size`` inputs share a scale (``width`` of them: one scale a row)."""

    rows: int  # N
    width: int  # K
    bits: int
    size: int

    @property
    def groups(self) -> int:
        return -(-self.width // self.size)

    @property
    def group(self) -> int:
        """The canonical group: ``size``, or a divisor of it that the short last group is a multiple of as well."""
        extent = gcd(self.size, self.width % self.size) if self.width % self.size else self.size
        return 0 if extent == self.width else extent

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Repeat (n, groups) for the canonical groups: (n, G)."""
        if self.width % self.size == 0:
            return np.ascontiguousarray(values)
        spread: np.ndarray = values[:, np.arange(0, self.width, self.group) // self.size]
        return spread


class GroupedWeight(StoredWeight):
    """A weight whose integers share scales, and perhaps zero points, in groups along K.

    ``zeros`` says whether they are other than the middle code; ``order`` is the `digest` of the permutation that makes
    groups contiguous, or empty.
    """

    def __init__(self, scheme: str, grid: Grid, scales: TensorEntry, zeros: bool, order: str, nbytes: int) -> None:
        self.grid = grid
        self._nbytes = nbytes
        self.layout = Layout(
            FORMATS[grid.bits], (grid.rows, grid.width), scales.dtype, grid.group, zeros, order, scheme, grid.bits
        )

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @abstractmethod
    def read_stream(self, start: int, stop: int) -> np.ndarray:
        """Return rows as (n, bytes) uint8: each row's codes in file order, ``bits`` wide, lowest bits first."""

    @abstractmethod
    def read_scales(self, start: int, stop: int) -> np.ndarray:
        """Return (n, groups) scales."""

    @abstractmethod
    def read_zeros(self, start: int, stop: int) -> np.ndarray:
        """Return (n, groups) uint8 codes of zero; asked for only where the weight has them."""

    def rows(self, start: int, stop: int) -> Parts:
        stream, bits = self.read_stream(start, stop), self.grid.bits
        order = self.order()
        if order is not None or bits == 3:
            codes = unpack(stream, bits)[:, : self.grid.width]
            if order is not None:
                codes = codes[:, order]
            if bits == 3 and not self.layout.zeros:
                codes = codes + np.uint8(4)  # the middle of three bits becomes the middle of four
            stream = pack(codes, 4 if bits == 3 else bits)
        weight = (stream ^ np.uint8(128)).view(np.int8) if bits == 8 else stream
        zeros = self.grid.spread(self.read_zeros(start, stop)) if self.layout.zeros else None
        return Parts(weight, self.grid.spread(self.read_scales(start, stop)), zeros)


def here(entry: TensorEntry) -> bool:
    """Tell whether the tensor can be read: of a checkpoint on a server, `arkinfer plan` fetches only the headers."""
    return entry.file.exists()


def digest(order: np.ndarray | None) -> str:
    """Return what Layout.order says of a permutation."""
    return "" if order is None else hashlib.sha256(order.tobytes()).hexdigest()[:16]


def unpack(stream: np.ndarray, bits: int) -> np.ndarray:
    """Return the (n, fields) uint8 codes in (n, bytes) uint8: one bit stream a row, lowest bits first."""
    if bits == 8:
        return stream
    taken = 3 if bits == 3 else 1  # bytes after which a field begins at a byte again
    pieces = stream.reshape(len(stream), -1, taken)
    words = pieces[..., 0]
    if taken == 3:
        wide = pieces.astype(np.uint32)
        words = wide[..., 0] | wide[..., 1] << 8 | wide[..., 2] << 16
    fields = taken * 8 // bits
    codes = np.empty((*words.shape, fields), np.uint8)
    for index in range(fields):
        codes[..., index] = words >> words.dtype.type(bits * index) & words.dtype.type((1 << bits) - 1)
    return codes.reshape(len(stream), -1)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Invert `unpack` for 2, 4 and 8 bits: (n, K) uint8 codes to (n, bytes) uint8; a short tail holds zeros."""
    fields = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % fields)))
    packed = np.ascontiguousarray(padded[:, 0::fields])
    for index in range(1, fields):
        packed |= padded[:, index::fields] << np.uint8(bits * index)
    return packed


def middle(bits: int) -> int:
    """Return the code of zero of a weight without zero points."""
    return 1 << bits - 1


def read_columns(entry: TensorEntry, start: int, stop: int) -> np.ndarray:
    """Read columns ``start`` to ``stop`` of a matrix (R, C): (R, stop - start), and no other byte of it."""
    rows, columns = entry.shape
    item = ITEM_BYTES[entry.dtype]
    if (start, stop) == (0, columns):
        data = read_bytes(entry.file, entry.start, entry.nbytes)
    else:
        data = np.empty(rows * (stop - start) * item, np.uint8)
        offsets = range(entry.start + start * item, entry.stop, columns * item)
        read_into(entry.file, data.reshape(rows, -1), offsets)
    array: np.ndarray = data.view(NUMPY[entry.dtype]).reshape(rows, stop - start)
    return array


def read_field_columns(entry: TensorEntry, bits: int, start: int, stop: int) -> np.ndarray:
    """Return codes ``start`` to ``stop`` of each row (R, n) uint8, of int32 words packed along the rows."""
    first, last = start // RUN * RUN, -(-stop // RUN) * RUN
    words = read_columns(entry, first * bits // 32, min(last * bits // 32, entry.shape[1]))
    return unpack(as_bytes(words), bits)[:, start - first : stop - first]


def as_bytes(words: np.ndarray) -> np.ndarray:
    """Return (n, W) int32 as its (n, 4 W) bytes, lowest first."""
    return np.ascontiguousarray(words).view(np.uint8)


def expect(name: str, entry: TensorEntry, dtypes: Sequence[str], shape: tuple[int, ...]) -> None:
    """Raise UserError where the tensor ``name`` has another dtype or shape than its neighbours imply."""
    if entry.dtype not in dtypes:
        raise misfit(name, "has a dtype that its format does not use", expected=" or ".join(dtypes), found=entry.dtype)
    if entry.shape != shape:
        raise misfit(name, "has the wrong shape", expected=list(shape), found=list(entry.shape))


def grid(name: str, rows: int, width: int, bits: int, size: int) -> Grid:
    """Return the checked numbers of the weight ``name``; ``size`` -1 means one group.

    Raises UserError where they make no matrix, UnsupportedError for a short last group that no kernel's group divides.
    """
    if rows < 1 or width < 1:
        raise misfit(name, "is empty", shape=[rows, width])
    if size != -1 and size < 1:
        raise misfit(name, "has an impossible group size", group_size=size)
    found = Grid(rows, width, bits, width if size == -1 else min(size, width))
    if width % found.size and found.group < SMALLEST_GROUP:
        raise UnsupportedError(
            f"{name} has groups of {found.size} and a last one of {width % found.size}",
            facts={"inputs": width, "smallest common group": found.group},
            hint=f"quantise it with a group size that divides {width}",
            code="ARK-E313",
        )
    if width * bits % 8:
        raise UnsupportedError(
            f"{name} has rows that end within a byte", facts={"inputs": width, "bits": bits}, code="ARK-E313"
        )
    return found


def grouped_order(name: str, entry: TensorEntry, grid: Grid) -> np.ndarray | None:
    """Return `input_order` of the tensor ``entry`` (g_idx), checked.

    Raises UserError where a group is out of range or does not have ``grid.size`` members.
    """
    index = read_tensor(entry)
    if int(index.min()) < 0 or int(index.max()) >= grid.groups:
        raise misfit(name, "names a group that there is not", groups=grid.groups, found=f"{index.min()}..{index.max()}")
    members = np.bincount(index, minlength=grid.groups)
    wanted = np.full(grid.groups, grid.size)
    wanted[-1] = grid.width - (grid.groups - 1) * grid.size
    if not np.array_equal(members, wanted):
        wrong = int(np.flatnonzero(members != wanted)[0])
        raise misfit(name, f"gives group {wrong} {members[wrong]} inputs", expected=int(wanted[wrong]))
    return input_order(entry)


def input_order(entry: TensorEntry) -> np.ndarray | None:
    """Return the stable order (K,) int32 of inputs that makes the groups of g_idx contiguous, None if they are."""
    index = read_tensor(entry)
    if bool((index[1:] >= index[:-1]).all()):
        return None
    return np.argsort(index, kind="stable").astype(np.int32)
