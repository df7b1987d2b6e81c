"""The onnxruntime backend: caches in place, chunks, copies, and what it says where it cannot run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import arkinfer
from arkinfer import pipeline
from arkinfer.artifact import Artifact
from arkinfer.backends import onnxruntime as backend
from arkinfer.errors import UnsupportedError, UserError

TOKENS = [(17 * index + index * index) % 400 for index in range(90)]


@pytest.fixture(scope="module")
def executor(floats: Artifact) -> backend.OnnxruntimeExecutor:
    return backend.open(floats, threads=1)


def addresses(state: backend.OnnxruntimeState) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in state.values.items()}


def test_the_caches_are_updated_where_they_are(executor: backend.OnnxruntimeExecutor) -> None:
    """The arrays that the state holds show new keys after a step, with nothing fetched from the session."""
    state = executor.new_state(256)
    before = addresses(state)
    executor.step(TOKENS[:7], state)
    executor.step(TOKENS[7:8], state)
    assert addresses(state) == before
    for name, value in state.values.items():
        array = value.numpy()
        assert array.any(axis=(1, 3))[0, :8].all() and not array[:, :, 8:].any(), name
    outputs = {each.name: each for each in executor.session.get_outputs()}
    assert all(f"{name}.out" in outputs for name in state.values)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=6), forgotten=st.integers(0, 30))
def test_logits_do_not_depend_on_how_tokens_are_cut(
    executor: backend.OnnxruntimeExecutor, cuts: list[int], forgotten: int
) -> None:
    whole = executor.step(TOKENS, executor.new_state(), "all")
    state, rows, start = executor.new_state(96), [], 0
    executor.step(TOKENS[5 : 5 + forgotten] or TOKENS[:1], state, "none")
    state.truncate(0)
    for size in [*cuts, len(TOKENS)]:
        tokens = TOKENS[start : start + size]
        if tokens:
            rows.append(executor.step(tokens, state, "all"))
        start += len(tokens)
    np.testing.assert_allclose(np.concatenate(rows), whole, atol=2e-5)


def test_forks_are_independent(executor: backend.OnnxruntimeExecutor) -> None:
    state = executor.new_state(64)
    assert executor.step(TOKENS[:20], state, "none").shape == (0, 400)
    twin = state.fork()
    first = executor.step(TOKENS[20:21], state)
    executor.step(TOKENS[50:60], state)
    assert np.array_equal(executor.step(TOKENS[20:21], twin), first)
    with pytest.raises(UserError, match="the context is full"):
        executor.step(TOKENS[:60], twin)
    assert twin.length == 21


def test_inner_values_are_those_of_the_reference(checkpoints: dict[str, Path], floats: Artifact) -> None:
    from arkinfer.recipe import Recipe
    from arkinfer.reference import Reference
    from arkinfer.weights import CheckpointWeights

    manifest = floats.manifest
    recipe = Recipe.from_dict(manifest.weights, manifest.activations, manifest.model["recipe"])
    checkpoint = pipeline.open_checkpoint(checkpoints["qwen3"])
    graph = pipeline.lower(checkpoint.config, manifest.context, recipe, recipe.layouts, manifest.kv).graph
    reference = Reference(graph, CheckpointWeights(checkpoint), "fp32")
    right = reference.trace(TOKENS[:9], reference.new_state(9), reference.residuals())
    executor = backend.open(floats, threads=1)
    got = executor.trace(TOKENS[:9], executor.new_state(9))
    assert right.keys() == got.keys() and len(right) > 0
    for name, value in right.items():
        np.testing.assert_allclose(got[name], value, atol=1e-4, rtol=1e-4)
        assert executor.tap([name])[name] is got[name]
    executor.close()


def test_an_artifact_speaks(floats: Artifact) -> None:
    with arkinfer.load(floats.path, threads=1) as engine:
        answer = engine.generate("Once upon a time", max_tokens=5, temperature=0)
        assert len(answer.tokens) == 5


def test_a_gpu_artifact_is_never_run_by_a_processor(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    artifact = pipeline.build(
        checkpoints["llama"], target="onnx-cuda", out=tmp_path / "gpu.ark", weights="fp16", verify="none"
    )
    with pytest.raises(UnsupportedError) as caught:
        backend.open(artifact)
    assert caught.value.code == "ARK-E352" and "arkinfer[runtime,onnxruntime-gpu]" in caught.value.render()


def test_a_session_that_fell_back_is_refused(floats: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime only warns where CUDA does not load, and goes on with the processor."""
    monkeypatch.setitem(backend.PROVIDERS, "cpu", "CUDAExecutionProvider")
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(UnsupportedError, match="without the CUDAExecutionProvider"):
        backend.open(floats)


@pytest.mark.parametrize(("module", "code"), [(None, "ARK-E350"), (SimpleNamespace(__version__="1.20.1"), "ARK-E351")])
def test_a_missing_or_old_onnxruntime_is_named(
    floats: Artifact, monkeypatch: pytest.MonkeyPatch, module: Any, code: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    with pytest.raises(UnsupportedError) as caught:
        backend.open(floats)
    assert caught.value.code == code and "arkinfer[runtime,onnxruntime]" in caught.value.render()
