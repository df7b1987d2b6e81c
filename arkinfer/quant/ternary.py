"""Recognise ternary weights released as ordinary dense tensors, and pack them without loss.

BitCPM4 checkpoints are fake-quantised: plain bfloat16 tensors whose values are -s, 0 or +s per group of inputs
(MiniCPM4 report, section 3.3). The group size is not stated anywhere and is recovered from the tensor itself.
"""

from __future__ import annotations

import torch

from arkinfer.quant.packed import Packed, group_extent, pack_crumbs

SMALLEST_GROUP = 16
_PROBE_ROWS = 64


def _scales(weight: torch.Tensor, extent: int) -> torch.Tensor | None:
    """Return the scale of each group (N, G) in the weight's dtype, or None if some group holds two magnitudes."""
    magnitude = weight.abs().reshape(weight.shape[0], -1, extent)
    scale = magnitude.amax(dim=2, keepdim=True)
    if not bool(((magnitude == scale) | (magnitude == 0)).all()):
        return None
    return scale.squeeze(2)


def detect(weight: torch.Tensor) -> int | None:
    """Return the largest group (0: the whole row) for which ``weight`` (N, K) is exactly ternary, or None if it is not.

    A constant zero tensor is not called ternary: it says nothing about how the model was trained.
    """
    width = weight.shape[1]
    probe = weight[:_PROBE_ROWS]
    extents = [size for size in range(width, SMALLEST_GROUP - 1, -1) if width % size == 0]
    for extent in extents:
        if _scales(probe, extent) is None:
            continue
        scales = _scales(weight, extent)
        if scales is not None:
            return None if not bool(scales.any()) else (0 if extent == width else extent)
    return None


def pack(weight: torch.Tensor, group: int) -> Packed:
    """Pack a ternary ``weight`` (N, K): two bits a weight and one scale a group, in the weight's own dtype.

    Unpacking gives every value back exactly. Raises ValueError if the tensor is not ternary at this group size.
    """
    rows, width = weight.shape
    extent = group_extent(group, width)
    scales = _scales(weight, extent)
    if scales is None:
        raise ValueError(f"the tensor is not ternary in groups of {extent}")
    codes = (torch.sign(weight.float()) + 1).to(torch.uint8)
    return Packed("ternary", group, (rows, width), pack_crumbs(codes), scales.contiguous())
