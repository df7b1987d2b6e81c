"""`arkinfer plan` for GPUs: the bytes, refusals and figures of the artifact that a build makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arkinfer import pipeline, planning, structure, targets
from arkinfer.artifact import Artifact
from arkinfer.estimate import factors
from arkinfer.exporters import cuda, cuda_lowering, cuda_workspace
from arkinfer.exporters.base import BuildOptions
from arkinfer.recipe import Rounding, choose
from arkinfer.structure import Structure
from tests.checkpoints import CONFIGS, write_checkpoint
from tests.cuda.test_cli import report, shell

NOPE = {"use_nope": True, "lse": "exact", "block_size": 32}


@pytest.mark.parametrize(
    ("model", "fields", "context", "rules"),
    [
        ("llama", {"num_hidden_layers": 5}, 1024, []),
        ("qwen3", {"intermediate_size": 96, "vocab_size": 3000}, 100, []),
        ("qwen3", {}, 512, ["*.k_proj.*=int8", "*.gate_proj.*=int8"]),
        ("minicpm", {}, 1000, []),
        ("minicpm", {"sparse": NOPE, "num_hidden_layers": 4}, 1024, []),
    ],
)
def test_workspace_is_that_of_the_plan(
    tmp_path: Path, model: str, fields: dict[str, Any], context: int, rules: list[str]
) -> None:
    """The places of values without the graph, against those that the lowering gives them."""
    fields = dict(fields)
    sparse = fields.pop("sparse", None)
    raw = {**CONFIGS[model], **fields}
    if sparse:
        raw["sparse_config"] = {**raw["sparse_config"], **sparse}
    checkpoint = pipeline.open_checkpoint(write_checkpoint(tmp_path / "model", raw))
    config = checkpoint.config
    expected, body = structure.shapes(config), structure.body(config)
    rounding = Rounding.of(targets.load("rtx-4090").defaults, rules=rules)
    recipe = choose("int4", "int8", body, expected, checkpoint, "float", rounding)
    graph = pipeline.lower(config, context, recipe, checkpoint.layouts(), "fp16").graph
    plan = cuda_lowering.Lowering(graph, BuildOptions("fp16", "auto", context), ("sm_89",)).run({})
    assert cuda_workspace.nbytes(Structure(config, recipe), context) == cuda._memory(plan)["workspace_bytes"]


def test_plan_states_what_the_artifact_takes(checkpoints: dict[str, Path], llama: Artifact) -> None:
    found = planning.plan(checkpoints["llama"], "rtx-4090", weights="int4")
    limits, memory = llama.manifest.limits, found.memory
    assert memory.weights == limits["weights_bytes"]
    assert memory.kv + memory.compressed == limits["cache_bytes"]
    assert memory.workspace == limits["workspace_bytes"]
    assert found.factors == factors("cuda") and found.factors != factors("tvm")


@pytest.mark.parametrize("target", ["rtx-4090", "jetson-orin-cuda"])
def test_the_command_line_answers_for_gpus(target: str) -> None:
    facts = report("plan", "tiny-bitcpm", "--target", target)
    assert facts["fits"] is True and facts["refused"] == [] and facts["weights"] == "ternary"
    assert all(speed["decode_tok_s"] > 0 and speed["prefill_tok_s"] > 0 for speed in facts["speeds"])
    assert "guessed" in facts["factors"]["source"]
    done = shell("plan", "tiny-bitcpm", "--target", target)
    assert done.returncode == 0 and done.stdout.startswith(f"tiny-bitcpm -> {target}: fits: ")
    assert "GOP/s fp16" in done.stdout and "shares guessed: no GPU has run it" in done.stdout


@pytest.mark.parametrize("options", [["--kv", "fp32"], ["--weights", "fp32"]])
def test_plan_and_build_refuse_alike(checkpoints: dict[str, Path], tmp_path: Path, options: list[str]) -> None:
    from safetensors.torch import load_file, save_file

    model = write_checkpoint(tmp_path / "wide", CONFIGS["llama"])
    file = model / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    words = [str(model), "--target", "rtx-4090", *options]
    planned = report("plan", *words, status=3)
    built = report("build", *words, "-o", str(tmp_path / "x.ark"), status=3)
    assert planned["refused"] == list(built["error"]["facts"].values())
    assert not (tmp_path / "x.ark").exists()


def test_keys_that_cannot_be_counted_are_refused_with_a_context_that_can(tmp_path: Path) -> None:
    fields = {"num_key_value_heads": 64, "num_attention_heads": 64, "head_dim": 256, "max_position_embeddings": 1 << 18}
    model = write_checkpoint(tmp_path / "wide", {**CONFIGS["llama"], **fields})
    (reason,) = planning.plan(model, "h200", weights="int4", context=1 << 18).refused
    context = int(reason.split("--context ")[1])
    assert planning.plan(model, "h200", weights="int4", context=context).refused == ()
    assert planning.plan(model, "h200", weights="int4", context=context + 64).refused
