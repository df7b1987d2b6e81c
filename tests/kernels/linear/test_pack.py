"""Packing for kernels: back to the same codes, in slices, with zero padding; and the embedding that reads it."""

from __future__ import annotations

import numpy as np
import pytest

from arkinfer.errors import UserError
from arkinfer.exporters.kernels.tir import layout, pack
from arkinfer.exporters.kernels.tir.embedding import embedding
from arkinfer.exporters.kernels.tir.isa import ISAS
from arkinfer.targets.probe import LEVELS
from tests.kernels.linear.kernel_runner import RUNNABLE, run
from tests.kernels.linear.samples import Case, canonical_bytes, sample, stored_floats

CASES = [
    Case("ternary", 24, 72, 33),
    Case("ternary", 0, 50, 36, gated=True),
    Case("int4", 8, 64, 37),
    Case("int2", 24, 72, 33),
    Case("int2", 0, 50, 36, gated=True),
    Case("int8", 128, 256, 70, gated=True),
    Case("int4", 64, 192, 70, gated=True),
    Case("ternary", 128, 256, 33),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpacking_inverts_packing_in_any_slices(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(0, layout.code_format(case.format).limit + 1, (case.rows, case.width))
    canonical = canonical_bytes(case.format, codes)
    whole = np.concatenate(list(pack.weight(case.matrix, lambda first, last: canonical[first:last])))
    assert whole.shape == pack.weight_shape(case.matrix)
    expected = codes - 128 if case.format == "int8" else codes
    np.testing.assert_array_equal(pack.unpack(case.matrix, whole), expected)
    monkeypatch.setattr(pack, "SLICE_BYTES", 1)
    slices = list(pack.weight(case.matrix, lambda first, last: canonical[first:last]))
    assert len(slices) == case.matrix.panels // case.matrix.halves
    np.testing.assert_array_equal(np.concatenate(slices), whole)
    np.testing.assert_array_equal(pack.canonical(case.matrix, whole), canonical)


@pytest.mark.parametrize("case", [case for case in CASES if case.matrix.whole_words], ids=str)
def test_words_and_single_codes_are_packed_alike(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(1).integers(0, layout.code_format(case.format).limit + 1, (case.rows, case.width))
    canonical = canonical_bytes(case.format, codes)
    quick = np.concatenate(list(pack.weight(case.matrix, lambda first, last: canonical[first:last])))
    monkeypatch.setattr(pack.Matrix, "whole_words", False)
    np.testing.assert_array_equal(
        np.concatenate(list(pack.weight(case.matrix, lambda first, last: canonical[first:last]))), quick
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
def test_scales_and_zeros_come_back(dtype: str, gated: bool) -> None:
    matrix = pack.Matrix("int4", 74, 96, 32, gated)
    values = np.random.default_rng(0).integers(0, 200, (74, 3)).astype(dtype)
    panels = np.concatenate(list(pack.vectors(matrix, lambda first, last: values[first:last])))
    assert panels.shape == (matrix.panels, 3, 16) and panels.dtype == values.dtype
    np.testing.assert_array_equal(pack.unpack(matrix, panels), values)


def test_gate_and_up_panels_alternate() -> None:
    matrix = pack.Matrix("dense", 40, 3, gated=True)
    rows = np.arange(120, dtype=np.float32).reshape(40, 3)
    packed = np.concatenate(list(pack.weight(matrix, lambda first, last: rows[first:last])))
    assert packed.shape == (4, 3, 16)
    np.testing.assert_array_equal(packed[0].T, rows[:16])
    np.testing.assert_array_equal(packed[1].T, rows[20:36])
    np.testing.assert_array_equal(packed[2].T[:4], rows[16:20])
    assert not packed[2].T[4:].any() and not packed[3].T[4:].any()
    np.testing.assert_array_equal(pack.unpack(matrix, packed), rows)


@pytest.mark.parametrize(
    "case",
    [
        Case("int8", 128, 256, 37),
        Case("int8", 32, 96, 21, zeros=True),
        Case("int4", 40, 120, 20, zeros=True),
        Case("int2", 16, 48, 19, zeros=True),
        Case("int2", 0, 50, 20),
        Case("ternary", 24, 72, 33, scales="bfloat16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("isa", RUNNABLE)
def test_embedding_reads_the_packed_head(isa: str, case: Case) -> None:
    weight, tokens = sample(case), np.array([3, 0, case.rows - 1, 16, 3], np.int32)
    options = {key: value for key, value in case.options.items() if key not in ("bias", "gated")} | {"scale": 12.0}
    y = run(embedding, isa, "many", options, [tokens, *weight.packed], [((5, case.width), "float32")])[0]
    np.testing.assert_allclose(y, 12.0 * weight.dequantised()[tokens], rtol=1e-6)
    one = run(embedding, isa, "one", options, [tokens[:1], *weight.packed], [((1, case.width), "float32")])[0]
    np.testing.assert_array_equal(one[0], y[0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("isa", RUNNABLE)
def test_embedding_of_dense_rows(isa: str, dtype: str) -> None:
    stored, exact = stored_floats(np.random.default_rng(1).standard_normal((37, 21)), dtype)
    matrix = pack.Matrix("dense", 37, 21)
    packed = np.concatenate(list(pack.weight(matrix, lambda first, last: stored[first:last])))
    tokens = np.array([36, 0, 17], np.int32)
    options = {"format": "dense", "dtype": dtype, "scale": 1.0}
    y = run(embedding, isa, "many", options, [tokens, packed], [((3, 21), "float32")])[0]
    np.testing.assert_array_equal(y, exact[tokens].astype(np.float32))


def test_kernels_and_machines_know_the_same_levels() -> None:
    assert set(ISAS) == set(LEVELS)


def test_wrong_formats_and_groups_are_refused() -> None:
    with pytest.raises(UserError, match="int3"):
        layout.code_format("int3")
    with pytest.raises(UserError, match="do not divide"):
        layout.grouping("int4", 48, 100)
