"""Packing, gathering, rounding and product together, against the torch operator: the same weight, the same inputs."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from arkinfer.exporters.kernels.tir import layout, pack
from arkinfer.exporters.kernels.tir.elementwise import take_columns
from arkinfer.exporters.kernels.tir.linear_float import linear_float
from arkinfer.exporters.kernels.tir.linear_int8 import linear_int8
from arkinfer.exporters.kernels.tir.quantize import quantize
from arkinfer.ops.linear import reference
from arkinfer.quant.packed import Packed
from tests.checkpoints import quantised
from tests.kernels.linear.kernel_runner import RUNNABLE, run

CASES = [  # format, group, width, rows, zero points, permuted columns
    ("int8", 16, 48, 37, True, True),
    ("int8", 128, 256, 33, False, True),
    ("int8", 0, 50, 21, True, False),
    ("int4", 32, 96, 37, True, True),
    ("int4", 64, 192, 16, False, True),
    ("int4", 128, 256, 5, True, False),
    ("int4", 0, 50, 19, True, True),
    ("int2", 16, 64, 33, True, True),
    ("int2", 32, 96, 40, False, True),
    ("int2", 128, 256, 18, True, False),
    ("int2", 0, 50, 20, True, True),
]


def parameters(packed: Packed) -> list[np.ndarray]:
    """Return the weight, scales and zero points as kernels read them."""
    matrix = pack.Matrix(packed.format, *packed.shape, packed.group)
    parts = [part.numpy() for part in (packed.weight, packed.scales, packed.zeros) if part is not None]
    writers = (pack.weight, pack.vectors, pack.vectors)
    return [
        np.concatenate(list(write(matrix, lambda first, last, part=part: part[first:last])))
        for write, part in zip(writers, parts, strict=False)
    ]


def product(isa: str, packed: Packed, x: np.ndarray, activations: str) -> np.ndarray:
    """Run the kernels as the lowering chains them."""
    form = "one" if len(x) == 1 else "many"
    rows, width = packed.shape
    zeros, order = packed.zeros is not None, [] if packed.order is None else [packed.order.numpy()]
    options = {"format": packed.format, "group": packed.group, "width": width, "zeros": zeros}
    wanted = [((len(x), rows), "float32")]
    if activations == "float":
        if order:
            x = run(take_columns, isa, form, {}, [x, *order], [(x.shape, "float32")])[0]
        return run(linear_float, isa, form, options, [x, *parameters(packed)], wanted)[0]
    cut = layout.activation_cut(packed.format, packed.group, width)
    shapes = [
        ((len(x), cut.padded_width(width)), "int8"),
        ((len(x), width // cut.activation), "float32"),
        ((len(x), cut.segments(width)), "int32"),
    ]
    rounded = run(quantize, isa, form, {"groups": asdict(cut), "order": bool(order)}, [x, *order], shapes)
    return run(linear_int8, isa, form, options, [*rounded, *parameters(packed)], wanted)[0]


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=[str(case) for case in CASES])
def test_kernels_compute_what_the_operator_does(number: int, case: tuple[object, ...], activations: str) -> None:
    format, group, width, rows, zeros, permuted = case
    torch.manual_seed(number)
    order = torch.randperm(width).int() if permuted else None
    packed = quantised(torch.randn(rows, width), format, group, zeros, order)
    x = torch.randn(33, width)
    wanted = reference(x, packed.weight, packed.scales, packed.zeros, order, None, format, group, activations).numpy()
    isa = RUNNABLE[number % len(RUNNABLE)]
    y = product(isa, packed, x.numpy(), activations)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=3e-6 * np.abs(wanted).max())
    for tokens in (1, 2, 7):
        np.testing.assert_array_equal(product(isa, packed, x[:tokens].numpy(), activations), y[:tokens])
