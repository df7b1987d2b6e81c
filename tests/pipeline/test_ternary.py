"""Fake-quantised checkpoints in which each matrix is ternary, or not, in its own way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import arkinfer
from arkinfer import pipeline
from arkinfer.checkpoint import open_checkpoint
from arkinfer.errors import UserError
from arkinfer.graph import ModelGraph
from arkinfer.passes import formats
from arkinfer.quant.packed import dense, dequantise
from arkinfer.recipe import Recipe, choose
from arkinfer.weights import CheckpointWeights
from tests.checkpoints import CONFIGS, write_checkpoint

RAW = {**CONFIGS["minicpm"], "intermediate_size": 256, "num_hidden_layers": 2}


def fake_quantised(weight: torch.Tensor, group: int, shards: int = 1) -> torch.Tensor:
    """Return BitCPM4's quantiser (MiniCPM4 report 3.3): -s, 0 or s with s the mean magnitude of the group.

    ``shards`` > 1: by a tensor-parallel rank each, which sees its columns only; group 0 is then the shard's row.
    """
    rows, width = weight.shape
    extent = group or width // shards
    grouped = weight.float().reshape(rows, width // extent, extent)
    scale = grouped.abs().mean(dim=2, keepdim=True).clamp_min(1e-5).bfloat16().float()
    return (torch.round(grouped / scale).clamp(-1, 1) * scale).reshape(rows, width).bfloat16()


# Matrix: (the group that must be found, or None for not ternary; the tensor made of the float one).
MADE = {
    "self_attn.q_proj": (32, lambda w: fake_quantised(w, 32)),
    "self_attn.k_proj": (64, lambda w: fake_quantised(w, 64)),
    "self_attn.v_proj": (None, lambda w: w),
    "self_attn.o_proj": (64, lambda w: fake_quantised(w, 0, shards=2)),
    "mlp.gate_proj": (0, lambda w: fake_quantised(w, 0)),
    "mlp.up_proj": (16, lambda w: torch.cat([fake_quantised(half, 16) for half in w.chunk(2)])),  # ranks by rows
    "mlp.down_proj": (128, lambda w: fake_quantised(w, 0, shards=2)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("mixed"), RAW)
    state = load_file(folder / "model.safetensors")
    for name in state:
        made = next((make for module, (_, make) in MADE.items() if f"{module}.weight" in name), None)
        if made is not None and not name.startswith("model.layers.1.self_attn"):  # layer 1 keeps its attention
            state[name] = made(state[name]).contiguous()
    save_file(state, folder / "model.safetensors")
    return folder


def expected(name: str) -> int | None:
    if name.startswith("model.layers.1.self_attn"):
        return None
    return next(group for module, (group, _) in MADE.items() if f"{module}.weight" in name)


def test_each_matrix_is_recognised_and_unpacks_to_its_own_bits(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)

    def recipe(graph: ModelGraph) -> Recipe:
        used = (source for weight in graph.weights.values() for source in weight.sources)
        return choose("auto", "int8", formats.body(graph), used, checkpoint)

    lowered = pipeline.lower(checkpoint.config, 128, recipe, checkpoint.layouts(), "fp32")
    for name, layout in lowered.recipe.layouts.items():
        if "_proj" in name:
            group = expected(name)
            assert layout.format == ("dense" if group is None else "ternary"), name
            assert layout.group == (group or 0), name
    source, seen = CheckpointWeights(checkpoint), set()
    for weight in lowered.graph.weights.values():
        if weight.part == "weight" and weight.format == "ternary":
            whole = torch.cat([dense(checkpoint.weight(name)) for name in weight.sources])
            assert torch.equal(dequantise(source.packed(weight)).bfloat16(), whole), weight.sources
            seen.update(weight.sources)
    assert seen == {name for name in lowered.recipe.layouts if "_proj" in name and expected(name) is not None}


def test_the_artifact_computes_what_the_reference_does(folder: Path, tmp_path: Path) -> None:
    artifact = arkinfer.build(folder, out=tmp_path / "out.ark", context=256)
    assert artifact.manifest.weights == "ternary"
    assert artifact.manifest.parity is not None
    assert artifact.manifest.parity["passed"]


def test_a_matrix_that_stops_being_ternary_between_the_probes(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    state[name][20, 7] = 0.3  # of 256 rows; those that are probed begin at 0, 35, 70, ...
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        arkinfer.build(tmp_path, out=tmp_path / "out.ark", context=64, verify="none")
    assert name in json.dumps(caught.value.to_json())
    assert "--rule" in caught.value.hint
    assert not (tmp_path / "out.ark").exists()
