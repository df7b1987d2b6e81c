"""`arkinfer plan`: the truth about fit before anything is built."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import arkinfer as public
from arkinfer import graph as graphs
from arkinfer import pipeline, planning, targets
from arkinfer.artifact.tensors import TensorSpec, read_header
from arkinfer.backends.gears import decode_bytes, threshold
from arkinfer.backends.tvm import CacheSpec
from arkinfer.checkpoint import open_checkpoint
from arkinfer.errors import UserError
from arkinfer.estimate import Rates
from arkinfer.exporters import tvm
from arkinfer.exporters.base import BuildOptions
from arkinfer.exporters.lowering import Lowering
from arkinfer.passes import formats
from arkinfer.recipe import Rounding, choose
from tests.checkpoints import CONFIGS, write_checkpoint
from tests.cli.conftest import Arkinfer

NAMES = {"uint8": "U8", "uint16": "BF16", "float16": "F16", "float32": "F32", "int32": "I32"}
RATES = Rates(40e9, 1000e9, 250e9, "stated by the test")


@pytest.fixture(autouse=True)
def stated_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test measures this machine."""
    monkeypatch.setattr("arkinfer.rates.rates", lambda target, factors: RATES)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plans")
    found = {name: write_checkpoint(root / name, raw) for name, raw in CONFIGS.items()}
    found["bitcpm"] = write_checkpoint(root / "bitcpm", CONFIGS["minicpm"], ternary=64)
    return found


def board(folder: Path, text: str) -> str:
    file = folder / "board.yaml"
    file.write_text(f"extends: cpu\ndescription: A board\n{text}\n", encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("llama", {"weights": "int4", "kv": "int8", "group": 32, "head": "int4"}),
        ("qwen3", {"weights": "fp16", "kv": "fp32"}),
        ("minicpm", {"weights": "int8", "rules": ["*.k_proj.*=fp16"], "attention": "sparse"}),
        ("bitcpm", {}),
    ],
)
def test_plan_states_what_the_exporter_writes(
    checkpoints: dict[str, Path], tmp_path: Path, model: str, options: dict[str, Any]
) -> None:
    """Everything short of compiling: the exporter's own program and payload plan."""
    plan = public.plan(checkpoints[model], context=500, **options)
    opened, target = open_checkpoint(checkpoints[model]), targets.load("cpu")
    rounding = Rounding.of(target.defaults, options.get("group"), options.get("head"), None, options.get("rules", ()))
    graph = graphs.capture(opened.config, 500, plan.kv)
    used = [source for weight in graph.weights.values() for source in weight.sources]
    recipe = choose(options.get("weights", "auto"), "int8", formats.body(graph), used, opened, "auto", rounding)
    lowered = pipeline.lower(opened.config, 500, recipe, opened.layouts(), plan.kv)
    chosen = BuildOptions(plan.kv, plan.attention, 500)
    program = Lowering(lowered.graph, chosen).run()
    stored = sum(TensorSpec(NAMES[value.dtype], value.shape).nbytes for value in program.parameters)  # type: ignore[arg-type]
    assert plan.memory.weights == sum(plan.weight_bytes.values()) == stored
    assert plan.operators == lowered.graph.operators()
    assert {**plan.native, **plan.absorbed} == plan.operators
    sealed = tvm._plan(lowered.graph, program, target, chosen)
    caches = [CacheSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in sealed["caches"]]
    kept = {spec.name: spec.allocate(512).nbytes for spec in caches}  # 500 tokens take 8 blocks of 64
    assert plan.memory.compressed == kept.get("fine", 0) + kept.get("coarse", 0)
    assert plan.memory.kv + plan.memory.compressed == sum(kept.values())
    gear = threshold(sealed["sparse"], plan.attention)
    assert plan.speeds[0].decode_bytes == decode_bytes(sealed["bytes"], sealed["sparse"], gear, 0)


def test_plan_states_the_bytes_of_a_built_artifact(tmp_path: Path) -> None:
    plan = public.plan("tiny-bitcpm")
    artifact = public.build("tiny-bitcpm", out=tmp_path / "out.ark", verify="none")
    tensors = read_header(artifact.file("weights-cpu.safetensors"))
    assert plan.memory.weights == sum(entry.nbytes for name, entry in tensors.items() if not name.startswith("~"))
    assert plan.build.disk_bytes > sum(entry.size for entry in artifact.manifest.files.values())


def test_says_in_one_line_whether_it_fits(arkinfer: Arkinfer, tmp_path: Path) -> None:
    target = board(tmp_path, "memory: 1 GB\nbandwidth: 20 GB/s\ncompute: {int8: 1 TOPS, fp32: 250 GFLOPS}")
    done = arkinfer("plan", "tiny-minicpm", "--target", target)
    assert done.status == 0
    first, *rest = done.out.splitlines()
    assert first.startswith("tiny-minicpm -> board: fits: ")
    assert first.endswith("at 2,048 tokens; largest context 2,048")
    assert not any("try" in line for line in rest)


