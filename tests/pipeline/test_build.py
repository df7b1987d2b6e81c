"""From checkpoint to verified artifact on the CPU target, for every family and every way to store weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import arkinfer
from arkinfer import backends, pipeline
from arkinfer.artifact import Artifact
from arkinfer.artifact.tensors import TensorWriter
from arkinfer.backends.base import Executor
from arkinfer.errors import ParityError, UserError
from arkinfer.exporters.weights import ArtifactWeights
from arkinfer.graph import Weight
from arkinfer.quant.packed import Packed
from tests.checkpoints import CONFIGS, write_checkpoint

TOKENS = [(17 * index + index * index) % 400 for index in range(230)]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random checkpoint per family, and a ternary MiniCPM."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {name: write_checkpoint(root / name, raw) for name, raw in CONFIGS.items()}
    found["bitcpm"] = write_checkpoint(root / "bitcpm", CONFIGS["minicpm"], ternary=64)
    return found


@pytest.fixture(scope="session")
def sparse_artifact(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("artifacts") / "minicpm.ark"
    return pipeline.build(checkpoints["minicpm"], out=out, weights="int4", kv="fp16")


@pytest.mark.parametrize(
    ("model", "weights", "kv", "activations"),
    [
        ("llama", "fp32", "fp32", "auto"),
        ("llama", "int4", "fp16", "auto"),
        ("qwen3", "int8", "int8", "auto"),
        ("qwen3", "fp16", "fp16", "auto"),
        ("minicpm", "fp32", "fp32", "auto"),
        ("minicpm", "int8", "fp16", "float"),
        ("bitcpm", "auto", "fp16", "auto"),
        ("bitcpm", "ternary", "fp32", "float"),
    ],
)
def test_every_combination_passes_its_gate(
    checkpoints: dict[str, Path], tmp_path: Path, model: str, weights: str, kv: str, activations: str
) -> None:
    artifact = pipeline.build(
        checkpoints[model], out=tmp_path / "out.ark", weights=weights, kv=kv, activations=activations
    )
    parity = artifact.manifest.parity
    assert parity is not None
    assert parity["passed"]
    assert parity["positions"] >= 2000
    exact = activations == "float" or weights in ("fp32", "fp16")
    assert parity["path"] == ("float" if exact and kv == "fp32" else "fp16" if exact and kv == "fp16" else "int8")
    if model == "bitcpm":
        assert artifact.manifest.weights == "ternary"
    report = pipeline.verify_artifact(artifact)
    assert report.passed, report.faults


def logits_in_chunks(executor: Executor, sizes: list[int]) -> np.ndarray:
    """Feed TOKENS in chunks of the given sizes, cycling through them."""
    state = executor.new_state(256)
    rows, start, turn = [], 0, 0
    while start < len(TOKENS):
        size = sizes[turn % len(sizes)]
        rows.append(executor.step(TOKENS[start : start + size], state, "all"))
        start, turn = start + size, turn + 1
    return np.concatenate(rows)


def test_logits_do_not_depend_on_chunks_or_threads(sparse_artifact: Artifact) -> None:
    """The sequence crosses dense_len, so both gears and the change between them are compared."""
    executor = backends.open(sparse_artifact, threads=2)
    whole = logits_in_chunks(executor, [len(TOKENS)])
    for sizes in ([1], [7, 1, 64], [95, 1, 1, 13]):
        assert np.array_equal(logits_in_chunks(executor, sizes), whole), sizes
    executor.close()
    single = backends.open(sparse_artifact, threads=1)
    assert np.array_equal(logits_in_chunks(single, [33]), whole)
    single.close()


def test_truncate_and_fork_resume_exactly(sparse_artifact: Artifact) -> None:
    executor = backends.open(sparse_artifact)
    state = executor.new_state(256)
    first = executor.step(TOKENS[:150], state, "all")
    twin = state.fork()
    state.truncate(90)
    executor.step(TOKENS[5:60], state)  # other tokens, across the same kernels and blocks
    state.truncate(90)
    again = executor.step(TOKENS[90:150], state, "all")
    assert np.array_equal(again, first[90:])
    assert np.array_equal(executor.step(TOKENS[150:170], twin), executor.step(TOKENS[150:170], state))
    executor.close()


def test_last_and_none_skip_rows(sparse_artifact: Artifact) -> None:
    executor = backends.open(sparse_artifact)
    state, other = executor.new_state(256), executor.new_state(256)
    everything = executor.step(TOKENS[:40], state, "all")
    assert executor.step(TOKENS[:39], other, "none").shape == (0, 400)
    assert np.array_equal(executor.step(TOKENS[39:40], other, "last"), everything[39:40])
    executor.close()


def test_gears_differ_only_beyond_dense_len(sparse_artifact: Artifact) -> None:
    results = {}
    for gear in ("auto", "dense", "sparse"):
        executor = backends.open(sparse_artifact, attention=gear)
        results[gear] = executor.step(TOKENS, executor.new_state(256), "all")
        executor.close()
    dense_len = CONFIGS["minicpm"]["sparse_config"]["dense_len"]
    assert np.array_equal(results["auto"][: dense_len - 1], results["dense"][: dense_len - 1])
    assert not np.array_equal(results["auto"][dense_len:], results["dense"][dense_len:])


def test_same_inputs_give_the_same_bytes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    digests = []
    for index in range(2):
        artifact = pipeline.build(
            checkpoints["llama"], out=tmp_path / f"{index}" / "same.ark", weights="int8", verify="none"
        )
        digests.append({name: entry.sha256 for name, entry in artifact.manifest.files.items()})
        assert artifact.manifest.parity is None
    assert digests[0] == digests[1]


def test_a_wrong_weight_fails_parity_and_names_the_layer(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = ArtifactWeights.packed

    def spoiled(source: ArtifactWeights, weight: Weight) -> Packed:
        right = packed(source, weight)
        if "layers.0.mlp.down_proj" not in weight.name:
            return right
        assert right.scales is not None
        return replace(right, scales=right.scales * 3)

    monkeypatch.setattr(ArtifactWeights, "packed", spoiled)
    with pytest.raises(ParityError) as caught:
        pipeline.build(checkpoints["minicpm"], out=tmp_path / "bad.ark", weights="int8")
    assert caught.value.facts["first bad layer"] == "layer.0"
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_was_repacked_wrongly_is_named(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference computes with what was written, so what was written is compared with what was packed."""
    pieces = TensorWriter.pieces

    def spoiled(writer: TensorWriter, name: str, arrays: Iterable[np.ndarray]) -> Iterator[int]:
        if "layers.0.mlp.down_proj" in name and name.endswith(".scales"):
            arrays = [array * np.float16(3) for array in arrays]
        return pieces(writer, name, arrays)

    monkeypatch.setattr(TensorWriter, "pieces", spoiled)
    with pytest.raises(ParityError, match="not the one that was packed") as caught:
        pipeline.build(checkpoints["minicpm"], out=tmp_path / "bad.ark", weights="int8")
    assert caught.value.facts["weight"] == "model.layers.0.mlp.down_proj.weight"
    assert list(tmp_path.iterdir()) == []


