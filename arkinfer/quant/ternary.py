"""Pack ternary weights that were released as ordinary dense tensors (arkinfer.checkpoint.ternary), without loss."""

from __future__ import annotations

import numpy as np
import torch

from arkinfer.quant.packed import Packed, group_extent, pack_crumbs

_BLOCK = 1 << 17  # values at a time: they stay in a core's second-level cache


def pack(weight: torch.Tensor, group: int) -> Packed:
    """Pack a ternary ``weight`` (N, K): two bits a weight and one scale a group, in the weight's own dtype.

    Unpacking gives every value back exactly. Raises ValueError if the tensor is not ternary at this group size.
    """
    rows, width = weight.shape
    extent = group_extent(group, width)
    step = max(1, _BLOCK // width)
    codes = np.empty((rows, width), np.uint8)
    scales = torch.empty((rows, width // extent), dtype=weight.dtype)
    for start in range(0, rows, step):
        bits = _bits(weight[start : start + step].contiguous())
        magnitudes = bits & np.iinfo(bits.dtype).max  # without their sign, the bits are ordered as the values are
        grouped = magnitudes.reshape(len(bits), -1, extent)
        scale = grouped.max(axis=2, keepdims=True)
        if not bool(((grouped == scale) | (grouped == 0)).all()):
            raise ValueError(f"the tensor is not ternary in groups of {extent}")
        negative = (bits < 0) & (magnitudes != 0)  # minus zero is a zero
        codes[start : start + step] = (bits > 0).view(np.uint8) - negative.view(np.uint8) + np.uint8(1)
        scales[start : start + step] = torch.from_numpy(scale[:, :, 0]).view(weight.dtype)
    return Packed("ternary", group, (rows, width), pack_crumbs(torch.from_numpy(codes)), scales)


def _bits(weight: torch.Tensor) -> np.ndarray:
    """Return the bits of floats as signed integers of their size; ``weight`` is contiguous."""
    bits: np.ndarray = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]).numpy()
    return bits
