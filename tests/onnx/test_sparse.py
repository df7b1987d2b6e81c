"""InfLLM-v2 in ONNX: every setting against the reference, only chosen blocks read, ties, cuts, needles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import arkinfer
from arkinfer import parity, pipeline
from arkinfer.artifact import Artifact
from arkinfer.backends import onnxruntime as backend
from arkinfer.checkpoint import open_checkpoint
from arkinfer.config import SparseConfig
from arkinfer.exporters.onnx_bodies import Shape
from arkinfer.exporters.onnx_model import Model
from arkinfer.exporters.onnx_sparse import SparseBodies
from arkinfer.ops import infllm
from arkinfer.recipe import Recipe
from arkinfer.reference import Reference
from arkinfer.weights import CheckpointWeights
from examples.needle import retrieve
from tests.checkpoints import CONFIGS, SPARSE, write_checkpoint
from tests.onnx import standard
from tests.pipeline.test_golden import GOLDEN, LENGTH

TOKENS = [(17 * index + index * index) % 400 for index in range(420)]


@pytest.fixture(scope="module")
def sparse(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random MiniCPM that is sparse from position 95 on, not verified."""
    out = tmp_path_factory.mktemp("sparse") / "minicpm.ark"
    return pipeline.build(checkpoints["minicpm"], target="onnx-cpu", out=out, weights="fp32", verify="none")


@pytest.fixture(scope="module")
def executor(sparse: Artifact) -> backend.OnnxruntimeExecutor:
    return backend.open(sparse, threads=1)


@pytest.mark.parametrize(("weights", "attention"), [("fp32", "auto"), ("int4", "sparse")])
def test_it_passes_its_gate(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, attention: str
) -> None:
    monkeypatch.setitem(parity.SUITES, "fast", 768)  # type: ignore[arg-type]
    artifact = pipeline.build(
        checkpoints["minicpm"], target="onnx-cpu", out=tmp_path / "out.ark", weights=weights, attention=attention,
        quality="off",
    )  # fmt: skip
    assert artifact.manifest.parity is not None and artifact.manifest.parity["passed"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_nope": True},
        {"lse": "exact", "local_rule": "exclusive"},
        {"dense_len": -1, "init_blocks": 0, "topk": 1, "window_size": 16},
        {"kernel_size": 16, "kernel_stride": 16, "window_size": 64},
    ],
)
def test_standard_operators_do_every_setting(tmp_path: Path, changes: dict[str, Any]) -> None:
    raw = {**CONFIGS["minicpm"], "sparse_config": {**SPARSE, **changes}}
    built = standard.build(write_checkpoint(tmp_path / "m", raw), tmp_path / "o", "fp16", "portable", 512, "auto")
    runner, start, parts = standard.Runner(built.file), 0, []
    for size in (70, 1, 63, 1, 1, 100, 17):
        parts.append(runner.step(TOKENS[start : start + size], range(size)))
        start += size
    right = built.reference.step(TOKENS[:start], built.reference.new_state(start), "all")
    kl = parity.divergence(right, np.concatenate(parts))
    # Where two scores are all but equal, the order of a sum decides between blocks.
    assert (kl > 1e-9).mean() <= 0.02 and kl.mean() <= parity.GATES["float"].mean_kl
    dense = built.graph.with_attention("dense")
    other = Reference(dense, CheckpointWeights(open_checkpoint(tmp_path / "m")), "fp32", "dense")
    far = parity.divergence(right, other.step(TOKENS[:start], other.new_state(start), "all"))
    assert (far > 1e-9).mean() > 0.3  # there is something to see


@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 150), min_size=1, max_size=6), kept=st.integers(0, 200))
def test_logits_do_not_depend_on_how_tokens_are_cut(
    executor: backend.OnnxruntimeExecutor, cuts: list[int], kept: int
) -> None:
    """What was forgotten leaves no trace in the compressed keys either."""
    whole = executor.step(TOKENS, executor.new_state(), "all")
    state = executor.new_state()
    executor.step(TOKENS[:kept] + TOKENS[7:99], state, "none")
    state.truncate(kept)
    twin, rows, start = state.fork(), [], kept
    executor.step(TOKENS[::-1], state, "none")
    for size in [*cuts, len(TOKENS)]:
        tokens = TOKENS[start : start + size]
        if tokens:
            rows.append(executor.step(tokens, twin, "all"))
        start += len(tokens)
    np.testing.assert_allclose(np.concatenate(rows), whole[kept:], atol=2e-5)


