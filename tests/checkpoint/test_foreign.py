"""Bytes that AutoGPTQ, AutoAWQ and compressed-tensors packed; write_foreign.py tells which versions and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoint import packers
from tests.checkpoint.opening import one
from tests.checkpoint.packers import Drawn

STORED = load_file(Path(__file__).with_name("foreign.safetensors"))


def compressed(bits: int, symmetric: bool, format: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": {"weights": weights}}}


SETTINGS: dict[str, dict[str, Any]] = {
    **{f"gptq-{bits}": {"bits": bits, "group_size": 32, "desc_act": bits == 4} for bits in (2, 3, 4, 8)},
    **{f"marlin-{width}": {"bits": 4, "group_size": 128, "is_marlin_format": True} for width in (128, 256)},
    "awq": {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"},
    "pack-quantized-4": compressed(4, False, "pack-quantized"),
    "pack-quantized-8": compressed(8, True, "pack-quantized"),
    "int-quantized-8": compressed(8, False, "int-quantized"),
}


def stored(name: str) -> tuple[Drawn, packers.Tensors]:
    """Return the numbers that were packed, and the tensors that the tool made of them."""
    tensors = {key.split("/")[1]: value for key, value in STORED.items() if key.startswith(f"{name}/")}
    parts = {part: tensors.pop(f"drawn.{part}") for part in ("codes", "zeros", "group", "scales")}
    bits = 4 if name == "awq" or name.startswith("marlin") else int(name[-1])
    integers = {part: parts[part].astype(np.int64) for part in ("codes", "zeros", "group")}
    return Drawn(bits, scales=parts["scales"], **integers), tensors


def test_every_stored_case_is_tried() -> None:
    assert {key.split("/")[0] for key in STORED} == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_values_are_those_that_were_packed(name: str) -> None:
    drawn, tensors = stored(name)
    _, values = one(tensors, SETTINGS[name])
    assert np.array_equal(values, drawn.matrix)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_writers_of_these_tests_pack_alike(name: str) -> None:
    """What the property tests draw is packed as the tools would have packed it."""
    drawn, tensors = stored(name)
    pack = {
        "gptq": packers.gptq, "awq": packers.awq, "marlin": lambda drawn: packers.marlin(drawn, ("B", "s")),
        "pack": packers.packed_integers, "int": packers.plain_integers,
    }[name.split("-")[0]]  # fmt: skip
    packed = pack(drawn)
    assert set(packed) == set(tensors)
    for suffix, tensor in tensors.items():
        assert np.array_equal(packed[suffix].astype(tensor.dtype), tensor), suffix
