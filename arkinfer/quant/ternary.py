"""Pack ternary weights that were released as ordinary dense tensors (arkinfer.checkpoint.ternary), without loss."""

from __future__ import annotations

import torch

from arkinfer.quant.packed import Packed, group_extent, pack_crumbs


def _scales(weight: torch.Tensor, extent: int) -> torch.Tensor | None:
    """Return the scale of each group (N, G) in the weight's dtype, or None if some group holds two magnitudes."""
    magnitude = weight.abs().reshape(weight.shape[0], -1, extent)
    scale = magnitude.amax(dim=2, keepdim=True)
    if not bool(((magnitude == scale) | (magnitude == 0)).all()):
        return None
    return scale.squeeze(2)


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
