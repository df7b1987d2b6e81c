"""Products with int8 activations: exact in integers, close in floats, the same bits in every form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm_ffi

from arkinfer.errors import UserError
from arkinfer.exporters.kernels.tir.isa import AARCH64_DOTPROD
from arkinfer.exporters.kernels.tir.linear_int8 import linear_int8
from tests.kernels.linear.kernel_runner import EMULATED, RUNNABLE, run
from tests.kernels.linear.samples import Case, activations, sample

CASES = [
    Case("ternary", 64, 192, 37),
    Case("ternary", 16, 64, 16, scales="bfloat16"),
    Case("ternary", 24, 72, 33),
    Case("ternary", 0, 50, 20),
    Case("ternary", 512, 1024, 35, scales="float32"),
    Case("ternary", 64, 128, 70, gated=True),
    Case("int4", 64, 128, 40, zeros=True),
    Case("int4", 8, 64, 19),
    Case("int4", 128, 384, 32, bias=True, scales="bfloat16"),
    Case("int4", 40, 120, 50, zeros=True, bias=True),
    Case("int8", 128, 256, 45),
    Case("int8", 64, 64, 17, bias=True),
    Case("int8", 0, 96, 64, gated=True),
    Case("int8", 8, 24, 5, scales="float32"),
    Case("int8", 32, 96, 37, zeros=True),
    Case("int8", 0, 50, 21, zeros=True, bias=True),
    Case("int2", 64, 192, 37),
    Case("int2", 16, 64, 33, zeros=True),
    Case("int2", 0, 50, 20, zeros=True),
    Case("int2", 128, 256, 70, zeros=True, gated=True),
]
FEW = (0, 2, 5, 6, 9, 12, 15, 17)  # what also runs under qemu: all formats, odd sizes, zero points, gates


def product(case: Case, isa: str, tokens: int, form: str = "many", unit_scales: bool = False) -> np.ndarray:
    _, x = activations(case, tokens, unit_scales=unit_scales)
    weight = sample(case, unit_scales=unit_scales)
    outputs = [((tokens, case.columns), "float32")]
    return run(linear_int8, isa, form, case.options, [*x, *weight.packed], outputs)[0]


def expected(case: Case, tokens: int, unit_scales: bool = False) -> np.ndarray:
    """The definition of arkinfer.ops.linear in float64."""
    codes, (_, scales, _) = activations(case, tokens, unit_scales=unit_scales)
    weight = sample(case, unit_scales=unit_scales)
    x = codes * np.repeat(scales.astype(np.float64), case.width // scales.shape[1], axis=1)
    y = x @ weight.dequantised().T + (weight.bias if case.bias else 0)
    if not case.gated:
        return y
    gate, up = np.split(y, 2, axis=1)
    return gate / (1 + np.exp(np.minimum(-gate, 700))) * up


@pytest.mark.parametrize(
    ("isa", "case"),
    [(isa, case) for isa in RUNNABLE for case in CASES] + [(isa, CASES[i]) for isa in EMULATED for i in FEW],
    ids=str,
)
def test_close_to_the_definition_in_every_form(isa: str, case: Case) -> None:
    y = product(case, isa, 17)
    wanted = expected(case, 17)
    np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-6 * np.abs(wanted).max())
    _, x = activations(case, 17)
    weight = sample(case)
    for row in (0, 16):
        alone = [part[row : row + 1] for part in x]
        one = run(linear_int8, isa, "one", case.options, [*alone, *weight.packed], [((1, case.columns), "float32")])[0]
        np.testing.assert_array_equal(one[0], y[row])
    for count in (1, 2, 3, 5, 7):
        some = [part[:count] for part in x]
        outputs = [((count, case.columns), "float32")]
        few = run(linear_int8, isa, "many", case.options, [*some, *weight.packed], outputs)[0]
        np.testing.assert_array_equal(few, y[:count])


@pytest.mark.parametrize("case", [case for case in CASES if not case.gated and not case.bias], ids=str)
@pytest.mark.parametrize("isa", RUNNABLE)
def test_integers_are_exact(isa: str, case: Case) -> None:
    codes, _ = activations(case, 17)
    exact = codes @ sample(case).integers.T
    assert np.abs(exact).max() < 2**24
    np.testing.assert_array_equal(product(case, isa, 17, unit_scales=True), exact.astype(np.float32))


@pytest.mark.parametrize("format", ["int8", "int4", "int2"])
@pytest.mark.parametrize("isa", [*RUNNABLE, *EMULATED])
def test_codes_at_their_limits_do_not_saturate(isa: str, format: str) -> None:
    case = Case(format, 128, 256, 45)
    weight, (_, scales, _) = sample(case, unit_scales=True), activations(case, 2, unit_scales=True)[1]
    x = np.full((2, 256), -127, np.int8)
    x[1] = 127
    sums = x.reshape(2, 2, 128).sum(axis=2, dtype=np.int32)
    zero = {"int8": 128, "int4": 8, "int2": 2}[format]
    for byte, code in ((0, 0), (255, 2 * zero - 1)):
        worst = np.full_like(weight.packed[0], byte)
        inputs = [x, scales, sums, worst, weight.packed[1]]
        y = run(linear_int8, isa, "many", case.options, inputs, [((2, 45), "float32")])[0]
        exact = (code - zero) * 127.0 * 256
        np.testing.assert_array_equal(y, np.repeat([[-exact], [exact]], 45, axis=1))


@pytest.mark.parametrize("isa", RUNNABLE)
def test_threads_do_not_change_a_bit(isa: str) -> None:
    case = Case("ternary", 64, 192, 37)
    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    try:
        configure(1, 1)
        single = product(case, isa, 17), product(case, isa, 1, "one")
    finally:
        configure(1, 2)
    for alone, shared in zip(single, (product(case, isa, 17), product(case, isa, 1, "one")), strict=True):
        np.testing.assert_array_equal(alone, shared)


def test_levels_agree_bitwise() -> None:
    # Sums are exact integers and the few float steps are the same everywhere.
    for case in (CASES[0], CASES[6], CASES[10], CASES[14], CASES[17]):
        emulated = EMULATED if case is CASES[0] else ()
        results = [product(case, isa, 5) for isa in (*RUNNABLE, *emulated)]
        for other in results[1:]:
            np.testing.assert_array_equal(results[0], other)


def test_a_gated_product_refuses_a_bias() -> None:
    with pytest.raises(UserError, match="no bias"):
        linear_int8(AARCH64_DOTPROD, "one", **replace(CASES[0], gated=True, bias=True).options)
