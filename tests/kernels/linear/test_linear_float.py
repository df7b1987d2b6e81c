"""Products with float activations: as exact as float32 sums are, the same bits in every form."""

from __future__ import annotations

import numpy as np
import pytest

from arkinfer.exporters.kernels.tir import pack
from arkinfer.exporters.kernels.tir.linear_float import linear_float
from tests.kernels.linear.kernel_runner import EMULATED, RUNNABLE, run
from tests.kernels.linear.samples import Case, sample, stored_floats

PACKED = [
    Case("ternary", 64, 192, 37, scales="bfloat16"),
    Case("ternary", 24, 72, 33),
    Case("ternary", 0, 50, 20),
    Case("int4", 32, 128, 40, zeros=True, bias=True),
    Case("int4", 512, 1024, 48, gated=True),
    Case("int8", 128, 256, 45, scales="float32"),
    Case("int8", 8, 24, 5),
    Case("int8", 32, 96, 37, zeros=True),
    Case("int2", 16, 64, 33, zeros=True),
    Case("int2", 0, 50, 20),
]
DENSE = [
    ("float32", 50, 37, False, False),
    ("float16", 64, 48, True, False),
    ("bfloat16", 33, 20, False, False),
    ("float16", 64, 70, False, True),
]


def inputs(tokens: int, width: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((tokens, width)).astype(np.float32)


def swiglu(y: np.ndarray) -> np.ndarray:
    gate, up = np.split(y, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def check(isa: str, options: dict[str, object], packed: list[np.ndarray], wanted: np.ndarray, x: np.ndarray) -> None:
    """Compare with ``wanted``, and every other form and number of tokens with the first, bitwise."""
    columns = wanted.shape[1]
    y = run(linear_float, isa, "many", options, [x, *packed], [(wanted.shape, "float32")])[0]
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=3e-6 * np.abs(wanted).max())
    for row in (0, 16):
        alone = run(linear_float, isa, "one", options, [x[row : row + 1], *packed], [((1, columns), "float32")])[0]
        np.testing.assert_array_equal(alone[0], y[row])
    for count in (1, 2, 3, 5, 7):
        few = run(linear_float, isa, "many", options, [x[:count], *packed], [((count, columns), "float32")])[0]
        np.testing.assert_array_equal(few, y[:count])


@pytest.mark.parametrize(
    ("isa", "case"),
    [(isa, case) for isa in RUNNABLE for case in PACKED] + [(EMULATED[0], PACKED[i]) for i in (0, 2, 3, 7)],
    ids=str,
)
def test_packed_weights(isa: str, case: Case) -> None:
    weight, x = sample(case), inputs(17, case.width)
    wanted = x.astype(np.float64) @ weight.dequantised().T + (weight.bias if case.bias else 0)
    check(isa, case.options, weight.packed, swiglu(wanted) if case.gated else wanted, x)


@pytest.mark.parametrize(("dtype", "width", "rows", "bias", "gated"), DENSE)
@pytest.mark.parametrize("isa", [*RUNNABLE, EMULATED[0]])
def test_dense_weights(isa: str, dtype: str, width: int, rows: int, bias: bool, gated: bool) -> None:
    stored, exact = stored_floats(np.random.default_rng(3).standard_normal((rows, width)), dtype)
    matrix = pack.Matrix("dense", rows, width, gated=gated)
    packed = [np.concatenate(list(pack.weight(matrix, lambda first, last: stored[first:last])))]
    added = np.random.default_rng(4).standard_normal(rows).astype(np.float32)
    packed += [added] if bias else []
    x = inputs(17, width)
    wanted = x.astype(np.float64) @ exact.T + (added if bias else 0)
    options: dict[str, object] = {"format": "dense", "dtype": dtype, "bias": bias, "gated": gated}
    check(isa, options, packed, swiglu(wanted) if gated else wanted, x)
