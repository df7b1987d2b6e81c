"""The judge must be right before its verdicts count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from arkinfer import parity as verify
from arkinfer.errors import ParityError

VOCABULARY = 50


class Table:
    """A model that looks logits up by token: executor and reference in one, with a fault to switch on."""

    def __init__(self, noise: float = 0.0, swap: bool = False) -> None:
        generator = np.random.default_rng(0)
        self.logits = generator.standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32) * 3
        self.logits += noise * np.random.default_rng(1).standard_normal(self.logits.shape).astype(np.float32)
        if swap:
            self.logits = self.logits[:, ::-1].copy()
        self.wrong = noise > 0 or swap

    def new_state(self, capacity: int | None = None) -> object:
        return object()

    def step(self, tokens: Sequence[int], state: Any, logits: Any = "last") -> np.ndarray:
        return self.logits[list(tokens)]

    def trace(self, tokens: Sequence[int], state: Any, names: Mapping[str, str] | None = None) -> dict[str, np.ndarray]:
        first, second = np.ones((len(tokens), 4), np.float32), np.ones((len(tokens), 4), np.float32)
        if self.wrong:
            second *= 1.5
        return {"layer.0": first, "layer.1": second}

    def perturbed(self) -> Table:
        return Table(1e-3)

    def residuals(self) -> dict[str, str]:
        return {"a": "layer.0", "b": "layer.1"}


def texts() -> tuple[list[list[int]], str]:
    return verify.windows(lambda text: [ord(c) % VOCABULARY for c in text], VOCABULARY, "fast", 512)


def judge(executor: Table, path: str = "float") -> verify.Report:
    return verify.compare(executor, Table(), texts(), "fast", path)  # type: ignore[arg-type]


def test_equal_models_pass_every_gate() -> None:
    for path in ("float", "fp16", "int8"):
        report = judge(Table(), path)
        assert report.passed
        assert report.mean_kl == 0
        assert report.top1 == 1
        verify.require(report)


@pytest.mark.parametrize(
    ("noise", "path", "passes"),
    [(1e-5, "float", True), (1e-2, "float", False), (1e-2, "fp16", True), (0.3, "int8", False)],
)
def test_noise_is_judged_by_the_gate_of_its_path(noise: float, path: str, passes: bool) -> None:
    assert judge(Table(noise), path).passed == passes


def test_a_wrong_model_is_refused_and_its_first_bad_layer_named() -> None:
    report = judge(Table(swap=True), "int8")
    assert not report.passed
    assert report.first_bad_layer == "layer.1"
    with pytest.raises(ParityError) as caught:
        verify.require(report)
    assert caught.value.facts["first bad layer"] == "layer.1"
    assert caught.value.exit_code == 4


def test_numbers_that_are_not_finite_never_pass() -> None:
    broken = Table()
    broken.logits[3, 3] = np.nan
    report = judge(broken)
    assert any("finite" in fault for fault in report.faults)


def test_divergence_is_the_textbook_formula() -> None:
    left, right = np.array([[0.0, 1.0, 2.0]]), np.array([[2.0, 1.0, 0.0]])
    p, q = (np.exp(x) / np.exp(x).sum() for x in (left, right))
    assert verify.divergence(left, right)[0] == pytest.approx(float((p * np.log(p / q)).sum()))
    assert verify.divergence(left, left + 100)[0] == pytest.approx(0, abs=1e-12)


def test_windows_hold_the_promised_positions_of_real_text() -> None:
    found, digest = verify.windows(lambda text: [ord(c) % VOCABULARY for c in text], 100000, "fast", 512)
    assert sum(map(len, found)) >= verify.SUITES["fast"] - 1
    assert max(map(len, found)) <= 512
    assert digest == verify.windows(lambda text: [ord(c) % VOCABULARY for c in text], 100000, "fast", 512)[1]
    assert digest != verify.windows(lambda text: [ord(c) % VOCABULARY for c in text], 100000, "fast", 256)[1]


def test_a_tokenizer_of_few_words_gets_random_tokens() -> None:
    found, _ = verify.windows(lambda text: [0] * len(text.split()), 30, "fast", 512)
    assert len({token for window in found for token in window}) == 30
