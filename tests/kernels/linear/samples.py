"""Random weights in canonical form, packed for kernels, and their values by a formula of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from arkinfer.exporters.kernels.tir import layout, pack


@dataclass(frozen=True)
class Case:
    """One weight: ``rows`` outputs, ``width`` inputs."""

    format: str
    group: int
    width: int
    rows: int
    scales: str = "float16"
    zeros: bool = False
    bias: bool = False
    gated: bool = False

    @property
    def matrix(self) -> pack.Matrix:
        return pack.Matrix(self.format, self.rows, self.width, self.group, self.gated)

    @property
    def options(self) -> dict[str, Any]:
        """The kernel options that describe it."""
        return {
            "format": self.format,
            "group": self.group,
            "width": self.width,
            "scales": self.scales,
            "zeros": self.zeros,
            "bias": self.bias,
            "gated": self.gated,
        }

    @property
    def columns(self) -> int:
        """Outputs that the kernel writes."""
        return self.rows // 2 if self.gated else self.rows

    def __str__(self) -> str:
        marks = [name for name in ("zeros", "bias", "gated") if getattr(self, name)]
        return "-".join([self.format, f"g{self.group}", f"{self.rows}x{self.width}", self.scales, *marks])


@dataclass(frozen=True)
class Sample:
    """``integers`` (N, K) and float64 ``scales`` (N, G) of a weight, and the kernel's inputs made of it."""

    integers: np.ndarray
    scales: np.ndarray
    bias: np.ndarray
    packed: list[np.ndarray]

    def dequantised(self) -> np.ndarray:
        return self.integers * np.repeat(self.scales, self.integers.shape[1] // self.scales.shape[1], axis=1)


def stored_floats(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return ``values`` as kernels store them (bfloat16 as uint16 bits) and what they then stand for, in float64."""
    if dtype == "bfloat16":
        stored = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return stored, (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(dtype), values.astype(dtype).astype(np.float64)


def sample(case: Case, seed: int = 0, unit_scales: bool = False) -> Sample:
    """Return a random weight; codes take every value of the format, extremes often."""
    random = np.random.default_rng(seed)
    limit = layout.code_format(case.format).limit
    codes = random.integers(0, limit + 1, (case.rows, case.width))
    codes = np.where(random.random(codes.shape) < 0.3, random.choice([0, limit], codes.shape), codes)
    groups = case.matrix.groups
    form = layout.code_format(case.format)
    zeros = random.integers(0, 1 << form.bits, (case.rows, groups), dtype=np.uint8)
    scales = np.ones((case.rows, groups)) if unit_scales else random.uniform(0.01, 0.1, (case.rows, groups))
    stored, exact = stored_floats(scales, case.scales)
    bias = random.standard_normal(case.rows if case.bias else 0).astype(np.float32)
    if case.zeros:
        integers = codes - np.repeat(zeros.astype(np.int64), case.width // groups, axis=1)
    else:
        integers = codes - {"int8": 128, "int4": 8, "int2": 2, "ternary": 1}[case.format]
    canonical = canonical_bytes(case.format, codes)
    packed = [np.concatenate(list(pack.weight(case.matrix, lambda first, last: canonical[first:last])))]
    packed.append(np.concatenate(list(pack.vectors(case.matrix, lambda first, last: stored[first:last]))))
    if case.zeros:
        packed.append(np.concatenate(list(pack.vectors(case.matrix, lambda first, last: zeros[first:last]))))
    if case.bias:
        packed.append(bias)
    return Sample(integers, exact, bias, packed)


def canonical_bytes(format: str, codes: np.ndarray) -> np.ndarray:
    """Return unsigned codes (N, K) as arkinfer.ops.linear stores them."""
    if format == "int8":
        return (codes - 128).astype(np.int8)
    per_byte = {"int4": 2, "int2": 4, "ternary": 4}[format]
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_byte))).astype(np.uint8)
    total = np.zeros((codes.shape[0], padded.shape[1] // per_byte), np.uint8)
    for index in range(per_byte):
        total |= padded[:, index::per_byte] << np.uint8(index * 8 // per_byte)
    return total


def activations(case: Case, tokens: int, unit_scales: bool = False) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return random codes (n, K) in -127..127 and the kernel's inputs: padded codes, scales, sums per segment."""
    random = np.random.default_rng(1)
    groups = layout.grouping(case.format, case.group, case.width)
    codes = random.integers(-127, 128, (tokens, case.width))
    codes = np.where(random.random(codes.shape) < 0.3, random.choice([-127, 127], codes.shape), codes)
    segments = codes.reshape(tokens, -1, groups.segment)
    padded = np.pad(segments, ((0, 0), (0, 0), (0, groups.padded - groups.segment)))
    shape = (tokens, case.width // groups.activation)
    scales = np.ones(shape) if unit_scales else random.uniform(0.001, 0.1, shape)
    return codes, [
        padded.reshape(tokens, -1).astype(np.int8),
        scales.astype(np.float32),
        segments.sum(axis=2).astype(np.int32),
    ]
