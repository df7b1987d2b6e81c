"""Writers of the quantised formats, made from their published layouts with Python integers: no code of the readers.

Codes are (N, K) lists of rows, zeros (N, G), scales (N, G); every writer returns tensors by suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Drawn:
    """Random numbers of a quantised matrix; ``group`` is that of each input, ``scales`` hold float16 values."""

    bits: int
    codes: np.ndarray  # (N, K)
    zeros: np.ndarray  # (N, G)
    scales: np.ndarray  # (N, G) float16
    group: np.ndarray  # (K,)

    @property
    def matrix(self) -> np.ndarray:
        """Multiply out, element by element: (N, K) float32."""
        rows, width = self.codes.shape
        out = np.empty((rows, width), np.float32)
        for row in range(rows):
            for column in range(width):
                part = self.group[column]
                integer = int(self.codes[row, column]) - int(self.zeros[row, part])
                out[row, column] = np.float32(self.scales[row, part]) * np.float32(integer)
        return out


def draw(seed: int, rows: int, width: int, bits: int, size: int, symmetric: bool, act_order: bool = False) -> Drawn:
    """Draw a matrix in groups of ``size`` inputs, -1 for one group; symmetric: all zeros are the middle code."""
    random = np.random.default_rng(seed)
    extent = width if size == -1 else size
    groups = -(-width // extent)
    group = np.arange(width) // extent
    if act_order:
        random.shuffle(group)
    codes = random.integers(0, 1 << bits, (rows, width))
    # A zero point of 0 is what v1 of GPTQ cannot hold in every column.
    zeros = np.full((rows, groups), 1 << bits >> 1) if symmetric else random.integers(1, 1 << bits, (rows, groups))
    scales = (random.standard_normal((rows, groups)) * 0.05).astype(np.float16)
    return Drawn(bits, codes, zeros, scales, group)


def words(fields: Sequence[int], bits: int) -> list[int]:
    """Join ``fields`` to one long integer, the first lowest, and cut it into signed 32-bit words."""
    whole = 0
    for index, value in enumerate(fields):
        whole += int(value) << (bits * index)
    cut = [(whole >> (32 * index)) % (1 << 32) for index in range(-(-len(fields) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in cut]


def gptq(drawn: Drawn, version: int = 1, index: bool = True) -> Tensors:
    """AutoGPTQ's tensors; version 1 stores zeros less one."""
    rows, bits = len(drawn.codes), drawn.bits
    mask = (1 << bits) - 1
    columns = [words(drawn.codes[row], bits) for row in range(rows)]
    less = 1 if version == 1 else 0
    zeros = [words([(int(z) - less) & mask for z in group], bits) for group in drawn.zeros.T]
    tensors = {
        "qweight": np.array(columns, np.int32).T.copy(),
        "qzeros": np.array(zeros, np.int32),
        "scales": drawn.scales.T.copy(),
    }
    if index:
        tensors["g_idx"] = drawn.group.astype(np.int32)
    return tensors
