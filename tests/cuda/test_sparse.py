"""InfLLM-v2 in a plan: which rows are sparse is decided where the plan runs, and both gears are always there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arkinfer import pipeline, planning
from arkinfer.artifact import Artifact
from arkinfer.artifact.plan import Plan
from arkinfer.backends import cuda_driver
from arkinfer.backends.cuda import CudaExecutor
from arkinfer.checkpoint import BUNDLED, open_checkpoint
from arkinfer.config import SparseConfig
from arkinfer.errors import UnsupportedError, UserError
from arkinfer.interpreter import PlanInterpreter, PlanState
from arkinfer.ops.infllm import kernel_count
from arkinfer.parity import divergence
from arkinfer.recipe import Recipe
from arkinfer.reference import Reference
from arkinfer.runtime.tokenizer import Tokenizer
from arkinfer.targets import probe
from arkinfer.weights import CheckpointWeights
from examples.needle import retrieve
from tests.checkpoints import CONFIGS, SPARSE, write_checkpoint
from tests.cuda.fake_driver import GPU, FakeDriver

GOLDEN = json.loads((Path(__file__).parents[1] / "pipeline" / "golden.json").read_text(encoding="utf-8"))
CONFIG = SparseConfig(**SPARSE)
READ = CONFIG.budget * CONFIG.block_size  # keys that a sparse row reads: all of them up to here
TOKENS = [(17 * index + index * index) % 400 for index in range(600)]


def model(folder: Path, **fields: Any) -> Path:
    """Write a random MiniCPM with other fields in its sparse_config."""
    return write_checkpoint(folder / "model", {**CONFIGS["minicpm"], "sparse_config": {**SPARSE, **fields}})


def bundled(name: str, folder: Path, **fields: Any) -> Path:
    """Copy a bundled model, with other fields in its sparse_config."""
    shutil.copytree(BUNDLED / name, folder / name)
    file = folder / name / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    raw["sparse_config"] = {**raw.get("sparse_config", {}), **fields}
    file.write_text(json.dumps(raw), encoding="utf-8")
    return folder / name


def far(artifact: Artifact) -> float:
    """Return how far a plan is from the reference, in mean KL, where the wrong gear is one."""
    assert artifact.manifest.parity is not None and artifact.manifest.parity["passed"]
    dense, own = (PlanInterpreter(artifact, attention=attention) for attention in ("dense", None))
    rows = [executor.step(TOKENS[:500], executor.new_state(), "all") for executor in (dense, own)]
    return float(artifact.manifest.parity["mean_kl"] / divergence(*rows).mean())


def test_rows_attend_as_the_reference_does(sparse: Artifact) -> None:
    assert far(sparse) < 0.01


@pytest.mark.usefixtures("uncompiled")
def test_other_rules_do_as_well(tmp_path: Path) -> None:
    """Keys before rope, the exact normaliser, one local block less, sparse from the first row on."""
    folder = model(tmp_path, use_nope=True, lse="exact", local_rule="exclusive", block_size=32, dense_len=-1)
    artifact = pipeline.build(folder, target="rtx-4090", out=tmp_path / "out.ark", weights="int4", kv="int8")
    assert far(artifact) < 0.01
    memory = planning.plan(folder, "rtx-4090", kv="int8").memory
    assert memory.kv + memory.compressed == artifact.manifest.limits["cache_bytes"]


def test_plan_states_the_caches_of_the_artifact(checkpoints: dict[str, Path], sparse: Artifact) -> None:
    memory = planning.plan(checkpoints["minicpm"], "rtx-4090").memory
    assert memory.kv + memory.compressed == sparse.manifest.limits["cache_bytes"]
    plan = Plan.from_json(sparse.file("payload/plan.json").read_text(encoding="utf-8"))
    pooled = [buffer for buffer in plan.of_kind("cache") if buffer.name.endswith(("fine", "coarse"))]
    assert memory.compressed == sum(buffer.nbytes({"c": plan.capacity}) for buffer in pooled)


def test_gears_differ_in_the_rows_that_are_sparse(sparse: Artifact) -> None:
    """Below the first sparse row a model computes what it would without sparse attention, to the bit."""
    found, first = {}, CONFIG.dense_len - 1
    for attention in ("auto", "dense", "sparse"):
        executor = PlanInterpreter(sparse, attention=attention)
        state = executor.new_state()
        parts = [executor.step(part, state, "all") for part in (TOKENS[:first], TOKENS[first:300])]
        found[attention] = np.concatenate(parts)
    dense = found["dense"]
    assert np.array_equal(found["auto"][:first], dense[:first])
    assert divergence(dense[first:], found["auto"][first:]).max() > 1e-4
    assert divergence(dense[:READ], found["sparse"][:READ]).max() < 1e-6
    assert divergence(dense[READ:first], found["sparse"][READ:first]).max() > 1e-5


@given(
    cuts=st.lists(st.sampled_from([1, 3, 8, 9, 40]), min_size=4, max_size=20), gear=st.sampled_from(["auto", "sparse"])
)
@settings(max_examples=6, deadline=None)
@example(cuts=[1], gear="sparse")
def test_logits_are_the_same_however_tokens_are_cut_but_for_rounding(
    sparse: Artifact, cuts: list[int], gear: str
) -> None:
    executor = PlanInterpreter(sparse, attention=gear)
    whole = executor.step(TOKENS[:240], executor.new_state(), "all")
    state, start, rows = executor.new_state(), 0, []
    while start < 240:
        count = min(cuts[len(rows) % len(cuts)], 240 - start)
        rows.append(executor.step(TOKENS[start : start + count], state, "all"))
        start += count
    assert divergence(whole, np.concatenate(rows)).mean() < 1e-6


@given(st.integers(1, 300), st.integers(1, 80), st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_what_was_cut_off_leaves_no_trace(sparse: Artifact, kept: int, dropped: int, more: int) -> None:
    """Compressed keys whose span crosses the cut are made anew."""
    executor = PlanInterpreter(sparse)
    state, fresh = executor.new_state(), executor.new_state()
    for each in (state, fresh):
        executor.step(TOKENS[:kept], each, "none")
    executor.step(TOKENS[300 : 300 + dropped], state)
    state.truncate(kept)
    twin = state.fork()
    expected = executor.step(TOKENS[400 : 400 + more], fresh, "all")
    for each in (state, twin):
        assert np.array_equal(executor.step(TOKENS[400 : 400 + more], each, "all"), expected)
        assert all(torch.equal(one, two) for one, two in zip(_pooled(each), _pooled(fresh), strict=True))


def _pooled(state: PlanState) -> list[torch.Tensor]:
    """Return the compressed keys that a state's tokens complete."""
    found = []
    for name, memory in state.memory.items():
        if name.endswith(("fine", "coarse")):
            factor = 4 if name.endswith("coarse") else 1
            rows = memory.view(torch.float16).view(-1, CONFIGS["minicpm"]["num_key_value_heads"], 32)
            used = rows[: kernel_count(state.length, factor * CONFIG.kernel_size, factor * CONFIG.kernel_stride)]
            assert bool(used.isfinite().all())
            found.append(used)
    assert len(found) == 4
    return found


