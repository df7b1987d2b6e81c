"""Repacking of weights from the canonical form (arkinfer.ops.linear) to panels, a few rows at a time, and back.

A tensor of an 8B model streams through in slices of whole panels, so memory stays small. Where the stored rows hold no
padding, a chunk's codes of one row are one 32-bit word in both forms: a few shifts reorder sixteen codes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from arkinfer.exporters.kernels.tir.layout import CHUNK, PANEL, code_format, grouping, panels

SLICE_BYTES = 1 << 22  # of codes at one byte each: what a slice of rows may take
# Swaps of bit fields that bring k = 4 * plane + j, lowest bits first, to place j * planes + plane: (shift, mask).
_SWAPS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "int8": (),
    "int4": ((8, 0x0000FF00), (4, 0x00F000F0)),
    "int2": ((6, 0x00CC00CC), (12, 0x0000F0F0)),
    "ternary": ((6, 0x00CC00CC), (12, 0x0000F0F0)),
}

Rows = Callable[[int, int], np.ndarray]  # (first row, row after the last) -> those rows of a canonical array


@dataclass(frozen=True)
class Matrix:
    """The shape of one weight: ``format`` of arkinfer.ops.linear, group 0 for one scale a row.

    ``gated`` weights hold gate rows, then as many up rows; their panels alternate, gate first.
    """

    format: str
    rows: int
    width: int
    group: int = 0
    gated: bool = False

    @property
    def halves(self) -> int:
        return 2 if self.gated else 1

    @property
    def panels(self) -> int:
        return self.halves * panels(self.rows // self.halves)

    @property
    def groups(self) -> int:
        return self.width // (self.group or self.width)

    @property
    def chunks(self) -> int:
        stored = grouping(self.format, self.group, self.width).padded_width(self.width)
        return stored // code_format(self.format).inputs

    @property
    def whole_words(self) -> bool:
        """Tell whether each chunk of a row is four bytes of the canonical row."""
        return self.format in _SWAPS and self.chunks * code_format(self.format).inputs == self.width


@dataclass(frozen=True)
class Slice:
    """Consecutive panels: ``count`` of each half, made of the canonical rows ``start`` to ``stop`` of each half."""

    count: int
    ranges: tuple[tuple[int, int], ...]


def weight_shape(matrix: Matrix) -> tuple[int, int, int]:
    """Return (P, K, 16) for dense weights, (P, C, 64) bytes for packed ones."""
    return (matrix.panels, matrix.width, PANEL) if matrix.format == "dense" else (matrix.panels, matrix.chunks, CHUNK)


def weight(matrix: Matrix, rows: Rows) -> Iterator[np.ndarray]:
    """Yield the panels of a weight in order, some at a time: arrays (p, K, 16) or (p, C, 64) uint8.

    ``rows`` gives canonical rows: floats, or bfloat16 bits as uint16, for dense; int8 (m, K); uint8 (m, K / 2) or
    (m, ceil(K / 4)). Rows beyond the last are zeros.
    """
    for piece in slices(matrix):
        yield weight_panels(matrix, piece, [rows(*part) for part in piece.ranges])


def vectors(matrix: Matrix, rows: Rows) -> Iterator[np.ndarray]:
    """Yield the panels of scales or zero points: ``rows`` gives (m, G), panels are (p, G, 16)."""
    for piece in slices(matrix):
        yield vector_panels(piece, [rows(*part) for part in piece.ranges])


def slices(matrix: Matrix) -> list[Slice]:
    """Return the panels of a weight in order, cut into pieces of bounded size."""
    half = matrix.rows // matrix.halves
    step = max(1, SLICE_BYTES // (PANEL * matrix.width * matrix.halves))  # panels of each half
    found = []
    for first in range(0, panels(half), step):
        count = min(step, panels(half) - first)
        begin, end = first * PANEL, min((first + count) * PANEL, half)
        found.append(Slice(count, tuple((start + begin, start + end) for start in range(0, matrix.rows, half))))
    return found


def weight_panels(matrix: Matrix, piece: Slice, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return one slice of a weight: (p, K, 16) or (p, C, 64) from the canonical rows of each range."""
    block = _interleaved(piece, parts)
    return _dense(block) if matrix.format == "dense" else _packed(matrix, block)