@pytest.mark.parametrize(("attention", "most"), [("auto", 2 * 5), ("dense", 27)])
def test_a_decode_step_reads_the_blocks_that_it_chose(sparse: Artifact, attention: str, most: int) -> None:
    """A block of NaNs shows in the logits where it is read."""
    executor = backend.open(sparse, threads=1, attention=attention)
    state = executor.new_state(448)
    executor.step(TOKENS, state, "none")
    read = 0
    for block in range(len(TOKENS) // 16 + 1):
        twin, poison = state.fork(), slice(16 * block, 16 * block + 16)
        for name in ("layers.1.k", "layers.1.v"):
            array = twin.values[name].numpy()
            array[:, :, poison] = np.nan
            twin.values[name].update_inplace(array)
        read += bool(np.isnan(executor.step([5], twin)).any())
    assert (read <= most) if attention == "auto" else (read == most)
    assert read >= 3  # the first and the local ones
    executor.close()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_blocks_are_chosen_as_the_reference_chooses(data: Any) -> None:
    """Of equal scores, which are the rule and not the exception, the lower id is taken."""
    drawn = [data.draw(st.integers(*limits)) for limits in ((0, 2), (1, 3), (1, 6))]
    config = SparseConfig(8, 4, 16, init_blocks=drawn[0], window_size=16 * drawn[1], topk=drawn[2])
    first, count = data.draw(st.integers(0, 300)), data.draw(st.integers(1, 5))
    positions = torch.arange(first, first + count)
    blocks = int(positions[-1]) // 16 + 1
    seed = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    scores = torch.from_numpy(seed.integers(0, 3, (count, 2, blocks)).astype(np.float32))
    chosen = infllm.select_blocks(scores, positions, config)
    right = torch.zeros(count, 2, blocks + 1, dtype=torch.bool)
    right.scatter_(2, torch.where(chosen < 0, blocks, chosen), True)
    model = Model("choice", "none")
    bodies = SparseBodies(model, Shape(2, 2, 4, "F32", 512, 512, 1.0), config, 0)
    bodies.rotation([1.0, 1.0])
    given_scores = model.input("scores", "F32", (2, "n", "blocks"))
    member = bodies._members(model, given_scores, bodies.future, bodies.forced, bodies.every, bodies.budget)
    model.output("member", member, "BOOL", (2, "n", "blocks"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.serialised({}), options, providers=["CPUExecutionProvider"])
    values = {
        "tokens": np.zeros(count, np.int64),
        "position": np.array([first]),
        "rows": np.zeros(0, np.int64),
        "scores": scores.transpose(0, 1).numpy(),
    }
    got = session.run(["member"], values)[0]
    assert np.array_equal(got, right[:, :, :blocks].transpose(0, 1).numpy())


@pytest.mark.parametrize("model", ["tiny-minicpm", "tiny-bitcpm"])
def test_golden_text(model: str, tmp_path: Path) -> None:
    """Word for word what the CPU target writes."""
    weights = "fp32" if model == "tiny-minicpm" else "ternary"
    artifact = pipeline.build(
        model, target="onnx-cpu", out=tmp_path / "m.ark", weights=weights, activations="float", verify="none"
    )
    with arkinfer.load(artifact.path, threads=1) as engine:
        result = engine.generate(GOLDEN["messages"], max_tokens=LENGTH, temperature=0, thinking=False)
    assert result.text == GOLDEN[model]


def test_sparse_text_is_the_references(tmp_path: Path) -> None:
    """tiny-minicpm with a sparse_config that makes its answers cross from dense to sparse."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in open_checkpoint("tiny-minicpm").path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["sparse_config"] = {**SPARSE, "dense_len": 64, "topk": 2}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    artifact = pipeline.build(folder, target="onnx-cpu", out=tmp_path / "m.ark", weights="fp32", verify="none")
    recipe = Recipe.from_dict("fp32", "float", artifact.manifest.model["recipe"])
    tokens = [5, 9, 300, 41, 77]
    with arkinfer.load(artifact.path, threads=1) as engine:
        session = engine.session()
        logits = session.step(tokens)
        for _ in range(LENGTH):
            tokens.append(int(np.argmax(logits[-1])))
            logits = session.step(tokens[-1:])
    checkpoint = open_checkpoint(folder)
    graph = pipeline.lower(checkpoint.config, 2048, recipe, checkpoint.layouts(), "fp32").graph
    reference = Reference(graph, CheckpointWeights(checkpoint), "fp32")
    right = reference.step(tokens, reference.new_state(len(tokens)), "all").argmax(axis=1)
    assert tokens[5:] == right[4:-1].tolist()


@pytest.mark.slow
def test_every_needle_is_found(tmp_path: Path) -> None:
    artifact = pipeline.build(
        "needle", target="onnx-cpu", out=tmp_path / "needle.ark", weights="fp32", context=32832, verify="none"
    )
    executor, length = backend.open(artifact, threads=1), 32768
    tokens, answers = retrieve.haystack(length)
    state = executor.new_state(length + 4)
    for start in range(0, length, 512):
        executor.step(tokens[start : start + 512], state, "none")
    found = {}
    for key in answers:
        state.truncate(length)
        value = int(np.argmax(executor.step([key], state)[-1]))
        found[key] = value if int(np.argmax(executor.step([value], state)[-1])) == 2 else -1
    executor.close()
    assert found == answers
