"""Round floating-point weights to int8 or int4 with the scale that loses least."""

from __future__ import annotations

import torch

from arkinfer.quant.packed import Packed, group_extent, pack_nibbles

# Shrinking the range below max|w| trades clipping of the few largest weights for a finer step for all others.
_SHRINK = torch.linspace(1.0, 0.7, 16).tolist()


def quantise(weight: torch.Tensor, bits: int, group: int) -> Packed:
    """Quantise ``weight`` (N, K) symmetrically to ``bits`` 8 or 4 with float16 scales per ``group`` inputs (0: row).

    The scale minimises the squared error over a range of clipping points; int4 uses all sixteen codes -8..7, int8 the
    symmetric -127..127. Tensors with an odd K cannot be packed at 4 bits.
    """
    rows, width = weight.shape
    extent = group_extent(group, width)
    grouped = weight.float().reshape(rows, width // extent, extent)  # (N, G, group)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    # Sign of the largest element decides which end of the asymmetric 4-bit range it takes.
    index = grouped.abs().argmax(dim=2, keepdim=True)
    peak = grouped.gather(2, index)
    best_scale = torch.zeros(rows, width // extent, 1)
    best_error = torch.full_like(best_scale, float("inf"))
    steps = [1.0] if bits == 8 else _SHRINK
    for shrink in steps:
        scale = peak.abs() * (shrink / high) if bits == 8 else peak * (shrink / low)
        scale = scale.half().float()  # the stored scale is the one that must fit
        codes = torch.round(grouped / torch.where(scale == 0, 1.0, scale)).clamp_(low, high)
        error = (codes * scale - grouped).square().sum(dim=2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    codes = torch.round(grouped / torch.where(best_scale == 0, 1.0, best_scale)).clamp_(low, high).reshape(rows, width)
    scales = best_scale.squeeze(2).half()  # (N, G)
    if bits == 8:
        return Packed("int8", group, (rows, width), codes.to(torch.int8), scales)
    return Packed("int4", group, (rows, width), pack_nibbles((codes + 8).to(torch.uint8)), scales)
