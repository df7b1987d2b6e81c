"""AWQ checkpoints against a writer made from the published layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer.errors import ArkError, UnsupportedError, UserError
from tests.checkpoint import packers
from tests.checkpoint.opening import one


def stated(size: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm", **more}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    symmetric=st.booleans(),
    groups=st.sampled_from([(-1, 48), (-1, 64), (16, 64), (32, 96), (64, 64), (64, 192)]),
    rows=st.sampled_from([8, 24, 64, 104]),
)
def test_every_value_is_the_packers(seed: int, symmetric: bool, groups: tuple[int, int], rows: int) -> None:
    size, width = groups
    drawn = packers.draw(seed, rows, width, 4, size, symmetric)
    tensors = packers.awq(drawn)
    stored, values = one(tensors, stated(size))
    assert np.array_equal(values, drawn.matrix)
    layout = stored.layout
    assert (layout.format, layout.shape, layout.scheme, layout.bits) == ("int4", (rows, width), "awq", 4)
    assert layout.zeros == (drawn.zeros != 8).any()
    assert stored.nbytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("spelt", [None, {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}])
def test_older_settings_and_none(spelt: dict[str, Any] | None) -> None:
    drawn = packers.draw(1, 32, 64, 4, 16, symmetric=False)
    assert np.array_equal(one(packers.awq(drawn), spelt)[1], drawn.matrix)


def _damage(kind: str, tensors: dict[str, np.ndarray]) -> None:
    name, _, what = kind.partition(" ")
    if what == "short":
        tensors[name] = tensors[name][:-1].copy()
    elif what == "narrow":
        tensors[name] = tensors[name][:, :-1].copy()
    elif what == "wide":
        tensors[name] = tensors[name].astype(np.int64)
    elif what == "flat":
        tensors[name] = tensors[name].reshape(-1)
    elif what == "integers":
        tensors[name] = tensors[name].astype(np.int32)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("qweight short", r"scales has the wrong shape|qweight has the wrong shape|groups of 32"),
        ("qweight wide", r"lm_head\.qweight has a dtype"),
        ("qweight flat", r"lm_head is empty"),
        ("scales short", r"lm_head\.scales has the wrong shape"),
        ("scales narrow", r"lm_head\.scales has the wrong shape"),
        ("scales integers", r"lm_head\.scales has a dtype"),
        ("qzeros short", r"lm_head\.qzeros has the wrong shape"),
        ("qzeros narrow", r"lm_head\.qzeros has the wrong shape"),
        ("qzeros wide", r"lm_head\.qzeros has a dtype"),
    ],
)
def test_damaged_tensors_are_named(kind: str, match: str) -> None:
    tensors = packers.awq(packers.draw(2, 32, 64, 4, 32, False))
    _damage(kind, tensors)
    with pytest.raises(ArkError, match=match):
        one(tensors, stated(32))


@pytest.mark.parametrize(
    ("changed", "kind", "match"),
    [
        ({"bits": 8}, UnsupportedError, "AWQ with 8 bits"),
        ({"version": "gemv"}, UnsupportedError, "version 'gemv'"),
        ({"checkpoint_format": "gemv_fast"}, UnsupportedError, "version 'gemv_fast'"),
        ({"group_size": 64}, UserError, "scales has the wrong shape"),
        ({"group_size": 32.0}, UserError, "`group_size` that is not an integer"),
        ({"quant_method": "gptq"}, UserError, "packed as AWQ"),
    ],
)
def test_settings_that_do_not_fit(changed: dict[str, Any], kind: type[ArkError], match: str) -> None:
    tensors = packers.awq(packers.draw(3, 32, 64, 4, 32, False))
    with pytest.raises(kind, match=match):
        one(tensors, stated(32) | changed)
