"""Products with integer weights in onnxruntime, one by one, against arkinfer.ops.linear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from arkinfer.artifact import tensors
from arkinfer.exporters import onnx_layout, onnx_weights
from arkinfer.exporters.onnx_bodies import Bodies, Matrix, Shape
from arkinfer.exporters.onnx_contrib import ContribBodies
from arkinfer.exporters.onnx_model import Model
from arkinfer.exporters.onnx_outline import BITS, layout_of
from arkinfer.exporters.onnx_outline import tensors as tensors_of
from arkinfer.graph import Weight
from arkinfer.ops import linear
from arkinfer.quant.groups import activation_group
from arkinfer.quant.packed import PER_BYTE, Packed


def draw(name: str, group: int, shape: tuple[int, int], zeros: bool) -> Packed:
    """Return a random matrix."""
    rows, width = shape
    groups = width // (group or width)
    if name == "int8":
        codes = torch.randint(-128, 128, shape, dtype=torch.int8)
    else:
        codes = torch.randint(0, 256, (rows, width // PER_BYTE[name]), dtype=torch.uint8)
        codes = codes & 0x55 if name == "ternary" else codes
    drawn = torch.randint(0, 1 << BITS[name], (rows, groups), dtype=torch.uint8)
    return Packed(name, group, shape, codes, torch.rand(rows, groups).half(), drawn if zeros else None)


def run(form: str, packed: Packed, activations: str, x: np.ndarray, folder: Path) -> np.ndarray:
    """Return x @ W.T as a model of ``form`` computes it."""
    weight = Weight("w", ("w",), packed.shape, format=packed.format, group=packed.group, zeros=packed.zeros is not None)
    products = "int8" if activations == "int8" else "F32"
    layout, extent = layout_of(weight, form, products), activation_group(packed.group, packed.shape[1])
    model = Model("product", "weights.bin")
    bodies = (ContribBodies if form == "onnxruntime" else Bodies)(model, Shape(1, 1, 2, "F32", 64, 64, 1.0))
    entry = model.input("x", "F32", (1, "n", packed.shape[1]))
    found = tensors_of(layout, packed.shape, "F16", weight.zeros)
    parts = {part: model.weight(part, tensor.dtype, tensor.shape) for part, tensor in found.items()}
    integer = products == "int8" and layout.kind == "blocks" and layout.block == extent
    rounding = extent if products == "int8" and not integer else 0
    matrix = Matrix(*packed.shape, "F16", layout, parts, integer, rounding)
    model.output("y", bodies.linear(entry, matrix, None, None), "F32", (1, "n", packed.shape[0]))
    stored = {part: onnx_weights.Stored(part, tensor.spec, weight, part) for part, tensor in found.items()}
    data = {part: tensor.numpy() for part, tensor in onnx_layout.pack(layout, packed).items()}
    specs = {part: item.spec for part, item in stored.items()}
    tensors.write(folder / "weights.bin", specs, ((part, [data[part]]) for part in specs))
    model.save(folder / "model.onnx", onnx_weights.places(stored))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    unused = {
        each.name: np.zeros([1 if isinstance(size, str) else size for size in each.shape], kind)
        for each in session.get_inputs()
        for kind in ({"tensor(int64)": np.int64, "tensor(int32)": np.int32}.get(each.type, np.float32),)
    }
    result: np.ndarray = session.run(["y"], {**unused, "x": x[None]})[0][0]
    return result


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize(
    ("name", "group", "shape", "zeros"),
    [
        ("int8", 128, (200, 256), False),
        ("int8", 96, (33, 192), False),
        ("int8", 0, (48, 160), True),
        ("int4", 64, (200, 192), True),
        ("int4", 32, (7, 96), False),
        ("int4", 16, (65, 48), True),
        ("ternary", 128, (130, 384), False),
        ("ternary", 16, (40, 32), False),
        ("ternary", 0, (40, 1024), False),
        ("int2", 64, (31, 192), True),
        ("int2", 256, (16, 512), True),
    ],
)
def test_products_are_those_of_the_reference(
    tmp_path: Path, name: str, group: int, shape: tuple[int, int], zeros: bool, tokens: int
) -> None:
    torch.manual_seed(group + shape[0])
    packed = draw(name, group, shape, zeros)
    x = torch.randn(tokens, shape[1])
    x[:, :16] *= 30
    for form, activations, rounding in (
        ("onnxruntime", "int8", "int8_reciprocal"),
        ("onnxruntime", "float", "float"),
        ("portable", "float", "float"),
    ):
        got = run(form, packed, activations, x.numpy(), tmp_path)
        right = linear.reference(x, packed.weight, packed.scales, packed.zeros, None, None, name, group, rounding)
        np.testing.assert_allclose(got, right, atol=2e-5 * float(right.abs().max()), err_msg=f"{form} {activations}")
