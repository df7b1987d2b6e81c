"""Matrices to the operators' layout and back, for every format, width and block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer.exporters import onnx_layout
from arkinfer.exporters.onnx_outline import BITS, layout_of, tensors
from arkinfer.graph import Weight
from arkinfer.quant.packed import PER_BYTE, Packed


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_what_is_packed_comes_back(data: Any) -> None:
    name = data.draw(st.sampled_from(sorted(BITS)))
    group, groups = data.draw(st.sampled_from([0, 16, 32, 48, 64, 96, 128, 256])), data.draw(st.integers(1, 5))
    width = (group or 32) * groups
    rows = data.draw(st.integers(1, 9))
    zeros = name != "ternary" and data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))

    def draw(shape: tuple[int, int], low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    count = width // (group or width)
    if name == "int8":
        codes = draw((rows, width), -128, 128, torch.int8)
    else:
        codes = draw((rows, width // PER_BYTE[name]), 0, 256, torch.uint8)
        if name == "ternary":
            codes = codes & 0x55  # codes 0 and 1
    packed = Packed(
        name,
        group,
        (rows, width),
        codes,
        torch.rand((rows, count), generator=generator).half(),
        draw((rows, count), 0, 1 << BITS[name], torch.uint8) if zeros else None,
    )
    weight = Weight("w", ("w",), (rows, width), format=name, group=group, zeros=zeros)
    for form, products in (
        ("onnxruntime", "int8"),
        ("onnxruntime", "F32"),
        ("onnxruntime", "F16"),
        ("tensorrt", "F16"),
    ):
        layout = layout_of(weight, form, products)
        parts = onnx_layout.pack(layout, packed)
        specs = tensors(layout, (rows, width), "F16", zeros)
        assert parts.keys() == specs.keys()
        for part, tensor in parts.items():
            assert tuple(tensor.shape) == specs[part].spec.shape, (form, part)
        back = onnx_layout.canonical(layout, name, group, (rows, width), parts)
        for part in ("weight", "scales", "zeros"):
            ours, theirs = getattr(back, part), getattr(packed, part)
            assert (ours is None) == (theirs is None)
            assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype), (form, part)


@pytest.mark.parametrize(("rows", "groups"), [(5, 3), (6, 3), (7, 2)])
def test_zero_points_of_some_rows(rows: int, groups: int) -> None:
    """Four-bit zero points of all rows follow one another: a cut at an even row falls between bytes."""
    zeros = torch.arange(rows * groups, dtype=torch.uint8).reshape(rows, groups) % 16
    weight = Weight("w", ("w",), (rows, 16 * groups), format="int4", group=16, zeros=True)
    layout = layout_of(weight, "tensorrt", "F16")
    packed = Packed("int4", 16, weight.shape, torch.zeros(rows, 8 * groups, dtype=torch.uint8), zeros.half(), zeros)  # type: ignore[arg-type]
    parts = onnx_layout.pack(layout, packed)
    for start, stop in ((0, rows), (2, rows), (0, 2), (2, 4)):
        cut = {part: onnx_layout.cut(layout, part, tensor, groups, start, stop) for part, tensor in parts.items()}
        shape = (stop - start, weight.shape[1])
        back = onnx_layout.canonical(layout, "int4", 16, shape, cut)
        assert back.zeros is not None and torch.equal(back.zeros, zeros[start:stop])
