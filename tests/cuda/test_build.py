"""From checkpoint to an artifact for GPUs, verified on a machine without one through the plan interpreter."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arkinfer import exporters, pipeline, structure
from arkinfer.artifact import Artifact, tensors
from arkinfer.artifact.plan import Plan
from arkinfer.artifact.tensors import TensorWriter
from arkinfer.errors import ArkError, ParityError, UnsupportedError, UserError
from arkinfer.exporters import arena, cuda_lowering, cuda_outline, cuda_weights
from arkinfer.exporters.base import BuildOptions
from arkinfer.interpreter import PlanInterpreter
from arkinfer.passes import formats
from arkinfer.recipe import Recipe, choose
from arkinfer.weights import CheckpointWeights
from tests.checkpoints import CONFIGS, write_checkpoint

TOKENS = [(17 * index + index * index) % 400 for index in range(600)]


@pytest.mark.parametrize(
    ("model", "weights", "kv"),
    [
        ("llama", "int4", "fp16"),
        ("qwen3", "int8", "int8"),
        ("qwen3", "fp32", "fp16"),
        ("bitcpm", "ternary", "fp16"),
    ],
)
def test_every_format_passes_the_gate_of_float16(
    checkpoints: dict[str, Path], tmp_path: Path, model: str, weights: str, kv: str
) -> None:
    artifact = pipeline.build(checkpoints[model], target="rtx-4090", out=tmp_path / "out.ark", weights=weights, kv=kv)
    manifest, parity = artifact.manifest, artifact.manifest.parity
    assert parity is not None and parity["passed"] and parity["positions"] >= 2000
    assert (parity["path"], parity["evidence"]) == ("fp16", "compiled, plan interpreted")
    assert (manifest.backend, manifest.activations) == ("cuda", "float")
    plan = Plan.from_json(artifact.file("payload/plan.json").read_text(encoding="utf-8"))
    for kernel in plan.kernels:
        image = kernel.images["sm_89"]
        assert artifact.file(image.file).read_bytes()[:4] == b"\x7fELF"
        assert f".entry {image.entry}(" in artifact.file(image.ptx).read_text(encoding="utf-8")
    assert "schedule decode" in artifact.file("payload/plan.txt").read_text(encoding="utf-8")


def test_the_weights_come_back_as_they_were_packed(checkpoints: dict[str, Path], llama: Artifact) -> None:
    manifest = llama.manifest
    recipe = Recipe.from_dict(manifest.weights, manifest.activations, manifest.model["recipe"])
    checkpoint = pipeline.open_checkpoint(checkpoints["llama"])
    graph = pipeline.lower(checkpoint.config, manifest.context, recipe, recipe.layouts, manifest.kv).graph
    stored, packed = exporters.get("cuda").weights(graph, llama.file), CheckpointWeights(checkpoint)
    for node in formats.linears(graph):
        weight = graph.weight_of(node)
        ours, theirs = stored.packed(weight), packed.packed(weight)
        assert (ours.format, ours.group, ours.shape) == (theirs.format, theirs.group, theirs.shape)
        for part in ("weight", "scales", "zeros", "order"):
            one, two = getattr(ours, part), getattr(theirs, part)
            assert (one is None) == (two is None)
            assert one is None or bool((one == two).all())


def test_logits_are_the_same_however_tokens_are_cut_but_for_rounding(llama: Artifact) -> None:
    """Every schedule, every border between them, and rows in several groups."""
    executor = PlanInterpreter(llama)
    whole = executor.step(TOKENS, executor.new_state(), "all")
    assert whole.shape == (600, 400) and np.isfinite(whole).all()
    for sizes in ([1], [8, 1, 9, 3], [512, 88]):
        state, start, turn, rows = executor.new_state(), 0, 0, []
        while start < 120 or (sizes[0] == 512 and start < 600):
            tokens = TOKENS[start : start + sizes[turn % len(sizes)]]
            rows.append(executor.step(tokens, state, "all"))
            start, turn = start + len(tokens), turn + 1
        np.testing.assert_allclose(np.concatenate(rows), whole[:start], atol=2e-2)
    executor.close()


def test_truncate_fork_last_and_none(llama: Artifact) -> None:
    executor = PlanInterpreter(llama)
    state = executor.new_state()
    assert executor.step(TOKENS[:40], state, "none").shape == (0, 400)
    twin = state.fork()
    first = executor.step(TOKENS[40:41], state)
    assert first.shape == (1, 400)
    executor.step(TOKENS[5:30], state)
    state.truncate(40)
    assert np.array_equal(executor.step(TOKENS[40:41], state), first)
    assert np.array_equal(executor.step(TOKENS[40:41], twin), first)


def test_a_piece_without_logits_ends_when_its_keys_are_stored(llama: Artifact) -> None:
    executor = PlanInterpreter(llama)
    one, two = executor.new_state(), executor.new_state()
    executor.step(TOKENS[:40], one, "none")
    executor.step(TOKENS[:40], two, "last")
    assert all(bool((one.memory[name] == two.memory[name]).all()) for name in one.memory)
    for schedule in executor.plan.schedules.values():
        after = schedule.launches[executor.plan.storing(schedule) : schedule.head]
        names = [executor.plan.kernels[launch.kernel].name for launch in after]
        assert names[0].startswith("attention") and "swiglu" not in names and names[-1] == "add_rms_norm"


def test_values_in_one_place_are_found(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """All scratch buffers at the start of the arena: the plan is well-formed, and only running it shows the fault."""

    def crammed(values: list[arena.Lifetime], alignment: int) -> tuple[list[int], int]:
        return [0] * len(values), -(-max(value.nbytes for value in values) // alignment) * alignment

    monkeypatch.setattr(cuda_lowering.arena, "place", crammed)
    with pytest.raises(ParityError) as caught:
        pipeline.build(checkpoints["llama"], target="rtx-4090", out=tmp_path / "x.ark", weights="int4")
    assert caught.value.facts["first bad layer"] == "layer.0"


def test_no_two_values_that_live_together_share_bytes(llama: Artifact) -> None:
    """Lifetimes read off the launches themselves; what the head reads lives on, since the head may run repeatedly."""
    plan = Plan.from_json(llama.file("payload/plan.json").read_text(encoding="utf-8"))
    largest = 0
    for schedule in plan.schedules.values():
        places = {}
        for buffer in schedule.scratch:
            used = [
                index
                for index, launch in enumerate(schedule.launches)
                if any(pointer.buffer == buffer.name for pointer in launch.pointers)
            ]
            last = len(schedule.launches) if used[0] < schedule.head <= used[-1] else used[-1]
            assert buffer.offset is not None
            end = buffer.offset + buffer.nbytes({"n": schedule.tokens, "r": schedule.rows})
            places[buffer.name] = (used[0], last, buffer.offset, end)
        for one, two in combinations(places.values(), 2):
            together = one[0] <= two[1] and two[0] <= one[1]
            assert not together or one[3] <= two[2] or two[3] <= one[2]
        assert max(end for *_, end in places.values()) <= plan.arena
        largest = max(largest, sum(end - start for _, _, start, end in places.values()))
    assert plan.arena < largest  # memory is used again


def test_weights_that_cannot_be_joined_write_side_by_side(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """q in int4 beside k and v in int8, gate in int8 beside up in int4."""
    artifact = pipeline.build(
        checkpoints["llama"],
        target="rtx-4090",
        out=tmp_path / "mixed.ark",
        weights="int4",
        rules=["*.k_proj.*=int8", "*.v_proj.*=int8", "*.gate_proj.*=int8"],
    )
    assert artifact.manifest.parity is not None and artifact.manifest.parity["passed"]
    plan = Plan.from_json(artifact.file("payload/plan.json").read_text(encoding="utf-8"))
    assert any(kernel.name == "swiglu" for kernel in plan.kernels)
    assert any(pointer.offset for launch in plan.schedules["decode"].launches for pointer in launch.pointers)


@pytest.mark.parametrize("weights", ["int4", "int8", "fp16", "ternary"])
def test_the_outline_says_what_is_stored(checkpoints: dict[str, Path], weights: str) -> None:
    """`arkinfer plan` counts bytes without torch; here are those of the graph."""
    checkpoint = pipeline.open_checkpoint(checkpoints["bitcpm" if weights == "ternary" else "llama"])
    expected, body = structure.shapes(checkpoint.config), structure.body(checkpoint.config)
    recipe = choose(weights, "int8", body, expected, checkpoint, "float")
    graph = pipeline.lower(checkpoint.config, 512, recipe, checkpoint.layouts(), "fp16").graph
    lowering = cuda_lowering.Lowering(graph, BuildOptions("fp16", "dense", 512), ("sm_89",))
    plan = lowering.run({"max_context": 512})
    plan.check()
    names = {"float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint8": "U8"}
    for buffer in plan.of_kind("parameter"):
        what = lowering.stored[buffer.name]
        if what.part == "vector":
            continue
        dtypes = {torch.float16: "F16", torch.bfloat16: "BF16"}
        node = next(node for node in graph.placeholders() if graph.weights.get(node.name) == what.weight)
        scales = next(
            (
                node
                for node in graph.placeholders()
                if (other := graph.weights.get(node.name)) and (other.name, other.part) == (what.weight.name, "scales")
            ),
            node,
        )
        kind = dtypes[scales.meta["val"].dtype]
        spec = cuda_outline.parameters(what.weight, kind, what.weight.zeros)[what.part]
        assert (spec.dtype, spec.shape) == (names[buffer.dtype], buffer.shape)


def test_same_inputs_give_the_same_bytes(checkpoints: dict[str, Path], llama: Artifact, tmp_path: Path) -> None:
    again = pipeline.build(
        checkpoints["llama"], target="rtx-4090", out=tmp_path / "llama.ark", weights="int4", verify="none"
    )
    assert again.manifest.files == llama.manifest.files


def test_an_interrupted_build_goes_on_and_gives_the_same_bytes(
    checkpoints: dict[str, Path], llama: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, parameters, packed = TensorWriter.finish, cuda_weights._parameters, []

    def counted(unit: list[Any], *others: Any) -> Any:
        packed.append(unit[0].name)
        return parameters(unit, *others)

    def stopping(writer: TensorWriter, part: str, origin: str) -> None:
        finish(writer, part, origin)
        if len(packed) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(tensors, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(cuda_weights, "_parameters", counted)
    options: dict[str, Any] = {"target": "rtx-4090", "weights": "int4", "verify": "none"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TensorWriter, "finish", stopping)
        pipeline.build(checkpoints["llama"], out=tmp_path / "llama.ark", **options)
    assert not (tmp_path / "llama.ark").exists()
    first = packed.copy()
    again = pipeline.build(checkpoints["llama"], out=tmp_path / "llama.ark", **options)
    assert set(packed[5:]).isdisjoint(first) and len(packed) > 15
    assert again.manifest.files == llama.manifest.files


def test_what_it_cannot_do_is_said_before_anything_is_built(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        pipeline.build(checkpoints["llama"], target="rtx-4090", out=tmp_path / "x.ark", kv="fp32")
    assert "--kv fp16" in caught.value.render()
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_does_not_fit_the_device_is_refused(
    checkpoints: dict[str, Path], llama: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arkinfer.exporters.cuda.SHARED_LIMIT", {"sm_89": 1000})
    with pytest.raises(UnsupportedError) as caught:
        pipeline.build(checkpoints["llama"], target="rtx-4090", out=tmp_path / "x.ark", weights="int4", verify="none")
    assert caught.value.code == "ARK-E323" and caught.value.facts["limit"] == "1,000 bytes"
    assert not (tmp_path / "x.ark").exists()


def test_int8_activations_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float16 activations"):
        pipeline.build(checkpoints["llama"], target="rtx-4090", out=tmp_path / "x.ark", activations="int8")


def test_float32_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_checkpoint(tmp_path / "wide", CONFIGS["llama"])
    file = folder / "model.safetensors"
    save_file({name: tensor.to(torch.float32) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ArkError, match="rtx-4090") as caught:
        pipeline.build(folder, target="rtx-4090", out=tmp_path / "x.ark", weights="fp32")
    assert "--weights fp16" in caught.value.render()
