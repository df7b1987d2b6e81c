"""Checkpoints that are quantised already, with zero points, permuted columns and several formats, on the CPU target."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arkinfer import exporters, pipeline
from arkinfer.artifact import tensors
from arkinfer.checkpoint import Checkpoint, open_checkpoint
from arkinfer.errors import ParityError, UnsupportedError
from arkinfer.exporters.base import BuildOptions
from arkinfer.exporters.lowering import Lowering
from arkinfer.graph import ModelGraph, Weight
from arkinfer.passes import formats
from arkinfer.quant.packed import dense, dequantise
from arkinfer.recipe import Recipe, choose
from arkinfer.weights import CheckpointWeights
from tests.checkpoints import CONFIGS, PackedInMemory, quantised, write_checkpoint

# Pattern of names -> (format, group, zero points, name of the order of columns). The first that matches counts.
Scheme = dict[str, tuple[str, int, bool, str]]
ASYMMETRIC: Scheme = {  # every matrix as GPTQ with act-order stores it, at 4 bits
    "*.self_attn.o_proj.weight": ("int4", 64, True, "o"),
    "*.self_attn.*.weight": ("int4", 32, True, "attention"),
    "*.mlp.down_proj.weight": ("int4", 0, True, "down"),
    "*.mlp.*.weight": ("int4", 128, True, "mlp"),
}
MIXED: Scheme = {  # siblings that cannot be joined, two orders of one input, every format
    "*.q_proj.weight": ("int2", 16, True, "q"),
    "*.k_proj.weight": ("int4", 32, False, "q"),
    "*.v_proj.weight": ("int8", 32, True, ""),
    "*.o_proj.weight": ("int2", 64, False, ""),
    "*.gate_proj.weight": ("int8", 64, False, "gate"),
    "*.up_proj.weight": ("int8", 64, False, "up"),
    "*.down_proj.weight": ("int8", 0, True, "down"),
    "model.embed_tokens.weight": ("int8", 128, True, ""),
    "lm_head.weight": ("int2", 128, True, "head"),
}

ODD: Scheme = {  # groups and widths that no vector register divides
    "*.o_proj.weight": ("int4", 8, True, "o"),
    "*.self_attn.*.weight": ("int4", 40, True, "attention"),
    "*.down_proj.weight": ("int2", 8, True, "down"),
    "*.mlp.*.weight": ("int8", 24, True, ""),
}
ODD_WIDTHS = {**CONFIGS["llama"], "hidden_size": 120, "intermediate_size": 184, "num_hidden_layers": 1}


def stored(folder: Path, scheme: Scheme) -> Checkpoint:
    """Return the checkpoint in ``folder`` with the matrices that ``scheme`` names quantised."""
    checkpoint = open_checkpoint(folder)
    weights = dict(checkpoint.weights)
    for name, weight in weights.items():
        found = next((how for pattern, how in scheme.items() if fnmatchcase(name, pattern)), None)
        if found is None or len(weight.layout.shape) != 2:
            continue
        format, group, zeros, order = found
        width = weight.layout.shape[1]
        seed = torch.Generator().manual_seed(sum(map(ord, order)))
        columns = torch.randperm(width, generator=seed).int() if order else None
        weights[name] = PackedInMemory(quantised(dense(weight), format, group, zeros, columns), order)
    checkpoint.weights = weights
    return checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stored")
    shapes = {"llama": CONFIGS["llama"], "minicpm": CONFIGS["minicpm"], "odd": ODD_WIDTHS}
    return {name: write_checkpoint(root / name, raw) for name, raw in shapes.items()}


def matrices(weights: dict[str, Weight]) -> list[Weight]:
    return [weight for weight in weights.values() if weight.part == "weight" and len(weight.shape) == 2]


@pytest.mark.parametrize(
    ("model", "scheme", "kv", "activations"),
    [
        ("llama", ASYMMETRIC, "fp16", "int8"),
        ("minicpm", MIXED, "fp16", "int8"),
        ("llama", MIXED, "fp32", "float"),
        ("odd", ODD, "fp16", "int8"),
    ],
)
def test_integers_of_the_checkpoint_run_as_they_are(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    scheme: Scheme,
    kv: str,
    activations: str,
) -> None:
    checkpoint = stored(folders[model], scheme)
    monkeypatch.setattr(pipeline, "open_checkpoint", lambda *_, **__: checkpoint)
    artifact = pipeline.build(folders[model], out=tmp_path / "out.ark", kv=kv, activations=activations)
    parity = artifact.manifest.parity
    assert parity is not None and parity["passed"]
    assert parity["path"] == ("int8" if activations == "int8" else "float")

    manifest = artifact.manifest
    recipe = Recipe.from_dict(manifest.weights, manifest.activations, manifest.model["recipe"])
    graph = pipeline.lower(checkpoint.config, manifest.context, recipe, recipe.layouts, manifest.kv).graph
    unpacked = exporters.get("tvm").weights(graph, artifact.file)
    packed = CheckpointWeights(checkpoint)
    size = 0
    for weight in matrices(graph.weights):
        ours, theirs = unpacked.packed(weight), packed.packed(weight)
        for part in ("weight", "scales", "zeros", "order"):
            left, right = getattr(ours, part), getattr(theirs, part)
            assert (left is None) == (right is None), (weight.name, part)
            assert left is None or torch.equal(left, right), (weight.name, part)
        # What the artifact computes with is what the checkpoint stands for.
        sources = [dense(checkpoint.weight(source)) for source in weight.sources]
        if all(checkpoint.weight(source).layout.quantised for source in weight.sources):
            assert torch.equal(dequantise(ours), torch.cat(sources))
        if "embed" not in weight.name:
            size += theirs.nbytes - (0 if theirs.order is None else theirs.order.nbytes)
    assert pipeline.verify_artifact(artifact).passed
    plan = json.loads(artifact.file("payload/plan.json").read_text())
    orders = {weight.order: 4 * weight.shape[1] for weight in matrices(graph.weights) if weight.order}
    assert plan["bytes"]["weights"] >= size + sum(orders.values())


@pytest.mark.parametrize(
    ("scheme", "activations", "kernel", "gathers"),
    [
        (ASYMMETRIC, "int8", "quantize", 4),  # attention, o, mlp and down of a layer
        (ASYMMETRIC, "float", "take_columns", 4),
        (MIXED, "int8", "quantize", 5),  # query and key share an order but not the size of groups; gate, up, down
        (MIXED, "float", "take_columns", 4),
    ],
)
def test_an_input_is_gathered_once_for_each_order(
    folders: dict[str, Path], scheme: Scheme, activations: str, kernel: str, gathers: int
) -> None:
    checkpoint = stored(folders["llama"], scheme)

    def recipe(graph: ModelGraph) -> Recipe:
        return choose("auto", "int8", formats.body(graph), checkpoint.weights, checkpoint, activations)

    lowered = pipeline.lower(checkpoint.config, 1024, recipe, checkpoint.layouts(), "fp16")
    program = Lowering(lowered.graph, BuildOptions("fp16", "auto", 1024)).run()
    calls = [call for call in program.calls if call.kernel == kernel and len(call.inputs) == 2]
    head = sum(call.inputs[1] == "lm_head.weight:order" for call in calls)
    assert len(calls) - head == gathers * checkpoint.config.layers
    values = [output.name for call in program.calls for output in call.outputs]
    assert len(set(values)) == len(values)


def test_an_order_that_was_written_wrongly_is_found(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engine and reference would both read it, and agree."""
    checkpoint = stored(folders["llama"], ASYMMETRIC)
    monkeypatch.setattr(pipeline, "open_checkpoint", lambda *_, **__: checkpoint)
    load = tensors.load

    def swapped(*arguments: Any) -> dict[str, np.ndarray]:
        arrays = load(*arguments)
        order = next(array for name, array in sorted(arrays.items()) if name.endswith(":order"))
        order[:2] = order[1::-1].copy()
        return arrays

    monkeypatch.setattr(tensors, "load", swapped)
    with pytest.raises(ParityError, match="not the one that was packed"):
        pipeline.build(folders["llama"], out=tmp_path / "out.ark")


def test_a_table_with_permuted_columns_is_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = stored(folders["llama"], {"model.embed_tokens.weight": ("int4", 32, True, "table")})
    monkeypatch.setattr(pipeline, "open_checkpoint", lambda *_, **__: checkpoint)
    with pytest.raises(UnsupportedError, match="permuted columns") as caught:
        pipeline.build(folders["llama"], out=tmp_path / "out.ark")
    assert caught.value.hint == "--weights fp16 multiplies it out"
    assert not (tmp_path / "out.ark").exists()
