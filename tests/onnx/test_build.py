"""From checkpoint to an ONNX artifact, verified in onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from arkinfer import exporters, parity, pipeline, structure
from arkinfer.artifact import Artifact
from arkinfer.checkpoint import open_checkpoint
from arkinfer.errors import UnsupportedError
from arkinfer.exporters import onnx_outline
from arkinfer.exporters.base import BuildOptions
from arkinfer.exporters.onnx_lowering import Lowering
from arkinfer.passes import formats
from arkinfer.recipe import Recipe, choose
from arkinfer.weights import CheckpointWeights
from tests.pipeline.test_stored_formats import ASYMMETRIC, MIXED, Scheme, stored


@pytest.fixture(autouse=True)
def few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parity.SUITES, "fast", 768)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "weights", "activations", "target", "path"),
    [
        ("llama", "int4", "auto", "onnx-cpu", "int8"),
        ("llama", "int8", "auto", "onnx-cpu", "int8"),  # down_proj in groups of 96, which onnxruntime has no blocks of
        ("bitcpm", "ternary", "float", "onnx-cpu", "float"),
        ("qwen3", "int8", "float", "onnx-cpu", "float"),
        ("qwen3", "fp32", "auto", "onnx-cpu", "float"),
        ("bitcpm", "ternary", "auto", "onnx-cuda", "fp16"),
        ("llama", "int8", "auto", "onnx-cuda", "fp16"),
    ],
)
def test_every_format_passes_its_gate(
    checkpoints: dict[str, Path], tmp_path: Path, model: str, weights: str, activations: str, target: str, path: str
) -> None:
    artifact = pipeline.build(
        checkpoints[model], target=target, out=tmp_path / "out.ark", weights=weights, activations=activations,
        attention="dense", quality="off",
    )  # fmt: skip
    found = artifact.manifest.parity
    assert found is not None and found["passed"] and found["positions"] == 768
    stand_in = "compiled, run by onnxruntime on a processor"
    assert (found["path"], found["evidence"]) == (path, "ran" if target == "onnx-cpu" else stand_in)
    onnx.checker.check_model(str(artifact.file("model.onnx")))
    assert artifact.file("model.onnx").stat().st_size < 100_000  # the weights are elsewhere


@pytest.mark.parametrize(("scheme", "activations"), [(ASYMMETRIC, "float"), (MIXED, "float")])
def test_integers_of_the_checkpoint_run_as_they_are(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Scheme, activations: str
) -> None:
    """Zero points, permuted columns and every width, mixed."""
    checkpoint = stored(checkpoints["llama"], scheme)
    monkeypatch.setattr(pipeline, "open_checkpoint", lambda *_, **__: checkpoint)
    artifact = pipeline.build(
        checkpoints["llama"], target="onnx-cpu", out=tmp_path / "out.ark", activations=activations, quality="off"
    )
    manifest = artifact.manifest
    assert manifest.parity is not None and manifest.parity["passed"]
    recipe = Recipe.from_dict(manifest.weights, manifest.activations, manifest.model["recipe"])
    graph = pipeline.lower(checkpoint.config, manifest.context, recipe, recipe.layouts, manifest.kv).graph
    unpacked, packed = exporters.get("onnxruntime").weights(graph, artifact.file), CheckpointWeights(checkpoint)
    for weight in graph.weights.values():
        if weight.part != "weight" or len(weight.shape) != 2:
            continue
        ours, theirs = unpacked.packed(weight), packed.packed(weight)
        for part in ("weight", "scales", "zeros", "order"):
            left, right = getattr(ours, part), getattr(theirs, part)
            assert (left is None) == (right is None), (weight.name, part)
            assert left is None or torch.equal(left, right), (weight.name, part)


def test_same_inputs_give_the_same_bytes(checkpoints: dict[str, Path], floats: Artifact, tmp_path: Path) -> None:
    again = pipeline.build(
        checkpoints["qwen3"], target="onnx-cpu", out=tmp_path / "qwen3.ark", weights="fp32", verify="none"
    )
    assert again.manifest.files == floats.manifest.files


@pytest.mark.parametrize("weights", ["int4", "int8", "fp16", "ternary"])
def test_the_outline_says_what_is_stored(checkpoints: dict[str, Path], weights: str) -> None:
    """`arkinfer plan` counts bytes without torch; here are those of the graph."""
    checkpoint = open_checkpoint(checkpoints["bitcpm" if weights == "ternary" else "llama"])
    expected, body = structure.shapes(checkpoint.config), structure.body(checkpoint.config)
    recipe = choose(weights, "int8", body, expected, checkpoint)
    graph = pipeline.lower(checkpoint.config, 512, recipe, checkpoint.layouts(), "fp32").graph
    lowering = Lowering(graph, BuildOptions("fp32", "dense", 512), "weights")
    lowering.run()
    for node in formats.linears(graph):
        weight = graph.weight_of(node)
        found = {item.part: item.spec for item in lowering.stored.values() if item.weight.name == weight.name}
        kind = found["weight" if weight.format == "dense" else "scales"].dtype
        assert onnx_outline.OnnxOutline().parameters(weight, kind, weight.zeros, False) == found


def test_what_it_cannot_do_is_said_before_anything_is_built(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("llama", {"kv": "int8"}, "--kv fp32"),
        ("minicpm", {"target": "onnx-cuda"}, "--attention dense"),
    ]
    for model, options, words in wrong:
        with pytest.raises(UnsupportedError) as caught:
            pipeline.build(checkpoints[model], out=tmp_path / "x.ark", **{"target": "onnx-cpu", **options})
        assert words in caught.value.render()
    assert list(tmp_path.iterdir()) == []


def test_the_model_says_what_it_is(floats: Artifact) -> None:
    model = onnx.load(str(floats.file("model.onnx")), load_external_data=False)
    versions = {each.domain: each.version for each in model.opset_import}
    assert versions[""] == 24 and "arkinfer" in versions
    called = {node.op_type for node in model.graph.node if node.domain == "arkinfer"}
    assert called == {function.name for function in model.functions}
    assert called >= {"attention", "add_rms_norm", "swiglu", "rms_norm", "linear"}
    plan = json.loads(floats.file("payload/plan.json").read_text(encoding="utf-8"))
    names = {each.name for each in model.graph.output}
    assert {"logits", *plan["taps"], *(f"{cache['name']}.out" for cache in plan["caches"])} == names
