"""What quantising costs is measured rightly, and said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from arkinfer import pipeline, quality
from arkinfer.artifact.manifest import canonical
from arkinfer.checkpoint import open_checkpoint
from arkinfer.errors import UserError
from arkinfer.layerwise import Layerwise, fetch_from
from arkinfer.parity import TEXTS, whole_texts
from arkinfer.quant.pgptq import CALIBRATION
from arkinfer.recipe import Recipe, Rule
from arkinfer.reference import Reference
from arkinfer.weights import CheckpointWeights
from tests.checkpoints import CONFIGS, write_checkpoint

VOCABULARY = 40


class Table:
    """A model that looks logits up by token."""

    depth = 1

    def __init__(self, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits_of = torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 3
        self.logits_of += noise * torch.randn(VOCABULARY, VOCABULARY, generator=generator)

    def run(self, windows: Sequence[Sequence[int]], advance: Callable[[], None]) -> list[torch.Tensor]:
        advance()
        return [torch.tensor(list(window)) for window in windows]

    def logits(self, hidden: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        return (self.logits_of[tokens] for tokens in hidden)


def measure(packed: Table, texts: dict[str, list[list[int]]], format: str = "int4") -> quality.Report:
    return quality.measure(Table(), packed, texts, format)  # type: ignore[arg-type]


def texts(count: int = 3) -> dict[str, list[list[int]]]:
    generator = np.random.default_rng(5)
    return {name: generator.integers(0, VOCABULARY, (count, 50)).tolist() for name in ("code", "english")}


def test_equal_weights_cost_nothing() -> None:
    report = measure(Table(), texts())
    assert report.passed
    assert (report.overall.mean_kl, report.overall.top1, report.overall.ratio) == (0, 1, 1)
    assert report.overall.positions == 300


def test_figures_are_the_textbooks() -> None:
    found, packed = texts(1), Table(0.5)
    report = measure(packed, found)
    kl, loss, top = [], [], []
    for window in (found["code"][0], found["english"][0]):
        p, q = (torch.softmax(model.logits_of[window].double(), dim=1) for model in (Table(), packed))
        kl.append((p * (p / q).log()).sum(dim=1))
        loss.append(-q[torch.arange(49), torch.tensor(window[1:])].log())
        top.append(p.argmax(dim=1) == q.argmax(dim=1))
    assert report.overall.mean_kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-5)
    assert report.overall.perplexity == pytest.approx(float(torch.cat(loss).mean().exp()), rel=1e-5)
    assert report.overall.top1 == pytest.approx(float(torch.cat(top).float().mean()))
    assert report.texts["english"].mean_kl == pytest.approx(float(kl[1].mean()), rel=1e-5)
    assert report.texts["code"].perplexity == pytest.approx(float(loss[0].mean().exp()), rel=1e-5)


def test_the_gate_is_that_of_the_format() -> None:
    assert measure(Table(0.03), texts(), "int8").passed
    assert not measure(Table(0.15), texts(), "int8").passed
    assert measure(Table(0.15), texts(), "int4").passed
    faults = measure(Table(2.0), texts(), "int4").faults
    assert len(faults) == 3 and "KL" in faults[0] and "top token" in faults[1] and "perplexity" in faults[2]


def test_numbers_that_are_not_finite_are_a_fault_and_can_be_sealed() -> None:
    broken = Table()
    broken.logits_of[3, 3] = float("nan")
    broken.logits_of[4] = float("inf")
    report = measure(broken, texts())
    assert any("finite" in fault for fault in report.faults)
    canonical(report.to_dict())


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_layer_by_layer_is_what_the_reference_computes(family: str, tmp_path: Path) -> None:
    """Windows cross the sparse model's dense_len."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / family, CONFIGS[family]))
    recipe = Recipe("int4", "float", checkpoint.layouts())
    lowered = pipeline.lower(checkpoint.config, 256, recipe, checkpoint.layouts(), "fp32")
    weights = CheckpointWeights(checkpoint)
    windows = [[(7 * i + i * i) % 400 for i in range(count)] for count in (150, 3, 40)]
    model = Layerwise(checkpoint.config, fetch_from(lowered.graph, recipe.layouts, weights))
    draw = model.logits(model.run(windows, lambda: None))
    found = [next(draw)]
    assert torch.is_grad_enabled()  # the caller's setting, even while a measurement is under way
    found += draw
    reference = Reference(lowered.graph, weights, "fp32")
    for window, logits in zip(windows, found, strict=True):
        expected = reference.step(window, reference.new_state(len(window)), "all")
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("weights", "expected"), [("int4", "int4"), ("int8", "int8"), ("fp16", "int8"), ("fp32", None), ("kept", None)]
)
def test_what_loses_nothing_is_known(weights: str, expected: str | None, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", CONFIGS["llama"]))
    layouts, rules = checkpoint.layouts(), ()
    if weights == "kept":  # matrices as a ternary checkpoint has them, and the embedding and the head kept as floats
        layouts = {
            name: replace(layout, format="ternary", group=64) if "_proj.weight" in name else layout
            for name, layout in layouts.items()
        }
        weights, rules = "ternary", (Rule("*embed*", "fp32"), Rule("lm_head*", "fp32"))
    recipe = Recipe(weights, "float", layouts, rules)
    lowered = pipeline.lower(checkpoint.config, 256, recipe, checkpoint.layouts(), "fp32")
    assert quality.coarsest(lowered.graph, recipe) == expected
    if expected is None:
        weights_of = CheckpointWeights(checkpoint)
        facts = quality.examine(checkpoint, lowered.graph, recipe, weights_of, lambda text: [], True, lambda *_: None)
        assert facts == {"lossless": True}


def test_who_is_measured() -> None:
    small, large = 10**6, 8 * 10**9
    wanted = quality.wanted
    assert wanted("auto", "fast", small) and not wanted("auto", "fast", large)
    assert not wanted("auto", "none", small) and wanted("on", "none", large) and not wanted("off", "full", small)
    with pytest.raises(UserError, match="quality") as caught:
        wanted("of", "fast", small)
    assert "off" in caught.value.hint


def test_texts_are_taken_once_and_calibration_is_another_text() -> None:
    def encode(text: str) -> list[int]:
        return [ord(character) for character in text]

    found = whole_texts(encode, 1 << 17, TEXTS, 100, 900)
    assert sorted(found) == ["chinese", "code", "english"]
    for name, windows in found.items():
        text = (TEXTS / f"{name}.txt").read_text("utf-8")
        assert "".join(chr(token) for window in windows for token in window) == text[:300]
        assert max(map(len, windows)) <= 100
    assert list(whole_texts(lambda text: [0] * len(text), 70, TEXTS, 512, 600)) == ["random"]

    def sentences(folder: Path) -> set[str]:
        return {
            line for file in folder.glob("*.txt") for line in file.read_text("utf-8").splitlines() if len(line) > 20
        }

    assert len(sentences(CALIBRATION)) > 60
    assert not sentences(CALIBRATION) & sentences(TEXTS)