def test_impossible_requests_say_what_to_do(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "never.ark"
    for arguments, words in (
        ({"weights": "ternary"}, "not ternary"),
        ({"weights": "int5"}, "int5"),
        ({"context": 4096}, "4096"),
        ({"kv": "fp8"}, "fp8"),
        ({"verify": "never"}, "verify"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            pipeline.build(checkpoints["llama"], out=out, **arguments)  # type: ignore[arg-type]
        assert caught.value.hint
    with pytest.raises(UserError, match="sparse"):
        pipeline.build(checkpoints["llama"], out=out, attention="sparse")
    assert not out.exists()


def test_a_checkpoint_without_a_tokenizer_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder, said = write_checkpoint(tmp_path / "model", CONFIGS["llama"]), list[str]()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError) as caught:
        arkinfer.build(folder, out=tmp_path / "m.ark", say=said.append)
    assert caught.value.code == "ARK-E127" and said == []


def test_a_checkpoint_without_a_tensor_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoints["llama"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match="lacks"):
        pipeline.build(broken, out=tmp_path / "x.ark")
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    with pytest.raises(UserError, match="shape"):
        pipeline.build(broken, out=tmp_path / "x.ark")


def test_public_names_build_and_load(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    artifact = arkinfer.build(checkpoints["qwen3"], out=tmp_path / "q.ark", weights="int8")
    with arkinfer.load(artifact.path) as engine:
        assert engine.score(TOKENS[:9]).shape == (9, 400)
