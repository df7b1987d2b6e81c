"""Whole models from quantised checkpoints: the logits of transformers with the weights multiplied out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from arkinfer import pipeline
from arkinfer.checkpoint import open_checkpoint
from arkinfer.errors import UnsupportedError, UserError
from arkinfer.graph import ModelGraph
from arkinfer.passes import formats
from arkinfer.recipe import Recipe, Rounding, Rule, choose
from arkinfer.reference import Reference
from arkinfer.weights import CheckpointWeights
from tests.checkpoint.quantised import SCHEMES, write_quantised
from tests.checkpoints import CONFIGS

TOKENS = [(29 * index + index * index) % 400 for index in range(70)]


def theirs(raw: dict[str, Any], state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return transformers' logits (tokens, vocabulary); a MiniCPM, which it lacks, is a Llama with scales folded in."""
    kinds: dict[str, tuple[Any, Any]] = {"Qwen3ForCausalLM": (Qwen3Config, Qwen3ForCausalLM)}
    config, model_class = kinds.get(raw["architectures"][0], (LlamaConfig, LlamaForCausalLM))
    known = {name: value for name, value in raw.items() if name not in ("architectures", "sparse_config")}
    if "scale_emb" in raw:
        residual = raw["scale_depth"] / raw["num_hidden_layers"] ** 0.5
        folded = {
            "embed_tokens": raw["scale_emb"], "o_proj": residual, "down_proj": residual,
            "lm_head": raw["dim_model_base"] / raw["hidden_size"],
        }  # fmt: skip
        state = {name: value * folded.get(name.split(".")[-2], 1) for name, value in state.items()}
    model: PreTrainedModel = model_class(config(**known)).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    with torch.no_grad():
        model.tie_weights()
        return model(torch.tensor(TOKENS)[None]).logits[0]


def ours(folder: Path) -> tuple[torch.Tensor, Recipe]:
    """Return the reference's logits from the weights as they are packed, exact activations, tables in float32."""
    checkpoint = open_checkpoint(folder)
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    layouts = checkpoint.layouts()
    exact = tuple(Rule(name, "fp32") for name in tables if name in layouts and not layouts[name].quantised)

    def recipe(graph: ModelGraph) -> Recipe:
        used = [source for weight in graph.weights.values() for source in weight.sources]
        return choose("auto", "fp32", formats.body(graph), used, checkpoint, "float", Rounding(rules=exact))

    lowered = pipeline.lower(checkpoint.config, 128, recipe, layouts, "fp32")
    reference = Reference(lowered.graph, CheckpointWeights(checkpoint), "fp32", "dense")
    return torch.from_numpy(reference.step(TOKENS, reference.new_state(128), "all")), lowered.recipe


EVERYWHERE = ("gptq", "awq", "marlin-cpmcu", "packed-int4")
CASES = [(model, name) for name in EVERYWHERE for model in CONFIGS]
CASES += [("llama", name) for name in SCHEMES if name not in EVERYWHERE]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, model: str, name: str) -> None:
    raw, scheme = CONFIGS[model] | {"num_hidden_layers": 1}, SCHEMES[name]
    state = write_quantised(tmp_path, raw, scheme)
    logits, recipe = ours(tmp_path)
    assert float((logits - theirs(raw, state)).abs().max()) <= 1e-4
    body = {layout.scheme for stem, layout in recipe.layouts.items() if stem.endswith("_proj.weight")}
    assert body == {name.split("-")[0].replace("packed", "compressed-tensors").replace("plain", "compressed-tensors")}


def test_settings_in_two_places_must_agree(tmp_path: Path) -> None:
    write_quantised(tmp_path, CONFIGS["llama"], SCHEMES["gptq"])
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128}), encoding="utf-8")
    with pytest.raises(UserError, match="disagree about `group_size`"):
        open_checkpoint(tmp_path)


def test_eight_bit_floats_are_named(tmp_path: Path) -> None:
    """Their dtype is in no table of arkinfer's, so the settings must speak before the headers do."""
    write_quantised(tmp_path, CONFIGS["llama"] | {"num_hidden_layers": 1}, SCHEMES["plain-int8"])
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype":"I8"', b'"dtype":"F8_E4M3"'))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["format"] = "float-quantized"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnsupportedError, match="compressed as 'float-quantized'"):
        open_checkpoint(tmp_path)
