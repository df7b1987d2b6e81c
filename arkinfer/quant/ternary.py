"""Recognise ternary weights released as ordinary dense tensors, and pack them without loss.

BitCPM4 checkpoints are fake-quantised: plain bfloat16 tensors whose values are -s, 0 or +s per group of inputs
(MiniCPM4 report, section 3.3). The group size is not stated anywhere and is recovered from the tensor itself.
"""

from __future__ import annotations

import torch

from arkinfer.checkpoint.stored import StoredWeight
from arkinfer.quant.packed import Packed, group_extent, pack_crumbs, read

SMALLEST_GROUP = 16
_PROBES, _PROBE_ROWS = 8, 8  # places in a matrix that are looked at, rows at each


def _scales(weight: torch.Tensor, extent: int) -> torch.Tensor | None:
    """Return the scale of each group (N, G) in the weight's dtype, or None if some group holds two magnitudes."""
    magnitude = weight.abs().reshape(weight.shape[0], -1, extent)
    scale = magnitude.amax(dim=2, keepdim=True)
    if not bool(((magnitude == scale) | (magnitude == 0)).all()):
        return None
    return scale.squeeze(2)


def detect(stored: StoredWeight) -> int | None:
    """Return the largest group (0: the whole row) for which the weight is exactly ternary, or None if it is not.

    Rows at several places are read, not the whole matrix: ``pack`` sees every row, and refuses what is not ternary.
    A constant zero tensor is not called ternary: it says nothing about how the model was trained.
    """
    rows, width = stored.layout.shape
    last = max(0, rows - _PROBE_ROWS)
    starts = sorted({last * probe // (_PROBES - 1) for probe in range(_PROBES)})
    probe = torch.cat([read(stored, start, min(start + _PROBE_ROWS, rows)).weight for start in starts])
    for extent in (size for size in range(width, SMALLEST_GROUP - 1, -1) if width % size == 0):
        scales = _scales(probe, extent)
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
