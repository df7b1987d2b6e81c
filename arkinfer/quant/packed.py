"""Packed weights in their canonical, backend-neutral form, and the way back to floating point.

Every backend repacks from this form; the torch reference computes from it. ``K`` is the input width, ``N`` the output
width, ``G`` the number of groups along K (one when ``group`` is 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORMATS = ("dense", "int8", "int4", "ternary")


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


def group_extent(group: int, width: int) -> int:
    """Return the number of inputs that share one scale; ``group`` 0 means the whole row."""
    return group or width


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack uint8 codes 0..15 of shape (N, K), K even, into (N, K/2) bytes, low nibble first."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Invert pack_nibbles: (N, K/2) bytes to (N, K) uint8 codes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)


def pack_crumbs(codes: torch.Tensor) -> torch.Tensor:
    """Pack uint8 codes 0..3 of shape (N, K) into (N, ceil(K/4)) bytes, lowest bits first; the tail holds zeros."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4))
    return padded[:, 0::4] | (padded[:, 1::4] << 2) | (padded[:, 2::4] << 4) | (padded[:, 3::4] << 6)


def unpack_crumbs(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Invert pack_crumbs: (N, ceil(K/4)) bytes to (N, width) uint8 codes."""
    return torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)[:, :width]


def integers(packed: Packed) -> torch.Tensor:
    """Return the signed integers (N, K) float32 that the scales multiply, in packed column order."""
    if packed.format == "int8":
        return packed.weight.float()
    if packed.format == "ternary":
        return unpack_crumbs(packed.weight, packed.shape[1]).float() - 1
    codes = unpack_nibbles(packed.weight).float()
    if packed.zeros is None:
        return codes - 8
    return codes - packed.zeros.float().repeat_interleave(group_extent(packed.group, packed.shape[1]), dim=1)


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
