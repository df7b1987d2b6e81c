"""Artifacts for TensorRT from checkpoint to text: built and verified here, finished and run on a device in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import arkinfer
from arkinfer import backends, exporters, parity, pipeline, planning
from arkinfer.artifact import Artifact, tensorrt
from arkinfer.artifact.engine_recipe import EngineRecipe
from arkinfer.backends import tensorrt_finish
from arkinfer.cli import main
from arkinfer.errors import UnsupportedError
from tests.checkpoints import CONFIGS, write_checkpoint
from tests.tensorrt import decoder, runtime
from tests.tensorrt.conftest import Orin

GOLDEN = json.loads((Path(__file__).parents[1] / "pipeline" / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The bundled ternary model for a Jetson, verified."""
    out = tmp_path_factory.mktemp("tensorrt") / "ternary.ark"
    return pipeline.build("tiny-bitcpm", target="jetson-orin", out=out, context=512, quality="off")


def test_it_is_verified_without_a_device_and_says_how(ternary: Artifact) -> None:
    parity = ternary.manifest.parity
    assert parity is not None and parity["passed"] and parity["path"] == "fp16"
    version = tensorrt.library("tensorrt_rtx").__version__
    assert parity["evidence"] == (
        f"compiled, read by TensorRT for RTX {version}, its ONNX file run by onnxruntime on a processor"
    )


def test_it_holds_nothing_that_is_bound_to_a_device(ternary: Artifact) -> None:
    assert sorted(ternary.manifest.files) == [
        "generation.json", "model.onnx", "payload/graph.txt", "payload/plan.json", "payload/tensorrt.json",
        "template.jinja", "tokenizer.json", "weights-onnx.safetensors",
    ]  # fmt: skip
    recipe = tensorrt_finish.read_recipe(ternary)
    assert (recipe.library, recipe.versions, recipe.engine) == ("tensorrt", ">=10.15,<12", None)
    assert ternary.manifest.limits["cache_bytes"] == recipe.cache_bytes


def test_a_failed_verification_needs_no_inner_values(ternary: Artifact) -> None:
    executor = exporters.get("tensorrt").stand_in(ternary).executor  # type: ignore[union-attr]

    class Wrong:
        """A reference that computes something else."""

        perturbed = None

        def new_state(self, capacity: int) -> None: ...

        def step(self, tokens: list[int], state: None, logits: str) -> np.ndarray:
            return np.random.default_rng(0).standard_normal((len(tokens), executor.vocab_size)).astype(np.float32)

    report = parity.compare(executor, Wrong(), ([[1, 2, 3]], ""), "fast", "fp16")  # type: ignore[arg-type]
    assert not report.passed and report.first_bad_layer is None