def vector_panels(piece: Slice, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return one slice of scales or zero points: (p, G, 16) from the rows (m, G) of each range."""
    return _dense(_interleaved(piece, parts))


def _interleaved(piece: Slice, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rows in the order of panels, padded with zeros: (16 p, bytes or K)."""
    width = parts[0].shape[1]
    padded = np.zeros((piece.count, len(parts), PANEL, width), parts[0].dtype)
    for half, part in enumerate(parts):
        whole = len(part) // PANEL
        padded[:whole, half] = part[: whole * PANEL].reshape(whole, PANEL, width)
        if whole < piece.count:
            padded[whole, half, : len(part) - whole * PANEL] = part[whole * PANEL :]
    return padded.reshape(-1, width)


def _dense(block: np.ndarray) -> np.ndarray:
    """Interleave rows: (16 p, K) to (p, K, 16)."""
    return np.ascontiguousarray(block.reshape(-1, PANEL, block.shape[1]).transpose(0, 2, 1))


def codes(format: str, block: np.ndarray, width: int) -> np.ndarray:
    """Return canonical rows as one unsigned code a byte, (m, width) uint8; int8 moves up by 128."""
    if format == "int8":
        return block.view(np.uint8) ^ np.uint8(128)
    bits = code_format(format).bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (block[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return spread.reshape(len(block), -1)[:, :width]


def _packed(matrix: Matrix, block: np.ndarray) -> np.ndarray:
    """Interleave rows of codes: canonical (16 p, bytes) to (p, C, 64)."""
    if matrix.whole_words:
        words = block.view("<u4")  # (16 p, C)
        for shift, mask in _SWAPS[matrix.format]:
            words = _swapped(words, shift, mask)
        if matrix.format == "int8":
            words = words ^ np.uint32(0x80808080)
        return _dense(words).view(np.uint8)
    form, cut = code_format(matrix.format), grouping(matrix.format, matrix.group, matrix.width)
    unpacked = codes(matrix.format, block, matrix.width)
    if cut.padded != cut.segment:
        spaced = np.zeros((len(block), cut.segments(matrix.width), cut.padded), np.uint8)
        spaced[:, :, : cut.segment] = unpacked.reshape(len(block), -1, cut.segment)
        unpacked = spaced.reshape(len(block), -1)
    # (p, row, chunk, plane, j) -> (p, chunk, plane, row, j)
    tiles = unpacked.reshape(-1, PANEL, matrix.chunks, form.planes, 4).transpose(0, 2, 3, 1, 4)
    result = np.ascontiguousarray(tiles[:, :, 0]).reshape(-1, matrix.chunks, CHUNK)
    for plane in range(1, form.planes):
        result |= tiles[:, :, plane].reshape(result.shape) << np.uint8(plane * form.bits)
    return result


def _swapped(words: np.ndarray, shift: int, mask: int) -> np.ndarray:
    """Exchange the bits under ``mask`` with those ``shift`` places above them."""
    moved = words >> np.uint32(shift)
    moved ^= words
    moved &= np.uint32(mask)
    result: np.ndarray = words ^ moved
    moved <<= np.uint32(shift)
    result ^= moved
    return result


def canonical(matrix: Matrix, packed: np.ndarray) -> np.ndarray:
    """Invert ``weight`` for a whole array of codes (P, C, 64): canonical rows (rows, bytes), int8 as int8."""
    if not matrix.whole_words:
        return _joined(matrix.format, unpack(matrix, packed))
    words = np.ascontiguousarray(packed.view("<u4").transpose(0, 2, 1))  # (P, 16, C)
    for shift, mask in reversed(_SWAPS[matrix.format]):
        words = _swapped(words, shift, mask)
    if matrix.format == "int8":
        words ^= np.uint32(0x80808080)
    rows = _in_order(matrix, words).view(np.uint8)
    return rows.view(np.int8) if matrix.format == "int8" else rows


def _joined(format: str, codes: np.ndarray) -> np.ndarray:
    """Return canonical rows from one code a byte."""
    per_byte = 8 // code_format(format).bits
    if per_byte == 1:
        return codes
    padded = np.zeros((len(codes), -(-codes.shape[1] // per_byte) * per_byte), np.uint8)
    padded[:, : codes.shape[1]] = codes
    result = np.zeros((len(codes), padded.shape[1] // per_byte), np.uint8)
    for place in range(per_byte):
        result |= padded[:, place::per_byte] << np.uint8(place * code_format(format).bits)
    return result


def unpack(matrix: Matrix, packed: np.ndarray) -> np.ndarray:
    """Invert ``weight`` and ``vectors`` for a whole array: canonical rows, codes one a byte (int8 as int8).

    packed (P, K, 16) or scales (P, G, 16) of any dtype gives (rows, K) or (rows, G); (P, C, 64) gives (rows, K).
    """
    if packed.shape[2] == PANEL:
        flat = packed.transpose(0, 2, 1)
    else:
        form, cut = code_format(matrix.format), grouping(matrix.format, matrix.group, matrix.width)
        shifts = np.arange(form.planes, dtype=np.uint8) * np.uint8(form.bits)
        tiles = packed.reshape(matrix.panels, matrix.chunks, 1, PANEL, 4) >> shifts[:, None, None]
        tiles = (tiles & np.uint8((1 << form.bits) - 1)).transpose(0, 3, 1, 2, 4)
        spaced = tiles.reshape(matrix.panels, PANEL, -1, cut.padded)[..., : cut.segment]
        flat = spaced.reshape(matrix.panels, PANEL, matrix.width)
        if matrix.format == "int8":
            flat = (flat ^ np.uint8(128)).view(np.int8)
    return _in_order(matrix, flat)


def _in_order(matrix: Matrix, flat: np.ndarray) -> np.ndarray:
    """Return the rows of panels (P, 16, x) in canonical order, without padding: (rows, x)."""
    halves = flat.reshape(-1, matrix.halves, PANEL, flat.shape[2]).transpose(1, 0, 2, 3)
    rows = halves.reshape(matrix.halves, -1, flat.shape[2])[:, : matrix.rows // matrix.halves]
    return np.ascontiguousarray(rows.reshape(matrix.rows, -1))