def test_one_graph_decodes_across_the_switch(sparse: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured while rows are dense, replayed when they are sparse, on two sequences that differ in length."""
    fake = FakeDriver(sparse)
    monkeypatch.setattr(cuda_driver, "bindings", lambda: fake)
    monkeypatch.setattr(probe, "gpu", lambda: GPU)
    executor, reference = CudaExecutor(sparse, None, None), PlanInterpreter(sparse)
    state, other = executor.new_state(), reference.new_state()
    first = CONFIG.dense_len - 10
    tokens, logits = list(TOKENS[:first]), executor.step(TOKENS[:first], state)
    assert np.array_equal(reference.step(TOKENS[:first], other), logits)
    for _ in range(40):
        tokens.append(int(logits[-1].argmax()))
        logits = executor.step(tokens[-1:], state)
        assert np.array_equal(reference.step(tokens[-1:], other), logits)
    assert (fake.captures, fake.replays) == (1, 40)
    dense = PlanInterpreter(sparse, attention="dense")
    assert not np.array_equal(dense.step(tokens, dense.new_state()), logits)
    twins = state.fork(), other.fork()
    state.truncate(CONFIG.dense_len - 5)  # back among the dense rows
    other.truncate(CONFIG.dense_len - 5)
    for token in TOKENS[:20]:
        assert np.array_equal(executor.step([token], state), reference.step([token], other))
    assert fake.captures == 1
    assert np.array_equal(executor.step([7], twins[0]), reference.step([7], twins[1]))
    executor.close()


@pytest.mark.usefixtures("uncompiled")
def test_a_trained_model_writes_what_the_reference_writes(tmp_path: Path) -> None:
    """tiny-bitcpm with a sparse_config, greedy, across the switch; dense it writes something else."""
    folder = bundled("tiny-bitcpm", tmp_path, **SPARSE)
    artifact = pipeline.build(folder, target="rtx-4090", out=tmp_path / "m.ark", weights="ternary", verify="none")
    checkpoint = open_checkpoint(folder)
    recipe = Recipe.from_dict("ternary", "float", artifact.manifest.model["recipe"])
    lowered = pipeline.lower(checkpoint.config, artifact.manifest.context, recipe, checkpoint.layouts(), "fp16")
    prompt = Tokenizer.from_file(artifact.file("tokenizer.json")).encode(GOLDEN["tiny-bitcpm"])[:50]
    written = []
    for executor in (
        Reference(lowered.graph, CheckpointWeights(checkpoint), "fp16"),
        PlanInterpreter(artifact),
        PlanInterpreter(artifact, attention="dense"),
    ):
        state, tokens = executor.new_state(200), list(prompt)
        logits = executor.step(tokens, state)
        while len(tokens) < 160:
            tokens.append(int(logits[-1].argmax()))
            logits = executor.step(tokens[-1:], state)
        written.append(tokens)
    assert written[0] == written[1] != written[2]


@pytest.mark.usefixtures("uncompiled")
def test_every_needle_is_found_among_few_blocks(tmp_path: Path) -> None:
    """Six of 64 blocks are read: the first, the three nearest, and two that scores choose among 32 needles."""
    folder = bundled("needle", tmp_path, topk=4, window_size=128, dense_len=1024)
    out = tmp_path / "needle.ark"
    artifact = pipeline.build(folder, target="rtx-4090", out=out, context=4160, verify="none")
    assert retrieve.ask(PlanInterpreter(artifact), 4096) == 1.0


def test_the_backend_opens_either_gear(sparse: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "gpu", lambda: GPU)
    read = {}
    for attention in ("auto", "dense", "sparse"):
        monkeypatch.setattr(cuda_driver, "bindings", lambda: FakeDriver(sparse))
        executor, reference = CudaExecutor(sparse, None, attention), PlanInterpreter(sparse, attention=attention)
        state, other = executor.new_state(), reference.new_state()
        for part in (TOKENS[:90], TOKENS[90:91], TOKENS[91:97]):
            assert np.array_equal(executor.step(part, state), reference.step(part, other))
        executor.fill(state, 900)
        assert np.isfinite(executor.step([5], state)).all()
        read[attention] = executor.decode_bytes(900)
        executor.close()
    assert read["auto"] == read["sparse"] < read["dense"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block_size": 48, "window_size": 96, "kernel_size": 24, "kernel_stride": 12}, "`block_size` 48"),
        ({"block_size": 8}, "`block_size` 8"),
        ({"block_size": 48, "window_size": 96, "kernel_size": 32, "kernel_stride": 16}, "48 / 16"),
        ({"block_size": 1024, "window_size": 1024}, "above 512"),
    ],
)
def test_blocks_that_the_kernels_cannot_take(tmp_path: Path, fields: dict[str, int], words: str) -> None:
    """Refused with the gear that needs them; the model can be built dense, and then has that gear alone."""
    folder = model(tmp_path, **fields)
    with pytest.raises(UnsupportedError) as caught:
        pipeline.build(folder, target="rtx-4090", out=tmp_path / "x.ark")
    assert words in caught.value.render() and "--attention dense" in caught.value.render()
    assert planning.plan(folder, "rtx-4090").refused
    assert not (tmp_path / "x.ark").exists()


@pytest.mark.usefixtures("uncompiled")
def test_dense_alone_where_blocks_cannot_be_chosen(sparse: Artifact, tmp_path: Path) -> None:
    folder = model(tmp_path, block_size=8)
    options: dict[str, Any] = {"weights": "int8", "attention": "dense", "verify": "none"}
    artifact = pipeline.build(folder, target="rtx-4090", out=tmp_path / "x.ark", **options)
    memory = planning.plan(folder, "rtx-4090", weights="int8", attention="dense").memory
    assert memory.compressed == 0 and memory.kv == artifact.manifest.limits["cache_bytes"]
    alone, both = PlanInterpreter(artifact), PlanInterpreter(sparse, attention="dense")  # of the same weights
    found = [executor.step(TOKENS[:200], executor.new_state(), "all") for executor in (alone, both)]
    assert np.array_equal(*found)
    with pytest.raises(UserError, match="no sparse attention"):
        PlanInterpreter(artifact, attention="sparse")