def test_offers_what_to_change_and_each_change_holds(
    arkinfer: Arkinfer, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    whole = public.plan(checkpoints["llama"], weights="fp16")
    small = public.plan(checkpoints["llama"], weights="fp16", context=256)
    room = (whole.memory.total + small.memory.total) // 2
    target = board(tmp_path, f"memory: {room}\ndefaults: {{weights: fp16}}")
    done = arkinfer("plan", str(checkpoints["llama"]), "--target", target, "--json")
    assert done.status == 1
    facts = json.loads(done.out)
    assert facts["fits"] is False
    assert 256 <= facts["largest_context"] < 1024
    assert any(change["fits"] for change in facts["ladder"])
    for change in facts["ladder"]:
        words = shlex.split(change["command"])
        again = json.loads(arkinfer("plan", *words[2:], "--json").out)
        assert again["memory"]["total"] == change["total_bytes"] == facts["memory"]["total"] - change["saves_bytes"]
        assert again["fits"] == change["fits"]


def test_largest_context_is_the_largest(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    kept = public.plan(checkpoints["minicpm"], context=512).memory.total
    target = board(tmp_path, f"memory: {kept}")
    assert public.plan(checkpoints["minicpm"], target).largest_context == 512
    target = board(tmp_path, f"memory: {kept - 1}")
    assert public.plan(checkpoints["minicpm"], target).largest_context == 448


def test_plan_and_build_refuse_alike(arkinfer: Arkinfer, tmp_path: Path) -> None:
    raw = {**CONFIGS["llama"], "head_dim": 40}
    model = str(write_checkpoint(tmp_path / "odd", raw))
    planned = json.loads(arkinfer("plan", model, "--json").out)
    built = arkinfer("build", model, "-o", str(tmp_path / "odd.ark"), "--json")
    assert built.status == arkinfer("plan", model).status == 3
    assert planned["refused"] == list(json.loads(built.out)["error"]["facts"].values())


def test_a_target_that_cannot_be_built_for_is_refused_but_counted(arkinfer: Arkinfer, tmp_path: Path) -> None:
    target = board(tmp_path, "backend: tensorrt\narch: [sm_87]\nmemory: 8 GiB\nbandwidth: 204.8 GB/s")
    done = arkinfer("plan", "tiny-minicpm", "--target", target, "--json")
    assert done.status == 3
    facts = json.loads(done.out)
    assert "toolchain names none of tensorrt" in facts["refused"][0]
    assert facts["memory"]["weights"] > 2_500_000


def test_faster_machines_are_faster_and_deeper_contexts_are_slower() -> None:
    slow = planning.plan("tiny-minicpm", rates=RATES)
    fast = planning.plan("tiny-minicpm", rates=Rates(80e9, 2000e9, 500e9, "stated by the test"))
    for one, two in zip(slow.speeds, fast.speeds, strict=True):
        assert one.decode_tok_s is not None and two.decode_tok_s is not None
        assert one.prefill_tok_s is not None and two.prefill_tok_s is not None
        assert one.decode_tok_s < two.decode_tok_s < 2 * one.decode_tok_s
        assert one.prefill_tok_s < two.prefill_tok_s < 2 * one.prefill_tok_s
    assert [speed.decode_tok_s for speed in slow.speeds] == sorted(
        (speed.decode_tok_s or 0 for speed in slow.speeds), reverse=True
    )


def test_bad_requests_end_as_those_of_build_do(checkpoints: dict[str, Path]) -> None:
    for options, code in (
        ({"weights": "ternary"}, "ARK-E132"),
        ({"context": 10**6}, "ARK-E135"),
        ({"attention": "sparse"}, "ARK-E213"),
        ({"rules": ["nothing=int8"]}, "ARK-E13"),
    ):
        with pytest.raises(UserError) as error:
            public.plan(checkpoints["llama"], **options)  # type: ignore[arg-type]
        assert error.value.code.startswith(code)


def test_build_says_what_it_takes_and_warns_of_what_does_not_fit(arkinfer: Arkinfer, tmp_path: Path) -> None:
    target = board(tmp_path, "memory: 1 MB\narch: [x86-64-v3]")
    done = arkinfer("build", "needle", "--target", target, "--verify", "none", "-o", str(tmp_path / "needle.ark"))
    assert done.status == 0
    line, warning, *_ = done.err.splitlines()
    assert line.startswith("needle as ")
    assert warning.startswith("warning: the artifact will not fit the target")


def test_build_needs_room_on_the_disk_before_it_starts(
    arkinfer: Arkinfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    done = arkinfer("build", "tiny-minicpm", "-o", str(tmp_path / "tiny.ark"), "--json")
    assert done.status == 1
    assert json.loads(done.out)["error"]["code"] == "ARK-E146"
    assert not list(tmp_path.iterdir())


def test_rounding_by_pgptq_is_part_of_the_build() -> None:
    search, pgptq = (
        planning.plan("tiny-minicpm", weights="int4", method=method).build for method in ("search", "pgptq")
    )
    assert search.round_seconds == 0 < pgptq.round_seconds
    assert pgptq.host_bytes > search.host_bytes and pgptq.disk_bytes > search.disk_bytes
