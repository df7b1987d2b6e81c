"""Matrix product with a weight in any format; the format is data, so there is one operator for all of them."""

from __future__ import annotations

import torch

from arkinfer.ops import differentiates
from arkinfer.quant.groups import activation_group
from arkinfer.quant.packed import FORMATS, PER_BYTE, Packed, dequantise, group_extent, integers

# "int8_reciprocal" is int8 activations as onnxruntime rounds them: x * (127 / max|x|) where the others divide x by a
# scale. The two differ in about one code of 200,000, which is enough to tell two correct programs apart.
ACTIVATIONS = ("float", "int8", "int8_reciprocal")
BLOCK_ROWS = 4096  # of a weight that the reference multiplies out at a time: 64 MB where rows have 4096 inputs


def quantise_activations(x: torch.Tensor, extent: int, reciprocal: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes (tokens, groups, extent) float32 integers in -127..127, scales (tokens, groups) float32).

    scale = max|x| / 127 per group, codes = round-half-even(x / scale); a group of zeros has scale and codes zero.
    ``reciprocal``: codes = round-half-even(x * (127 / max|x|)).
    """
    grouped = x.float().reshape(x.shape[0], -1, extent)
    largest = grouped.abs().amax(dim=2)
    scales = largest / 127
    if reciprocal:
        # A number over a tensor would be the tensor's reciprocal times the number: rounded twice.
        exact = grouped * (torch.full_like(largest, 127) / torch.where(largest == 0, 1.0, largest))[:, :, None]
    else:
        exact = grouped / torch.where(scales == 0, 1.0, scales)[:, :, None]
    return torch.round(exact).clamp_(-127, 127), scales


def _with_int8_activations(x: torch.Tensor, packed: Packed, reciprocal: bool) -> torch.Tensor:
    """Return x @ W.T where each activation group is rounded to int8 and multiplied in exact integers."""
    rows, width = packed.shape
    assert packed.scales is not None
    if packed.order is not None:
        x = x[:, packed.order.long()]
    extent = activation_group(packed.group, width)
    codes, activation_scales = quantise_activations(x, extent, reciprocal)  # (n, A, extent), (n, A)
    values = integers(packed).reshape(rows, -1, extent)  # (N, A, extent)
    # A weight group of odd size is narrower than the one activation group of the whole row.
    per_group = packed.scales.float()
    spans = group_extent(packed.group, width)
    out = x.new_zeros((x.shape[0], rows), dtype=torch.float32)
    # float32 holds integers up to 2**24 exactly: 1024 products of 127 * 127; float64 holds any sum that occurs.
    exact = torch.float32 if extent <= 1024 else torch.float64
    for index in range(values.shape[1]):
        for start in range(0, extent, min(spans, extent)):
            part = slice(start, start + min(spans, extent))
            dot = codes[:, index, part].to(exact) @ values[:, index, part].to(exact).T  # (n, N)
            scale = per_group[:, (index * extent + start) // spans]
            out += activation_scales[:, index, None] * scale * dot.float()
    return out


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    format: str = "dense",
    group: int = 0,
    activations: str = "float",
) -> torch.Tensor:
    """Compute `linear` in plain torch, float32 inside, for at most BLOCK_ROWS outputs at a time."""
    if format not in FORMATS or activations not in ACTIVATIONS:
        raise ValueError(f"linear: unknown format {format!r} or activations {activations!r}")
    if weight.shape[0] > BLOCK_ROWS:

        def block(start: int) -> torch.Tensor:
            def cut(part: torch.Tensor | None) -> torch.Tensor | None:
                return None if part is None else part[start : start + BLOCK_ROWS]

            rows = weight[start : start + BLOCK_ROWS]
            return reference(x, rows, cut(scales), cut(zeros), order, cut(bias), format, group, activations)

        return torch.cat([block(start) for start in range(0, weight.shape[0], BLOCK_ROWS)], dim=1)
    if format == "dense":
        if weight.dtype == torch.float32 == x.dtype:
            return torch.nn.functional.linear(x, weight, bias)
        out = torch.nn.functional.linear(x.float(), weight.float())
    else:
        packed = Packed(format, group, (weight.shape[0], x.shape[1]), weight, scales, zeros, order)
        if activations != "float":
            out = _with_int8_activations(x, packed, activations == "int8_reciprocal")
        else:
            out = torch.nn.functional.linear(x.float(), dequantise(packed))
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


@torch.library.custom_op("arkinfer::linear", mutates_args=())
def _operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    format: str = "dense",
    group: int = 0,
    activations: str = "float",
) -> torch.Tensor:
    return reference(x, weight, scales, zeros, order, bias, format, group, activations)


@_operator.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    format: str = "dense",
    group: int = 0,
    activations: str = "float",
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    format: str = "dense",
    group: int = 0,
    activations: str = "float",
) -> torch.Tensor:
    """Return ``x @ W.T + bias`` (tokens, N) in the dtype of ``x`` (tokens, K), accumulated in float32.

    Formats, with G = K / group groups (group 0: one group a row) and scales (N, G) in any float dtype:
      dense    weight (N, K) floats
      int8     weight (N, K) int8; W = (q + 128 - zero) * scale, zeros (N, G) uint8 or None (128)
      int4     weight (N, K / 2) uint8, low nibble = even k; W = (q - zero) * scale, zeros (N, G) uint8 or None (8)
      int2     weight (N, ceil(K / 4)) uint8, two bits a code, low first; the same, zeros or None (2)
      ternary  as int2, codes 0..2; W = (code - 1) * scale
    order (K,) int32: packed column j multiplies x[order[j]] (GPTQ act-order). ``activations`` "int8" rounds x to int8
    per token and activation_group before an exact integer product; dense weights ignore it.
    """
    function = reference if differentiates(x, weight, bias) else _operator
    return function(x, weight, scales, zeros, order, bias, format, group, activations)


def weight_bytes(
    rows: int, width: int, format: str = "dense", group: int = 0, itemsize: int = 2, zeros: bool = False
) -> int:
    """Return the packed bytes of one (rows, width) weight; ``itemsize`` is that of dense elements and of scales."""
    if format == "dense":
        return rows * width * itemsize
    stored = -(-width // PER_BYTE[format])
    return rows * (stored + width // group_extent(group, width) * (itemsize + int(zeros)))


def cost(
    tokens: int,
    rows: int,
    width: int,
    format: str = "dense",
    group: int = 0,
    itemsize: int = 2,
    activation_itemsize: int = 4,
) -> tuple[int, int]:
    """Return (bytes read and written, floating-point operations) of one call with ``tokens`` rows of x."""
    moved = weight_bytes(rows, width, format, group, itemsize) + tokens * (width + rows) * activation_itemsize
    return moved, 2 * tokens * rows * width
