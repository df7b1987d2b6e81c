"""Writers of the quantised formats, made from their published layouts with Python integers: no code of the readers.

Codes are (N, K) lists of rows, zeros (N, G), scales (N, G); every writer returns tensors by suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        """Multiply out: (N, K) float32."""
        integers = (self.codes - self.zeros[:, self.group]).astype(np.float32)
        values: np.ndarray = self.scales.astype(np.float32)[:, self.group] * integers
        return values


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
    scales = (random.standard_normal((rows, groups)) * 0.4 / (1 << bits >> 1)).astype(np.float16)
    return Drawn(bits, codes, zeros, scales, group)


def reorder(drawn: Drawn, seed: int) -> Drawn:
    """Deal the inputs to the groups anew, by ``seed`` alone."""
    return replace(drawn, group=np.random.default_rng(seed).permutation(drawn.group))


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


def awq(drawn: Drawn) -> Tensors:
    """AutoAWQ's gemm tensors: in each word, first the even columns of eight, then the odd ones."""

    def along_columns(table: np.ndarray) -> np.ndarray:  # (R, N)
        packed = []
        for row in table:
            shuffled = [int(row[start + j]) for start in range(0, len(row), 8) for j in (0, 2, 4, 6, 1, 3, 5, 7)]
            packed.append(words(shuffled, 4))
        return np.array(packed, np.int32)

    return {
        "qweight": along_columns(drawn.codes.T),
        "qzeros": along_columns(drawn.zeros.T),
        "scales": drawn.scales.T.copy(),
    }


def marlin(drawn: Drawn, names: tuple[str, str] = ("qweight", "scales")) -> Tensors:
    """Marlin's tiles, each code put where the matrix instruction of a GPU looks for it."""
    rows, width = drawn.codes.shape
    places = [[0] * (rows * 16) for _ in range(width // 16)]
    for n in range(rows):
        for k in range(width):
            tile, row, column = n % 64 // 16, k % 16, n % 16
            # A thread holds column % 8 and two neighbouring rows of each quarter of a tile: eight codes.
            thread = column % 8 * 4 + row % 8 // 2
            held = column // 8 * 4 + row // 8 * 2 + row % 2
            place = n // 64 * 1024 + thread * 32 + tile * 8 + held // 2 + held % 2 * 4
            places[k // 16][place] = int(drawn.codes[n, k])
    scales = np.empty((drawn.scales.shape[1], rows), np.float16)
    for part in range(len(scales)):
        for n in range(rows):
            if len(scales) > 1:
                place = n // 64 * 64 + n % 8 * 8 + n % 64 // 8
            else:
                place = n // 32 * 32 + n % 8 // 2 * 8 + n % 32 // 8 * 2 + n % 2
            scales[part, place] = drawn.scales[n, part]
    return {names[0]: np.array([words(line, 4) for line in places], np.int32), names[1]: scales}


def packed_integers(drawn: Drawn, index: bool = False) -> Tensors:
    """compressed-tensors' pack-quantized."""
    half = 1 << drawn.bits >> 1
    tensors = {
        "weight_packed": np.array([words(row, drawn.bits) for row in drawn.codes], np.int32),
        "weight_scale": drawn.scales.copy(),
        "weight_shape": np.array(drawn.codes.shape, np.int64),
    }
    if (drawn.zeros != half).any():
        columns = [words(drawn.zeros[:, part], drawn.bits) for part in range(drawn.zeros.shape[1])]
        tensors["weight_zero_point"] = np.array(columns, np.int32).T.copy()
    if index:
        tensors["weight_g_idx"] = drawn.group.astype(np.int32)
    return tensors


def plain_integers(drawn: Drawn) -> Tensors:
    """compressed-tensors' int-quantized."""
    half = 1 << drawn.bits >> 1
    tensors = {"weight": (drawn.codes - half).astype(np.int8), "weight_scale": drawn.scales.copy()}
    if (drawn.zeros != half).any():
        tensors["weight_zero_point"] = (drawn.zeros - half).astype(np.int8)
    return tensors


def joined(parts: Sequence[Drawn]) -> Drawn:
    """Stack the rows of several matrices of equal width."""
    first = parts[0]
    codes, zeros, scales = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "zeros", "scales")
    )
    return Drawn(first.bits, codes, zeros, scales, first.group)
