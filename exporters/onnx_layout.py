"""How matrices lie in the weight file of an ONNX model, and the way there from their canonical form and back.

"dense" is the matrix (N, K) as it is. "blocks" is what onnxruntime's MatMulNBits and GatherBlockQuantized read: codes
of 2, 4 or 8 bits in blocks of inputs, low bits first, and a code of zero in the middle of their range. "signed" is what
the standard DequantizeLinear reads: int8, or int4 with two codes to a byte. N is the output width, K the input width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from arkinfer.exporters.onnx_outline import Layout
from arkinfer.graph import ModelGraph
from arkinfer.quant.packed import (
    ZERO,
    Packed,
    group_extent,
    pack_crumbs,
    pack_nibbles,
    unpack_crumbs,
    unpack_nibbles,
)


def pack(layout: Layout, rows: Packed) -> dict[str, torch.Tensor]:
    """Return what the file holds of some rows of a matrix, by part."""
    if layout.kind == "dense":
        return {"weight": rows.weight}
    assert rows.scales is not None
    count, width = rows.shape
    repeats = group_extent(rows.group, width) // layout.block
    found = {"scales": rows.scales.repeat_interleave(repeats, dim=1)}
    if layout.kind == "signed":  # TensorRT takes no scale of 0; all codes are 0 where there is one
        found["scales"] = torch.where(found["scales"] == 0, _least(rows.scales), found["scales"])
    shift = _middle(layout) - ZERO[rows.format]
    codes = _codes(rows).to(torch.int16) + shift  # (rows, K), from 0 on
    found["weight"] = _joined(layout, codes)
    if layout.kind == "blocks":
        found["weight"] = found["weight"].view(count, width // layout.block, -1)
    if rows.zeros is not None:
        zeros = rows.zeros.to(torch.int16).repeat_interleave(repeats, dim=1) + shift
        found["zeros"] = _joined(layout, zeros) if _by_row(layout) else _joined(layout, zeros.reshape(1, -1))[0]
    return found


def canonical(
    layout: Layout, name: str, group: int, shape: tuple[int, int], parts: Mapping[str, torch.Tensor]
) -> Packed:
    """Return rows in the canonical form of the format ``name``: what ``pack`` was given."""
    if layout.kind == "dense":
        return Packed("dense", 0, shape, parts["weight"])
    rows, width = shape
    repeats = group_extent(group, width) // layout.block
    shift = _middle(layout) - ZERO[name]
    codes = (_split(layout, parts["weight"].reshape(rows, -1), width) - shift).to(torch.uint8)
    zeros = None
    if "zeros" in parts:
        blocks = width // layout.block
        if _by_row(layout):
            zeros = _split(layout, parts["zeros"], blocks)
        else:
            zeros = _split(layout, parts["zeros"][None], rows * blocks).view(rows, blocks)
        zeros = (zeros - shift).to(torch.uint8)[:, ::repeats]
    if name == "int8":
        weight = (codes.to(torch.int16) - ZERO["int8"]).to(torch.int8)
    else:
        weight = pack_nibbles(codes) if name == "int4" else pack_crumbs(codes)
    scales = parts["scales"][:, ::repeats].contiguous()
    if layout.kind == "signed":
        scales = torch.where(scales == _least(scales), 0, scales)
    return Packed(name, group, shape, weight, scales, None if zeros is None else zeros.contiguous())


def _least(scales: torch.Tensor) -> torch.Tensor:
    """Return the least number of full precision in the dtype of ``scales``: what stands for 0."""
    return torch.tensor(torch.finfo(scales.dtype).smallest_normal, dtype=scales.dtype)


def cut(layout: Layout, part: str, tensor: torch.Tensor, blocks: int, start: int, stop: int) -> torch.Tensor:
    """Return rows of one part of a matrix with ``blocks`` to a row; ``start`` is even."""
    if part == "zeros" and not _by_row(layout):
        return tensor[start * blocks // 2 : -(-stop * blocks // 2)]
    return tensor[start:stop]


def _by_row(layout: Layout) -> bool:
    """Tell whether each row's zero points begin at a byte."""
    return layout.kind != "signed" or layout.bits == 8


def _middle(layout: Layout) -> int:
    """Return the code of zero where a matrix has no zero points, counted from the least code."""
    return 1 << (layout.bits - 1)


def _codes(rows: Packed) -> torch.Tensor:
    """Return the codes (rows, K) as they are counted from 0."""
    if rows.format == "int8":
        return rows.weight.to(torch.int16) + ZERO["int8"]
    return unpack_nibbles(rows.weight) if rows.format == "int4" else unpack_crumbs(rows.weight, rows.shape[1])


def _joined(layout: Layout, codes: torch.Tensor) -> torch.Tensor:
    """Return codes (rows, any), from 0 on, as bytes; those of "signed" are two's complement."""
    if layout.kind == "signed":
        codes = codes - _middle(layout)
        if layout.bits == 8:
            return codes.to(torch.int8)
        codes = codes & 15
    codes = codes.to(torch.uint8)
    if layout.bits == 8:
        return codes
    if layout.bits == 4:
        return pack_nibbles(torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)))
    return pack_crumbs(codes)


def _split(layout: Layout, data: torch.Tensor, width: int) -> torch.Tensor:
    """Invert ``_joined``: (rows, bytes) to int16 codes (rows, width) from 0 on."""
    if layout.bits == 8:
        codes = data.to(torch.int16)
    elif layout.bits == 4:
        codes = unpack_nibbles(data)[:, :width].to(torch.int16)
    else:
        codes = unpack_crumbs(data, width).to(torch.int16)
    if layout.kind != "signed":
        return codes
    middle = _middle(layout)
    return codes + middle if layout.bits == 8 else (codes ^ middle)


def rounds(model: ModelGraph) -> bool:
    """Tell whether linears round their activations to int8."""
    linears = (node for node in model.graph.nodes if node.target is torch.ops.arkinfer.linear.default)
    return any(len(node.args) > 8 and node.args[8] == "int8" for node in linears)
