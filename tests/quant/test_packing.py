"""Packing loses nothing that it promises to keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer.checkpoint.ternary import detect
from arkinfer.errors import UserError
from arkinfer.graph import Weight
from arkinfer.quant import integer, ternary
from arkinfer.quant.packed import Packed, dequantise, pack_crumbs, pack_nibbles, unpack_crumbs, unpack_nibbles
from arkinfer.weights import _converter
from tests.checkpoints import InMemory


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_codes_survive_packing(rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    crumbs = torch.randint(0, 4, (rows, width), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_crumbs(pack_crumbs(crumbs), width), crumbs)
    nibbles = torch.randint(0, 16, (rows, 2 * width), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(nibbles)), nibbles)


def fake_quantised(rows: int, width: int, extent: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return weights as BitCPM4 releases them: -s, 0, +s per group."""
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (rows, width // extent, extent), generator=generator).float()
    scales = torch.rand(rows, width // extent, 1, generator=generator) + 0.01
    scales[1::7] *= -1  # zeros of both signs
    return (trits * scales).reshape(rows, width).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("extent", [16, 32, 64, 128, 256])
def test_ternary_weights_are_recognised_and_restored_exactly(extent: int, dtype: torch.dtype) -> None:
    weight = fake_quantised(33, 256, extent, extent, dtype)
    group = detect(InMemory(weight))
    assert group == (0 if extent == 256 else extent)
    packed = ternary.pack(weight, group)
    assert torch.equal(dequantise(packed).to(dtype), weight)
    assert packed.weight.shape == (33, 64)
    assert packed.scales is not None
    assert packed.scales.dtype == dtype


def test_ordinary_and_empty_weights_are_not_ternary() -> None:
    assert detect(InMemory(torch.randn(8, 64).bfloat16())) is None
    assert detect(InMemory(torch.zeros(8, 64))) is None
    spoiled = fake_quantised(1000, 64, 64, 1)
    spoiled[999, 3] = 0.123
    assert detect(InMemory(spoiled)) is None
    with pytest.raises(ValueError, match="not ternary"):
        ternary.pack(spoiled, 0)


@pytest.mark.parametrize("group", [0, 16, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_stays_within_half_a_step(bits: int, group: int) -> None:
    torch.manual_seed(bits + group)
    weight = torch.randn(40, 128)
    packed = integer.quantise(weight, bits, group)
    error = (dequantise(packed) - weight).square().mean().sqrt()
    assert error < (0.008 if bits == 8 else 0.14)
    assert packed.format == f"int{bits}"


def test_the_scale_search_beats_plain_absmax() -> None:
    torch.manual_seed(3)
    weight = torch.randn(64, 256)
    searched = integer.quantise(weight, 4, 64)
    grouped = weight.reshape(64, 4, 64)
    scale = (grouped.abs().amax(2, keepdim=True) / 7).half().float()
    plain = (torch.round(grouped / scale).clamp(-8, 7) * scale).reshape(64, 256)
    assert (dequantise(searched) - weight).square().sum() < 0.9 * (plain - weight).square().sum()


@pytest.mark.parametrize("group", [0, 32])
def test_the_scale_search_finds_the_best_of_its_steps(group: int) -> None:
    """Compare with the search written plainly, over more values than one block holds."""
    torch.manual_seed(group)
    weight = torch.randn(700, 256).bfloat16()
    grouped = weight.float().reshape(700, -1, group or 256)
    high, low = grouped.amax(dim=2, keepdim=True), grouped.amin(dim=2, keepdim=True)
    peak = torch.where(high > -low, high, low)
    errors = []
    for shrink in torch.linspace(1.0, 0.7, 16).tolist():
        scale = (peak * (shrink / -8)).half().float()
        errors.append((torch.round(grouped / scale).clamp(-8, 7) * scale - grouped).square().sum(dim=2))
    best = torch.stack(errors).amin(dim=0).sum()
    found = (dequantise(integer.quantise(weight, 4, group)) - weight.float()).square().sum()
    assert found < best * (1 + 1e-5)


def test_zero_rows_stay_zero() -> None:
    weight = torch.zeros(3, 32)
    assert not dequantise(integer.quantise(weight, 4, 16)).any()
    assert not dequantise(integer.quantise(weight, 8, 0)).any()


def test_act_order_restores_the_models_columns() -> None:
    weight = torch.randn(5, 32)
    order = torch.randperm(32).to(torch.int32)
    packed = integer.quantise(weight[:, order.long()], 8, 16)
    restored = dequantise(Packed("int8", 16, (5, 32), packed.weight, packed.scales, None, order))
    assert torch.allclose(restored, weight, atol=0.02)


@pytest.mark.parametrize("format", ["int8", "int4", "ternary"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(format: str, value: float) -> None:
    dense = torch.ones(4, 64)
    dense[2, 5] = value
    convert = _converter(Weight("w", ("w",), (4, 64), format, 32))
    with pytest.raises(UserError, match="w holds values that are not finite"):
        convert(Packed("dense", 0, (4, 64), dense), "w")


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_weights_whose_scales_float16_cannot_hold_are_refused(format: str) -> None:
    dense = torch.full((4, 64), 1e8)
    convert = _converter(Weight("w", ("w",), (4, 64), format, 32))
    with pytest.raises(UserError, match="too large for float16 scales"):
        convert(Packed("dense", 0, (4, 64), dense), "w")
