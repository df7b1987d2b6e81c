"""P-GPTQ keeps what a layer computes, leaves the first positions out, and gives the same bytes every time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer import pipeline, quality, targets
from arkinfer.checkpoint import open_checkpoint
from arkinfer.checkpoint.base import Checkpoint
from arkinfer.errors import UnsupportedError, UserError
from arkinfer.graph import ModelGraph
from arkinfer.layerwise import workers
from arkinfer.passes import formats
from arkinfer.quant import integer, pgptq
from arkinfer.quant.packed import dequantise
from arkinfer.recipe import Recipe, Rounding, Storage, choose
from arkinfer.runtime.tokenizer import Tokenizer
from arkinfer.targets import probe
from arkinfer.weights import CheckpointWeights
from tests.checkpoints import CONFIGS, write_checkpoint


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return correlated inputs (tokens, width), as those of a layer are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    return torch.randn(tokens, width, generator=generator) @ mixing


def lowered(checkpoint: Checkpoint, weights: str, **wishes: Any) -> pipeline.Lowered:
    rounding = Rounding.of(targets.load("cpu").defaults, **wishes)

    def recipe(graph: ModelGraph) -> Recipe:
        used = [source for weight in graph.weights.values() for source in weight.sources]
        return choose(weights, "int8", formats.body(graph), used, checkpoint, rounding=rounding)

    return pipeline.lower(checkpoint.config, 256, recipe, checkpoint.layouts(), "fp32")


def encoder(checkpoint: Checkpoint, folder: Path) -> Any:
    data = checkpoint.asset("tokenizer.json")
    assert data is not None
    (folder / "tokenizer.json").write_bytes(data)
    return Tokenizer.from_file(folder / "tokenizer.json").encode


def rounded(checkpoint: Checkpoint, recipe: Recipe, folder: Path) -> Checkpoint:
    folder.mkdir()
    return pgptq.quantise(checkpoint, recipe, encoder(checkpoint, folder), lambda name: folder / name, lambda *_: None)


def test_the_hessian_leaves_the_first_positions_out() -> None:
    windows = [inputs(30, 20, seed) for seed in range(7)]
    kept = torch.cat([window[4:] for window in windows]).double().flip(1)
    for window in windows:
        window[:4] = 1e6  # massive activations, as position 0 has them
    with workers() as pool:
        found = pgptq.hessian(pool, windows)
    expected = (2 * kept.T @ kept).tril()
    torch.testing.assert_close(found.tril().double(), expected, rtol=1e-4, atol=1e-3)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_factor_is_that_of_the_damped_inverse(width: int, tokens: int, seed: int) -> None:
    x = inputs(tokens + 4, width, seed)
    with workers() as pool:
        factor = pgptq.inverse_factor(pool, pgptq.hessian(pool, [x])).double()
    hessian = 2 * x[4:].double().T @ x[4:].double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(width)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ hessian, torch.eye(width).double(), rtol=0, atol=5e-3)


def test_the_factor_over_several_slices_and_of_inputs_that_are_always_zero() -> None:
    x = inputs(700, 2 * pgptq.SLICE + 13)
    x[:, 5] = 0
    with workers() as pool:
        factor = pgptq.inverse_factor(pool, pgptq.hessian(pool, [x])).double()
        assert torch.isfinite(pgptq.inverse_factor(pool, pgptq.hessian(pool, [torch.zeros(9, 16)]))).all()
    hessian = 2 * x[4:].double().T @ x[4:].double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(factor))
    torch.testing.assert_close(factor.T @ factor @ hessian, torch.eye(len(factor)).double(), rtol=0, atol=5e-2)


def test_inputs_that_are_not_numbers_are_refused() -> None:
    with workers() as pool, pytest.raises(UserError, match="finite"):
        pgptq.inverse_factor(pool, pgptq.hessian(pool, [torch.full((9, 16), float("nan"))]))


@pytest.mark.parametrize(("width", "group"), [(256, 32), (256, 128), (192, 96), (144, 48), (100, 0), (300, 0)])
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_outputs_are_closer_than_those_of_the_search(width: int, group: int, form: str) -> None:
    generator = torch.Generator().manual_seed(width)
    weight, x = torch.randn(300, width, generator=generator), inputs(2000, width)
    with workers() as pool:
        factor = pgptq.inverse_factor(pool, pgptq.hessian(pool, [x[:1500]]))
        packed = pgptq.round_weight(pool, weight, factor, Storage(form, group, "F16"))
    plain = integer.quantise(weight, 8 if form == "int8" else 4, group)
    assert packed.scales is not None and plain.scales is not None
    assert (packed.weight.shape, packed.weight.dtype) == (plain.weight.shape, plain.weight.dtype)
    assert (packed.scales.shape, packed.scales.dtype) == (plain.scales.shape, plain.scales.dtype)
    held_out = x[1500:]
    error, searched = (((dequantise(w) - weight) @ held_out.T).square().mean() for w in (packed, plain))
    assert error < 0.8 * searched


def test_without_errors_to_make_up_for_it_is_the_search() -> None:
    """Where inputs do not go together, there is nothing to correct."""
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    with workers() as pool:
        packed = pgptq.round_weight(pool, weight, torch.eye(64), Storage("int4", 32, "F16"))
    plain = integer.quantise(weight, 4, 32)
    assert torch.equal(packed.weight, plain.weight)
    assert packed.scales is not None and plain.scales is not None and torch.equal(packed.scales, plain.scales)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_gives_the_same_bytes_on_any_number_of_threads(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / family, CONFIGS[family]))
    recipe = lowered(checkpoint, "int4", rules=["*.v_proj.*=int8", "*.o_proj.*=fp16"], method="pgptq").recipe
    files, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = rounded(checkpoint, recipe, tmp_path / str(threads))
            names = [name for name in found.weights if found.weights[name] is not checkpoint.weights[name]]
            files.append({name: (tmp_path / str(threads) / f"{name}.safetensors").read_bytes() for name in names})
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1]
    assert len(names) == 2 * 6 and not any("o_proj" in name for name in names)
    assert found.weight("model.layers.1.self_attn.v_proj.weight").layout.format == "int8"
    assert found.weight("model.layers.1.mlp.up_proj.weight").layout.format == "int4"


def test_it_beats_the_search_on_text_that_it_has_not_seen(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("tiny-minicpm")
    found = {}
    for method in ("search", "pgptq"):
        model = lowered(checkpoint, "int4", group=128, method=method)
        source = checkpoint if method == "search" else rounded(checkpoint, model.recipe, tmp_path / method)
        encode = encoder(checkpoint, tmp_path)
        weights = CheckpointWeights(source)
        found[method] = quality.examine(checkpoint, model.graph, model.recipe, weights, encode, True, lambda *_: None)
    search, corrected = found["search"], found["pgptq"]
    assert search is not None and corrected is not None
    assert corrected["mean_kl"] < 0.6 * search["mean_kl"]
    assert corrected["top1"] > search["top1"]


def test_too_little_memory_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "llama", CONFIGS["llama"]))
    recipe = lowered(checkpoint, "int4", method="pgptq").recipe
    monkeypatch.setattr(probe, "machine", lambda: SimpleNamespace(available=100_000))
    monkeypatch.setattr(pgptq, "Layerwise", None)
    with pytest.raises(UnsupportedError, match="memory") as caught:
        rounded(checkpoint, recipe, tmp_path / "scratch")
    assert "--method search" in caught.value.hint