def test_golden_text(ternary: Artifact, orin: Orin, capsys: pytest.CaptureFixture[str]) -> None:
    """The first `run` builds the engine and says so; the text is that of the CPU target, word for word."""
    orin(ternary)
    prompt = GOLDEN["messages"][-1]["content"]
    words = ["run", str(ternary.path), prompt, "--max-tokens", "40", "--temperature", "0", "--no-think", "--json"]
    with pytest.raises(SystemExit) as caught:
        main(words)
    shown = capsys.readouterr()
    assert not caught.value.code and "building the engine of ternary.ark" in shown.err
    result = json.loads(shown.out)
    assert len(result["tokens"]) == 40 and GOLDEN["tiny-bitcpm"].startswith(result["text"])
    scene = runtime.CURRENT[-1]
    assert {profile for profile, _, _ in scene.executed} >= {0} and scene.driver.replays > 30


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_engine_ahead_of_time(name: str, tmp_path: Path, orin: Orin, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX builds it here; the device's runtime captures graphs by itself."""
    checkpoint = write_checkpoint(tmp_path / name, CONFIGS[name])
    weights = {"llama": "int4", "qwen3": "int8"}[name]
    artifact = pipeline.build(
        checkpoint, target="rtx-4090-tensorrt", out=tmp_path / "a.ark", weights=weights, context=256, verify="none"
    )
    recipe = tensorrt_finish.read_recipe(artifact)
    assert recipe.checked.startswith("built for sm_89 by TensorRT for RTX")
    assert artifact.file(str(recipe.engine)).stat().st_size > artifact.file("weights-onnx.safetensors").stat().st_size
    driver = orin(artifact, level="sm_89")
    rtx = tensorrt.library("tensorrt_rtx")
    monkeypatch.setattr(rtx, "Runtime", runtime.Runtime)
    with arkinfer.load(artifact.path) as engine:
        tokens = list(range(3, 40))
        whole = engine.score(tokens)
        state = engine.executor.new_state()
        pieces = [engine.executor.step(tokens[:20], state, "all")]
        pieces += [engine.executor.step([token], state, "all") for token in tokens[20:]]
        assert np.allclose(whole, np.concatenate(pieces), atol=0.05)
    assert driver.captures == 0
    assert backends.finish(artifact) is None


def test_sparse_attention(tmp_path: Path, orin: Orin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows from the model's dense_len on choose their blocks, in an engine of fixed extents, in steps of any size."""
    checkpoint = write_checkpoint(tmp_path / "minicpm", {**CONFIGS["minicpm"], "num_hidden_layers": 1})
    out = tmp_path / "sparse.ark"
    artifact = pipeline.build(
        checkpoint, target="rtx-4090-tensorrt", out=out, weights="int8", context=250, verify="none"
    )
    recipe = tensorrt_finish.read_recipe(artifact)
    assert recipe.facts["sparse"]["dense_len"] == 96
    assert {cache.name for cache in recipe.caches if cache.name.startswith("layers.0.")} == {
        f"layers.0.{name}" for name in ("k", "v", "fine", "coarse")
    }
    orin(artifact, level="sm_89")
    monkeypatch.setattr(tensorrt.library("tensorrt_rtx"), "Runtime", runtime.Runtime)
    monkeypatch.setitem(parity.SUITES, "fast", 250)  # type: ignore[arg-type]
    report = pipeline.verify_artifact(artifact)
    assert report.passed and report.evidence == "ran", report.summary()
    executor, tokens = backends.open(artifact), [(13 * index + index * index) % 400 for index in range(140)]
    state, other = executor.new_state(), executor.new_state()
    executor.step(tokens[:130], state, "none")
    executor.step(tokens[:130], other, "none")
    singles = [executor.step([token], state)[0] for token in tokens[130:]]
    assert np.allclose(singles, executor.step(tokens[130:], other, "all"), atol=0.05)


def test_what_it_cannot_run_is_refused_before_building(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        pipeline.build("tiny-minicpm", target="jetson-orin", out=tmp_path / "x.ark", kv="int8")
    assert caught.value.code == "ARK-E302" and "--kv fp16" in str(caught.value.facts)
    assert not (tmp_path / "x.ark").exists()


def test_a_target_must_name_its_tensorrt(tmp_path: Path) -> None:
    file = tmp_path / "board.yaml"
    file.write_text("description: A board\nbackend: tensorrt\narch: [sm_87]\n", encoding="utf-8")
    refused = planning.plan("tiny-bitcpm", target=file).refused
    assert refused == ("the target's toolchain names none of tensorrt, tensorrt-rtx",)
    text = "extends: rtx-4090-tensorrt\ndescription: A board\narch: [sm_87, sm_89]\n"
    file.write_text(text, encoding="utf-8")
    assert planning.plan("tiny-bitcpm", target=file).refused == (
        "TensorRT for RTX builds nothing for sm_87",
        "an engine is built ahead of time for one architecture",
    )


def test_plan_names_what_is_expected_to_be_faster() -> None:
    def notes(model: str, target: str) -> str:
        return " ".join(planning.plan(model, target=target, attention="dense").notes)

    assert "--target jetson-orin-cuda is expected to decode faster" in notes("tiny-bitcpm", "jetson-orin")
    assert "no 2-bit weights" in notes("tiny-bitcpm", "jetson-orin")
    assert "this target is expected to decode faster than --target jetson-orin:" in notes(
        "tiny-bitcpm", "jetson-orin-cuda"
    )
    assert "reads as much a token" in notes("tiny-minicpm", "jetson-orin")
    ahead, later = (planning.plan("tiny-minicpm", target=name) for name in ("rtx-4090-tensorrt", "jetson-orin"))
    assert ahead.build.disk_bytes - later.build.disk_bytes == int(1.6 * ahead.memory.weights)
    assert "caches of all 4,096 tokens" in " ".join(planning.plan("needle", "jetson-orin", context=4096).notes)
    long, short = (planning.plan("needle", target="jetson-orin", context=size).speeds[0] for size in (4096, 1024))
    assert long.decode_bytes - short.decode_bytes == 3072 * 2 * 2 * 2 * 64 * 2


def change(recipe: EngineRecipe, **values: object) -> str:
    return json.dumps({**json.loads(recipe.to_json()), **values})


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "format": ({"format": 9}, "format 1"),
    "library": ({"library": "os"}, "no TensorRT"),
    "levels": ({"levels": []}, "levels"),
    "profiles": ({"profiles": {"decode": {"tokens": 1, "rows": 1}}}, "profiles"),
    "decode": (
        {"profiles": {name: {"tokens": 8, "rows": 8} for name in decoder.PROFILES}},
        "more than one token",
    ),
    "rows": ({"profiles": {name: {"tokens": 1, "rows": 2} for name in decoder.PROFILES}}, "no sound sizes"),
    "workspace": ({"workspace": -1}, "workspace"),
    "dtype": ({"caches": [{"name": "k", "dtype": "O", "shape": [1]}]}, "sound type"),
    "shape": ({"caches": [{"name": "k", "dtype": "float16", "shape": [1, 1 << 60]}]}, "sound type"),
    "twice": ({"caches": [{"name": "k", "dtype": "float16", "shape": [1]}] * 2}, "one name"),
    "facts": ({"facts": {}}, "vocab_size"),
    "key": ({"more": 1}, "more"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_recipe_that_is_not_sound_is_refused(case: str) -> None:
    values, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        EngineRecipe.from_json(change(decoder.recipe(), **values))


def test_a_recipe_comes_back_from_its_text() -> None:
    recipe = decoder.recipe()
    assert EngineRecipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize("logits", ["last", "all", "none"])
@pytest.mark.parametrize("count", [1, 2, 8, 9, 96, 97, 500])
def test_pieces_cover_a_step_once(count: int, logits: str) -> None:
    recipe = decoder.recipe()
    pieces = recipe.pieces(count, logits)
    assert sum(tokens for _, tokens, _ in pieces) == count
    assert sum(rows for _, _, rows in pieces) == {"last": 1, "all": count, "none": 0}[logits]
    for name, tokens, rows in pieces:
        assert tokens <= recipe.profiles[name].tokens and rows <= recipe.profiles[name].rows


def test_what_tensorrt_refuses_is_told_in_its_words(jetson: Artifact, tmp_path: Path) -> None:
    recipe = decoder.recipe("tensorrt_rtx", "sm_89")
    request = tensorrt.Request("tensorrt_rtx", recipe.to_json(), str(jetson.file("model.onnx")), "sm_89")

    def reasons(**changes: str) -> str:
        with pytest.raises(UnsupportedError) as caught:
            tensorrt.build(replace(request, **changes), lambda done, total: None)
        assert caught.value.code == "ARK-E346"
        return f"{caught.value.message} {caught.value.facts}"

    assert "SM89" in reasons(level="sm_87")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    assert "Failed to parse the ONNX model" in reasons(model=str(broken))
    assert "layers.0.k" in reasons(recipe=replace(recipe, caches=()).to_json())
