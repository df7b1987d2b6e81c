"""Quantised activations equal arkinfer.ops.linear's bit for bit, alone and behind norms and swiglu."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from arkinfer.exporters.kernels.tir import layout
from arkinfer.exporters.kernels.tir.elementwise import (
    concatenate,
    reshape,
    scale,
    swiglu_float,
    take_columns,
    take_rows,
)
from arkinfer.exporters.kernels.tir.norm import add_rms_norm, rms_norm
from arkinfer.exporters.kernels.tir.quantize import quantize, swiglu_quantize
from arkinfer.ops.linear import quantise_activations
from tests.kernels.linear.kernel_runner import EMULATED, RUNNABLE, run

SHAPES = [("ternary", 64, 192), ("ternary", 24, 72), ("int4", 8, 64), ("ternary", 0, 50), ("int4", 256, 1024)]

isas = pytest.mark.parametrize("isa", [*RUNNABLE, EMULATED[0]])
shapes = pytest.mark.parametrize(
    ("isa", "format", "group", "width"),
    [(isa, *shape) for isa in RUNNABLE for shape in SHAPES] + [(EMULATED[0], *shape) for shape in SHAPES[1:4:2]],
)
forms = pytest.mark.parametrize("form", ["one", "many"])


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def declared(groups: layout.Grouping, tokens: int, width: int) -> list[tuple[tuple[int, ...], str]]:
    segments = groups.segments(width)
    return [
        ((tokens, groups.padded_width(width)), "int8"),
        ((tokens, width // groups.activation), "float32"),
        ((tokens, segments), "int32"),
    ]


def check(groups: layout.Grouping, x: np.ndarray, got: list[np.ndarray]) -> None:
    """Compare codes, scales and sums with the torch definition, padding with zeros."""
    codes, scales = quantise_activations(torch.tensor(x), groups.activation)
    segments = codes.numpy().reshape(len(x), -1, groups.segment)
    padded = np.pad(segments, ((0, 0), (0, 0), (0, groups.padded - groups.segment))).reshape(len(x), -1)
    np.testing.assert_array_equal(got[0], padded)
    np.testing.assert_array_equal(got[1], scales.numpy())
    np.testing.assert_array_equal(got[2], segments.sum(axis=2))


@shapes
@forms
def test_quantize(isa: str, format: str, group: int, width: int, form: str) -> None:
    groups, tokens = layout.grouping(format, group, width), 1 if form == "one" else 5
    x = random(tokens, width)
    x[-1, : width // 2] = 0  # groups of zeros
    outputs = declared(groups, tokens, width)
    check(groups, x, run(quantize, isa, form, {"groups": asdict(groups)}, [x], outputs))
    order = np.random.default_rng(6).permutation(width).astype(np.int32)
    gathered = run(quantize, isa, form, {"groups": asdict(groups), "order": True}, [x, order], outputs)
    check(groups, x[:, order], gathered)


@shapes
def test_swiglu(isa: str, format: str, group: int, width: int) -> None:
    groups, x = layout.grouping(format, group, width), random(5, 2 * width)
    y = run(swiglu_float, isa, "many", {}, [x], [((5, width), "float32")])[0]
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=1e-6, atol=1e-7)
    fused = run(swiglu_quantize, isa, "many", {"groups": asdict(groups)}, [x], declared(groups, 5, width))
    check(groups, y, fused)


@shapes
@forms
def test_norms(isa: str, format: str, group: int, width: int, form: str) -> None:
    groups, tokens = layout.grouping(format, group, width), 1 if form == "one" else 5
    residual, delta, weight = random(tokens, width), random(tokens, width)[:, ::-1], random(width)
    options = {"eps": 1e-6}
    shape = ((tokens, width), "float32")
    total, y = run(add_rms_norm, isa, form, {**options, "scale": 0.3}, [residual, delta, weight], [shape, shape])
    exact = residual.astype(np.float64) + np.float32(0.3) * delta.astype(np.float64)
    np.testing.assert_allclose(total, exact, rtol=1e-6, atol=1e-6)
    normed = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(y, normed, rtol=3e-6, atol=1e-6)
    fused = {**options, "scale": 0.3, "groups": asdict(groups)}
    outputs = [shape, *declared(groups, tokens, width)]
    again, *codes = run(add_rms_norm, isa, form, fused, [residual, delta, weight], outputs)
    np.testing.assert_array_equal(again, total)
    check(groups, y, codes)
    plain = run(rms_norm, isa, form, options, [total, weight], [shape])[0]
    np.testing.assert_array_equal(plain, y)
    check(groups, y, run(rms_norm, isa, form, {**options, "groups": asdict(groups)}, [total, weight], outputs[1:]))


@isas
def test_elementwise(isa: str) -> None:
    x = random(5, 3, 26)
    flat = run(reshape, isa, "many", {}, [x], [((5, 78), "float32")])[0]
    np.testing.assert_array_equal(flat, x.reshape(5, 78))
    np.testing.assert_array_equal(
        run(scale, isa, "many", {"factor": 0.1}, [flat], [((5, 78), "float32")])[0], flat * np.float32(0.1)
    )
    rows = np.array([4, 0, 4], np.int32)
    np.testing.assert_array_equal(run(take_rows, isa, "many", {}, [flat, rows], [((3, 78), "float32")])[0], flat[rows])
    order = np.random.default_rng(6).permutation(78).astype(np.int32)
    columns = run(take_columns, isa, "many", {}, [flat, order], [((5, 78), "float32")])[0]
    np.testing.assert_array_equal(columns, flat[:, order])


@isas
@forms
@pytest.mark.parametrize("widths", [(37, 5, 64), (1, 16), (48,)])
def test_concatenation(isa: str, form: str, widths: tuple[int, ...]) -> None:
    tokens = 1 if form == "one" else 3
    pieces = [random(tokens, width) + number for number, width in enumerate(widths)]
    joined = run(concatenate, isa, form, {"widths": list(widths)}, pieces, [((tokens, sum(widths)), "float32")])[0]
    np.testing.assert_array_equal(joined, np.concatenate(pieces, axis=1))
