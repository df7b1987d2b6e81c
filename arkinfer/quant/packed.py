"""Packed weights in their canonical, backend-neutral form, and the way back to floating point.

Every backend repacks from this form; the torch reference computes from it. ``K`` is the input width, ``N`` the output
width, ``G`` the number of groups along K (one when ``group`` is 0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from arkinfer.checkpoint.stored import Layout, Parts, StoredWeight

FORMATS = ("dense", "int8", "int4", "int2", "ternary")
PER_BYTE = {"int8": 1, "int4": 2, "int2": 4, "ternary": 4}  # codes in a byte
ZERO = {"int8": 128, "int4": 8, "int2": 2, "ternary": 1}  # the code of 0 where a weight has no zero points
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip  # safetensors' names


@dataclass(frozen=True)
class Packed:
    """One weight: ``weight`` as arkinfer.ops.linear defines ``format``, scales and zeros (N, G), order (K,)."""

    format: str
    group: int
    shape: tuple[int, int]  # (N, K)
    weight: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        parts = (self.weight, self.scales, self.zeros, self.order)
        return sum(part.nbytes for part in parts if part is not None)


def from_parts(layout: Layout, parts: Parts, order: np.ndarray | None = None) -> Packed:
    """Return rows that a checkpoint stores as tensors, without a copy; vectors are (N,) and matrices (N, K)."""

    def tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
        return torch.from_numpy(array).view(DTYPES[dtype])

    rows, width = parts.weight.shape[0], layout.shape[-1]
    if layout.format == "dense":
        return Packed("dense", 0, (rows, width), tensor(parts.weight, layout.dtype))
    assert parts.scales is not None
    return Packed(
        layout.format,
        layout.group,
        (rows, width),
        torch.from_numpy(parts.weight),
        tensor(parts.scales, layout.dtype),
        None if parts.zeros is None else torch.from_numpy(parts.zeros),
        None if order is None else torch.from_numpy(order),
    )


def read(stored: StoredWeight, start: int, stop: int) -> Packed:
    """Return rows ``start`` to ``stop`` of a weight of a checkpoint."""
    return from_parts(stored.layout, stored.rows(start, stop), stored.order())


def dense(stored: StoredWeight) -> torch.Tensor:
    """Return a whole weight of a checkpoint multiplied out, in its own shape: floats as stored, else float32."""
    packed = read(stored, 0, stored.layout.shape[0])
    return packed.weight if packed.format == "dense" else dequantise(packed)


def concatenate(parts: list[Packed]) -> Packed:
    """Stack weights of one format along their rows; all share the first one's column order."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def joined(name: str) -> torch.Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    rows = sum(part.shape[0] for part in parts)
    weight = torch.cat([part.weight for part in parts])
    return Packed(
        first.format, first.group, (rows, first.shape[1]), weight, joined("scales"), joined("zeros"), first.order
    )


def with_group(packed: Packed, group: int) -> Packed:
    """Return the same weight with its scales and zeros repeated for a smaller ``group`` that divides its own."""
    old, new = group_extent(packed.group, packed.shape[1]), group_extent(group, packed.shape[1])
    if old == new:
        return packed

    def repeated(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.repeat_interleave(old // new, dim=1)

    return replace(packed, group=group, scales=repeated(packed.scales), zeros=repeated(packed.zeros))


def group_extent(group: int, width: int) -> int:
    """Return the number of inputs that share one scale; ``group`` 0 means the whole row."""
    return group or width


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack uint8 codes 0..15 of shape (N, K), K even, into (N, K/2) bytes, low nibble first."""
    pairs = codes.contiguous().view(torch.int16)  # two codes, the first in the low byte
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Invert pack_nibbles: (N, K/2) bytes to (N, K) uint8 codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def pack_crumbs(codes: torch.Tensor) -> torch.Tensor:
    """Pack uint8 codes 0..3 of shape (N, K) into (N, ceil(K/4)) bytes, lowest bits first; the tail holds zeros."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4))
    fours = padded.contiguous().view(torch.int32)
    pairs = fours | (fours >> 6)
    return (pairs | (pairs >> 12)).to(torch.uint8)


def unpack_crumbs(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Invert pack_crumbs: (N, ceil(K/4)) bytes to (N, width) uint8 codes."""
    return torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)[:, :width]


def integers(packed: Packed) -> torch.Tensor:
    """Return the signed integers (N, K) float32 that the scales multiply, in packed column order."""
    if packed.format == "int8":
        codes = packed.weight.float() + ZERO["int8"]
    elif packed.format == "int4":
        codes = unpack_nibbles(packed.weight).float()
    else:
        codes = unpack_crumbs(packed.weight, packed.shape[1]).float()
    if packed.zeros is None:
        return codes.sub_(ZERO[packed.format])
    return codes.sub_(packed.zeros.float().repeat_interleave(group_extent(packed.group, packed.shape[1]), dim=1))


def dequantise(packed: Packed) -> torch.Tensor:
    """Return the weight (N, K) in float32, columns in the model's own order; exact, since scales widen losslessly."""
    if packed.format == "dense":
        return packed.weight.float()
    assert packed.scales is not None
    values = integers(packed)
    values *= packed.scales.float().repeat_interleave(group_extent(packed.group, packed.shape[1]), dim=1)
    if packed.order is None:
        return values
    restored = torch.empty_like(values)
    restored[:, packed.order.long()] = values
    return restored
