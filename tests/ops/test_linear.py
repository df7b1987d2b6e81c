"""arkinfer.linear against NumPy dequantisation that is written independently, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer.ops.linear import cost, linear, quantise_activations, weight_bytes
from arkinfer.quant.groups import activation_group


def dequantised(format: str, weight, scales, zeros, order, group: int, width: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Return W (N, K) float64, element by element from the documented bit positions."""
    rows = weight.shape[0]
    out = np.zeros((rows, width))
    for row in range(rows):
        for column in range(width):
            g = column // (group or width)
            if format == "int8":
                code = int(weight[row, column])
            elif format == "int4":
                code = (int(weight[row, column // 2]) >> (4 * (column % 2))) & 15
                code -= 8 if zeros is None else int(zeros[row, g])
            else:
                code = ((int(weight[row, column // 4]) >> (2 * (column % 4))) & 3) - 1
            target = column if order is None else int(order[column])
            out[row, target] = code * float(scales[row, g])
    return out


def random_weight(format: str, rows: int, width: int, group: int, asymmetric: bool, reorder: bool, seed: int):  # type: ignore[no-untyped-def]
    draw = np.random.default_rng(seed)
    groups = width // (group or width)
    scales = torch.from_numpy(draw.uniform(0.5, 2, (rows, groups)).astype(np.float32)).to(torch.float16)
    zeros = torch.from_numpy(draw.integers(0, 16, (rows, groups), dtype=np.uint8)) if asymmetric else None
    order = torch.from_numpy(draw.permutation(width).astype(np.int32)) if reorder else None
    if format == "int8":
        weight = torch.from_numpy(draw.integers(-127, 128, (rows, width), dtype=np.int8))
    elif format == "int4":
        weight = torch.from_numpy(draw.integers(0, 256, (rows, width // 2), dtype=np.uint8))
    else:
        codes = np.pad(draw.integers(0, 3, (rows, width), dtype=np.uint8), ((0, 0), (0, -width % 4))).reshape(
            rows, -1, 4
        )
        weight = torch.from_numpy((codes << np.array([0, 2, 4, 6], np.uint8)).sum(axis=2).astype(np.uint8))
    return weight, scales, zeros, order


cases = st.tuples(
    st.sampled_from(["int8", "int4", "ternary"]),
    st.sampled_from([(24, 0), (24, 8), (32, 16), (96, 32), (48, 24), (40, 0), (320, 160)]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1 << 16),
)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_packed_formats_are_exact(case) -> None:  # type: ignore[no-untyped-def]
    format, (width, group), rows, tokens, asymmetric, reorder, seed = case
    weight, scales, zeros, order = random_weight(
        format, rows, width, group, asymmetric and format == "int4", reorder, seed
    )
    x = torch.from_numpy(np.random.default_rng(seed + 1).normal(size=(tokens, width)).astype(np.float32))
    bias = torch.arange(rows, dtype=torch.float32)
    expected = x.double().numpy() @ dequantised(format, weight, scales, zeros, order, group, width).T + bias.numpy()
    actual = linear(x, weight, scales, zeros, order, bias, format, group)
    scale = np.abs(expected).max() + 1
    np.testing.assert_allclose(actual.numpy() / scale, expected / scale, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_int8_activations_follow_the_definition(case) -> None:  # type: ignore[no-untyped-def]
    format, (width, group), rows, tokens, asymmetric, reorder, seed = case
    weight, scales, zeros, order = random_weight(
        format, rows, width, group, asymmetric and format == "int4", reorder, seed
    )
    x = np.random.default_rng(seed + 1).normal(size=(tokens, width)).astype(np.float32)
    x[0, : width // 2] = 0
    matrix = dequantised(format, weight, scales, zeros, order, group, width)
    packed_x = x if order is None else x[:, order.numpy()]
    extent = activation_group(group, width)
    rounded = np.zeros(x.shape)
    for token in range(tokens):
        for start in range(0, width, extent):
            part = packed_x[token, start : start + extent]
            step = np.float32(np.abs(part).max()) / np.float32(127)
            if step > 0:
                rounded[token, start : start + extent] = np.clip(np.rint(part / step), -127, 127) * float(step)
    restored = rounded
    if order is not None:
        restored = np.empty_like(rounded)
        restored[:, order.numpy()] = rounded
    expected = restored @ matrix.T
    actual = linear(torch.from_numpy(x), weight, scales, zeros, order, None, format, group, "int8").numpy()
    scale = np.abs(expected).max() + 1
    np.testing.assert_allclose(actual / scale, expected / scale, atol=2e-6)


@pytest.mark.parametrize(
    ("group", "width", "expected"),
    [
        (128, 4096, 128),
        (32, 4096, 32),
        (0, 4096, 128),
        (0, 96, 96),
        (0, 1000, 1000),
        (8, 64, 64),
        (512, 4096, 128),
        (0, 176, 16),
    ],
)
def test_activation_group(group: int, width: int, expected: int) -> None:
    assert activation_group(group, width) == expected


def test_activation_codes_round_half_to_even() -> None:
    codes, scales = quantise_activations(torch.tensor([[127.0, 0.5, 1.5, -2.5, 0, 0, 0, 0]]), 4)
    assert codes.tolist() == [[[127, 0, 2, -2], [0, 0, 0, 0]]]
    assert scales.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dense_accumulates_in_float32(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 64).to(dtype), torch.randn(5, 64).to(dtype)
    out = linear(x, weight)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out, (x.double() @ weight.double().T).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5
    )


def test_gradients_flow_and_unknown_formats_are_refused() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    linear(torch.randn(2, 8), weight).sum().backward()
    assert weight.grad is not None and weight.grad.shape == (4, 8)
    with pytest.raises(ValueError, match="format"):
        linear(torch.randn(2, 8), torch.zeros(4, 8), format="int5")


def test_cost_counts_what_is_stored() -> None:
    weight, scales, zeros, _ = random_weight("int4", 6, 64, 16, True, False, 0)
    assert weight_bytes(6, 64, "int4", 16, 2, zeros=True) == weight.nbytes + scales.nbytes + zeros.nbytes
    assert cost(1, 6, 64, "ternary", 0, 2, 4) == (6 * (16 + 2) + (64 + 6) * 4, 2 * 6 * 64)
