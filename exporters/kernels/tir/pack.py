"""Repacking of weights from the canonical form (arkinfer.ops.linear) to panels, a few rows at a time, and back.

A tensor of an 8B model streams through: ``rows`` is called for slices of whole panels, so memory stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from arkinfer.exporters.kernels.tir.layout import CHUNK, PANEL, code_format, grouping, panels

SLICE_BYTES = 1 << 24  # of codes at one byte each: what a slice of rows may take

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


def weight_shape(matrix: Matrix) -> tuple[int, int, int]:
    """Return (P, K, 16) for dense weights, (P, C, 64) bytes for packed ones."""
    return (matrix.panels, matrix.width, PANEL) if matrix.format == "dense" else (matrix.panels, matrix.chunks, CHUNK)


def weight(matrix: Matrix, rows: Rows) -> Iterator[np.ndarray]:
    """Yield the panels of a weight in order, some at a time: arrays (p, K, 16) or (p, C, 64) uint8.

    ``rows`` gives canonical rows: floats, or bfloat16 bits as uint16, for dense; int8 (m, K); uint8 (m, K / 2) or
    (m, ceil(K / 4)). Rows beyond the last are zeros.
    """
    for block in _slices(matrix, rows):
        yield _dense(block) if matrix.format == "dense" else _packed(matrix, block)


def vectors(matrix: Matrix, rows: Rows) -> Iterator[np.ndarray]:
    """Yield the panels of scales or zero points: ``rows`` gives (m, G), panels are (p, G, 16)."""
    for block in _slices(matrix, rows):
        yield _dense(block)


def _slices(matrix: Matrix, rows: Rows) -> Iterator[np.ndarray]:
    """Yield rows in the order of panels, whole panels at a time, padded with zeros."""
    half = matrix.rows // matrix.halves
    step = max(1, SLICE_BYTES // (PANEL * matrix.width * matrix.halves))  # panels of each half
    for first in range(0, panels(half), step):
        count = min(step, panels(half) - first)
        parts = []
        for start in range(0, matrix.rows, half):
            begin, end = first * PANEL, min((first + count) * PANEL, half)
            part = rows(start + begin, start + end)
            padded = np.zeros((count * PANEL, part.shape[1]), part.dtype)
            padded[: end - begin] = part
            parts.append(padded.reshape(count, 1, PANEL, -1))
        yield np.concatenate(parts, axis=1).reshape(count * matrix.halves * PANEL, -1)


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
    halves = flat.reshape(-1, matrix.halves, PANEL, flat.shape[2]).transpose(1, 0, 2, 3)
    rows = halves.reshape(matrix.halves, -1, flat.shape[2])[:, : matrix.rows // matrix.halves]
    return np.ascontiguousarray(rows.reshape(matrix.rows, -1))
