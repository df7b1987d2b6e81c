"""Round floating-point weights to int8 or int4 with the scale that loses least."""

from __future__ import annotations

import torch

from arkinfer.quant.packed import Packed, group_extent, pack_nibbles

# Shrinking the range below max|w| trades clipping of the few largest weights for a finer step for all others.
_SHRINK = torch.linspace(1.0, 0.7, 16).tolist()
_BLOCK = 1 << 17  # values at a time: both float32 buffers stay in a core's second-level cache


def quantise(weight: torch.Tensor, bits: int, group: int) -> Packed:
    """Quantise ``weight`` (N, K) symmetrically to ``bits`` 8 or 4 with float16 scales per ``group`` inputs (0: row).

    The scale minimises the squared error over a range of clipping points; int4 uses all sixteen codes -8..7, int8 the
    symmetric -127..127. Tensors with an odd K cannot be packed at 4 bits. Beside the result, memory for a few hundred
    thousand values is taken.
    """
    rows, width = weight.shape
    extent = group_extent(group, width)
    grouped = weight.reshape(-1, extent)  # (N G, group)
    codes = torch.empty(grouped.shape, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(grouped.shape[0], dtype=torch.float16)
    step = max(1, _BLOCK // extent)
    values, scratch = torch.empty(2, min(step, grouped.shape[0]), extent)
    for start in range(0, grouped.shape[0], step):
        part = grouped[start : start + step]
        block, rounded = values[: part.shape[0]].copy_(part), scratch[: part.shape[0]]
        scale = search_scale(block, bits, rounded)  # (groups, 1)
        round_codes(torch.div(block, torch.where(scale == 0, 1.0, scale), out=rounded), bits)
        codes[start : start + step] = rounded if bits == 8 else rounded.add_(8)
        scales[start : start + step] = scale.squeeze(1)
    stored = codes.reshape(rows, width)
    return Packed(
        f"int{bits}",
        group,
        (rows, width),
        stored if bits == 8 else pack_nibbles(stored),
        scales.reshape(rows, width // extent),
    )


def search_scale(block: torch.Tensor, bits: int, scratch: torch.Tensor) -> torch.Tensor:
    """Return the scale (groups, 1), a float16's value, that loses least on each row of ``block`` (groups, group).

    ``scratch`` has the shape of ``block`` and is overwritten.
    """
    high, low = block.amax(dim=1, keepdim=True), block.amin(dim=1, keepdim=True)
    if bits == 8:
        return (torch.maximum(high, -low) / 127).half().float()
    # The sign of the largest element decides which end of the asymmetric range it takes.
    peak = torch.where(high > -low, high, low)
    best_scale = torch.zeros_like(peak)
    best_error = torch.full_like(peak, float("inf"))
    for shrink in _SHRINK:
        scale = (peak * (shrink / -8)).half().float()  # the stored scale is the one that must fit
        round_codes(torch.mul(block, 1 / torch.where(scale == 0, 1.0, scale), out=scratch), bits)
        error = torch.linalg.vector_norm(torch.addcmul(block, scratch, scale, value=-1, out=scratch), dim=1)[:, None]
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def round_codes(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Round ``values`` in place to the integers that ``bits`` hold, and return them."""
    return values.round_().clamp_(-127 if bits == 8 else -8, 127 if bits == 8 else 7)
