"""Checkpoints of compressed-tensors against a writer made from the published layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer.errors import ArkError, UnsupportedError, UserError
from tests.checkpoint import packers
from tests.checkpoint.opening import one


def stated(bits: int, size: int, symmetric: bool = True, format: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": None if size == -1 else size,
        "strategy": "channel" if size == -1 else "group", "actorder": None, "dynamic": False, "observer": "minmax",
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights | more, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed",
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    bits=st.sampled_from([2, 4, 8]),
    symmetric=st.booleans(),
    groups=st.sampled_from([(-1, 52), (-1, 64), (16, 64), (32, 96), (64, 192)]),
    rows=st.sampled_from([5, 32, 50]),
    act_order=st.booleans(),
)
def test_every_packed_value_is_the_packers(
    seed: int, bits: int, symmetric: bool, groups: tuple[int, int], rows: int, act_order: bool
) -> None:
    size, width = groups
    drawn = packers.draw(seed, rows, width, bits, size, symmetric, act_order)
    tensors = packers.packed_integers(drawn, index=act_order)
    stored, values = one(tensors, stated(bits, size, symmetric))
    assert np.array_equal(values, drawn.matrix)
    layout = stored.layout
    assert (layout.format, layout.shape, layout.bits) == ({2: "int2", 4: "int4", 8: "int8"}[bits], (rows, width), bits)
    assert layout.scheme == "compressed-tensors"
    assert layout.zeros == ("weight_zero_point" in tensors)
    assert bool(layout.order) == (np.diff(drawn.group) < 0).any()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    groups=st.sampled_from([(-1, 50), (-1, 64), (16, 64), (64, 192)]),
)
def test_every_plain_value_is_the_packers(seed: int, bits: int, symmetric: bool, groups: tuple[int, int]) -> None:
    size, width = groups
    drawn = packers.draw(seed, 21, width, bits, size, symmetric)
    stored, values = one(packers.plain_integers(drawn), stated(bits, size, symmetric, "int-quantized"))
    assert np.array_equal(values, drawn.matrix)
    assert (stored.layout.format, stored.layout.bits) == ("int8", 8)


def test_an_index_that_was_never_filled() -> None:
    drawn = packers.draw(1, 32, 64, 4, 32, True)
    tensors = packers.packed_integers(drawn) | {"weight_g_idx": np.full(64, -1, np.int32)}
    assert np.array_equal(one(tensors, stated(4, 32))[1], drawn.matrix)


def _changed(part: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings = stated(4, 32)
    settings["config_groups"]["group_0"] |= part
    return settings | changes


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        (_changed({"input_activations": {"num_bits": 8}}), UnsupportedError, "in its activations too"),
        (_changed({"weights": None}), UnsupportedError, "otherwise than in its weights"),
        (_changed({}, format="float-quantized"), UnsupportedError, "compressed as 'float-quantized'"),
        (_changed({}, format="marlin-24"), UnsupportedError, "compressed as 'marlin-24'"),
        (_changed({}, sparsity_config={"format": "sparse-24-bitmask"}), UnsupportedError, "sparse"),
        (_changed({}, transform_config={"config_groups": {"u": {}}}), UnsupportedError, "rotated"),
        (_changed({}, config_groups=[]), UserError, "no config_groups"),
        (stated(4, 32, type="float"), UnsupportedError, "float of 4 bits"),
        (stated(3, 32), UnsupportedError, "int of 3 bits"),
        (stated(4, 32, strategy="block"), UnsupportedError, "strategy 'block'"),
        (stated(4, 16), UserError, "fits no group of quantization_config"),
        (stated(8, 32), UserError, "fits no group of quantization_config"),
        (stated(4, 0, strategy="group"), UserError, "fits no group of quantization_config"),
        (stated(4, 32, symmetric=False), UserError, r"weight_zero_point is missing"),
        ({"quant_method": "gptq", "bits": 4}, UserError, "packed as compressed-tensors"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], kind: type[ArkError], match: str) -> None:
    with pytest.raises(kind, match=match):
        one(packers.packed_integers(packers.draw(2, 32, 64, 4, 32, True)), settings)


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("weight_shape", np.array([1 << 40, 1 << 40]), r"weight_packed fits no group"),
        ("weight_shape", np.array([-32, 64]), r"weight_packed fits no group"),
        ("weight_shape", np.array([32, 64, 1]), r"weight_shape has the wrong shape"),
        ("weight_shape", np.array([32.0, 64.0], np.float32), r"weight_shape has a dtype"),
        ("weight_shape", None, r"weight_shape is missing"),
        ("weight_scale", None, r"weight_scale is missing"),
        ("weight_scale", np.zeros((31, 2), np.float16), r"weight_scale has the wrong shape"),
        ("weight_scale", np.zeros((32, 2), np.int32), r"weight_scale has a dtype"),
        ("weight_scale", np.zeros(1, np.float16), r"one scale a matrix"),
        ("weight_packed", np.zeros((32, 7), np.int32), r"weight_packed fits no group"),
        ("weight_packed", np.zeros((32, 8), np.int64), r"weight_packed has a dtype"),
        ("weight_zero_point", np.zeros((3, 2), np.int32), r"weight_zero_point has the wrong shape"),
        ("weight_g_idx", np.zeros(64, np.int32), r"weight_g_idx gives group 0 64 inputs"),
        ("weight_g_idx", np.zeros(63, np.int32), r"weight_g_idx has the wrong shape"),
    ],
)
def test_damaged_tensors_are_named(name: str, tensor: np.ndarray | None, match: str) -> None:
    tensors = packers.packed_integers(packers.draw(3, 32, 64, 4, 32, True))
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(ArkError, match=match):
        one(tensors, stated(4, 32))


def test_scaled_floats_are_refused() -> None:
    tensors = {"weight": np.zeros((32, 64), np.float16), "weight_scale": np.zeros((32, 1), np.float16)}
    with pytest.raises(UnsupportedError, match="scaled weights are F16"):
        one(tensors, stated(8, -1, format="int-quantized"))
