"""From config to graph to fused, packed graph: every step computes what the module computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import fx

from arkinfer import graph, models, passes
from arkinfer.checkpoint.stored import Layout
from arkinfer.config import ModelConfig
from arkinfer.graph import ModelGraph, Weight
from arkinfer.ops.attention import new_caches
from arkinfer.passes import formats, fuse
from arkinfer.quant.packed import Packed
from arkinfer.recipe import Recipe

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 32, "topk": 2, "dense_len": 64}
MUP = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
CONFIGS = {
    "llama": {**BASE, "architectures": ["LlamaForCausalLM"]},
    "llama-bias": {**BASE, "architectures": ["LlamaForCausalLM"], "attention_bias": True},
    "qwen3-tied": {**BASE, "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "minicpm-sparse": {**BASE, **MUP, "architectures": ["MiniCPMForCausalLM"], "sparse_config": SPARSE},
}


class Dense:
    """Gives a module's own parameters as the graph's weights."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.tensors = module.state_dict()

    def packed(self, weight: Weight) -> Packed:
        joined = torch.cat([self.tensors[source] for source in weight.sources])
        return Packed("dense", 0, (joined.shape[0], joined.shape[-1]), joined)


def run(captured: ModelGraph, module: torch.nn.Module, tokens: torch.Tensor, rows: list[int]) -> torch.Tensor:
    values = {"tokens": tokens, "positions": torch.arange(len(tokens)), "rows": torch.tensor(rows)}
    caches = captured.new_caches(256, torch.float32)
    compiled = fx.GraphModule(torch.nn.Module(), captured.graph)
    with torch.no_grad():
        result: torch.Tensor = compiled(*captured.bind(values, caches, Dense(module)))[0]
    return result


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_fused_graph_computes_what_the_module_computes(name: str, joined: bool) -> None:
    config = ModelConfig.from_json(CONFIGS[name])
    torch.manual_seed(0)
    module = models.create(config)
    tokens = torch.randint(0, config.vocab_size, (97,))
    rows = [0, 50, 96]
    with torch.no_grad():
        hidden = module(tokens, torch.arange(97), new_caches(config, 256))
        wanted = module.head(hidden[rows])
    captured = graph.capture(config, 256, "fp32")
    for name, step in passes.fusions(lambda weights: joined):
        captured = step(captured)
        captured.graph.lint()
        assert torch.allclose(run(captured, module, tokens, rows), wanted, atol=1e-5), name


def test_a_gear_can_be_forced_whatever_the_config_leaves_out() -> None:
    """torch.export drops arguments that have their defaults, dense_len among them."""
    raw = {**CONFIGS["minicpm-sparse"], "sparse_config": {**SPARSE, "dense_len": 8192}}
    everywhere = ModelConfig.from_json({**raw, "sparse_config": {**SPARSE, "dense_len": -1}})
    torch.manual_seed(0)
    module = models.create(everywhere)
    tokens, rows = torch.randint(0, everywhere.vocab_size, (97,)), [0, 50, 96]
    with torch.no_grad():
        wanted = module.head(module(tokens, torch.arange(97), new_caches(everywhere, 256))[rows])
    captured = graph.capture(ModelConfig.from_json(raw), 256, "fp32")
    for _, step in passes.fusions(lambda weights: True):
        captured = step(captured)
    assert torch.allclose(run(captured.with_attention("sparse"), module, tokens, rows), wanted, atol=1e-5)
    assert not torch.allclose(run(captured, module, tokens, rows), wanted, atol=1e-5)


def test_fusion_leaves_one_projection_per_input() -> None:
    captured = graph.capture(ModelConfig.from_json(CONFIGS["minicpm-sparse"]), 256)
    before = captured.operators()["arkinfer.linear"]
    for _, step in passes.fusions(lambda weights: True):
        captured = step(captured)
    counts = captured.operators()
    layers = BASE["num_hidden_layers"]
    assert before == 7 * layers + 1
    assert counts["arkinfer.linear"] == 4 * layers + 1
    assert counts["arkinfer.swiglu"] == layers
    assert counts["arkinfer.add_rms_norm"] == 2 * layers
    assert "aten.silu" not in counts


def test_capture_is_reproducible_and_names_its_weights() -> None:
    config = ModelConfig.from_json(CONFIGS["minicpm-sparse"])
    first, second = graph.capture(config, 256), graph.capture(config, 256)
    assert first.dump() == second.dump()
    assert first.digest() == second.digest()
    sources = {source for weight in first.weights.values() for source in weight.sources}
    assert "model.layers.1.self_attn.q_proj.weight" in sources
    assert "lm_head.weight" in sources


def test_tied_weights_become_one_input() -> None:
    captured = graph.capture(ModelConfig.from_json(CONFIGS["qwen3-tied"]), 256)
    tables = [
        weight for weight in captured.weights.values() if "embed_tokens" in weight.name or "lm_head" in weight.name
    ]
    assert [weight.sources for weight in tables] == [("model.embed_tokens.weight",)]


def layouts(captured: ModelGraph) -> Mapping[str, Layout]:
    """Return what a checkpoint of ``captured``'s model says of itself before anything was quantised."""
    separate = [weight for weight in captured.weights.values() if len(weight.sources) == 1]
    return {weight.sources[0]: Layout("dense", weight.shape, "BF16") for weight in separate}


@pytest.mark.parametrize(
    ("weights", "body", "head"), [("int8", "int8", "int8"), ("int4", "int4", "int8"), ("fp16", "dense", "dense")]
)
def test_formats_are_assigned_by_recipe(weights: str, body: str, head: str) -> None:
    captured = graph.capture(ModelConfig.from_json(CONFIGS["llama"]), 256)
    captured = passes.run(captured, Recipe(weights, "int8" if weights != "fp16" else "float", layouts(captured)))
    found = {captured.weight_of(node).sources[0]: captured.weight_of(node).format for node in formats.linears(captured)}
    assert found.pop("lm_head.weight") == head
    assert set(found.values()) == {body}


def test_eight_billion_parameters_are_captured_without_memory() -> None:
    big = {
        **CONFIGS["llama"],
        "hidden_size": 4096,
        "num_hidden_layers": 4,
        "intermediate_size": 16384,
        "vocab_size": 73448,
    }
    captured = graph.capture(ModelConfig.from_json({**big, "head_dim": 128, "num_attention_heads": 32}), 131072)
    fused = fuse.shared_input_linears(captured, lambda weights: True)
    assert any(weight.shape == (2 * 16384, 4096) for weight in fused.weights.values())
