"""The model definitions against Hugging Face transformers, random weights, float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from arkinfer.config import FAMILIES, ModelConfig, SparseConfig
from arkinfer.models import MODELS, create
from arkinfer.models.decoder import CausalLM
from arkinfer.ops.attention import new_caches
from arkinfer.quant import integer
from arkinfer.quant.packed import dequantise

SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "vocab_size": 128, "max_position_embeddings": 512, "initializer_range": 0.2,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
FACTORS = [1.0 + pair for pair in range(8)]
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 512,
            "short_factor": FACTORS, "long_factor": FACTORS}  # fmt: skip


def logits(model: CausalLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.head(model(tokens, torch.arange(len(tokens))))


def theirs(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def ours(model: PreTrainedModel, architecture: str, **changes: Any) -> CausalLM:
    """Return arkinfer's model of the same config and weights, as read from the files that transformers would write."""
    config = ModelConfig.from_json({**model.config.to_dict(), "architectures": [architecture], **changes})
    with torch.device("meta"):
        created = create(config)
    created.load_state_dict(model.state_dict(), assign=True)
    return created


@pytest.mark.parametrize("tied", [False, True])
def test_llama_with_llama3_rope(tied: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": tied}, rope_parameters=LLAMA3)).eval()
    tokens = torch.randint(0, 128, (200,))
    assert (logits(ours(model, "LlamaForCausalLM"), tokens) - theirs(model, tokens)).abs().max() <= 1e-4


def test_llama_with_biases() -> None:
    torch.manual_seed(1)
    config = LlamaConfig(**SIZES, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    tokens = torch.randint(0, 128, (50,))
    assert (logits(ours(model, "LlamaForCausalLM"), tokens) - theirs(model, tokens)).abs().max() <= 1e-4


def test_qwen3() -> None:
    torch.manual_seed(2)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    tokens = torch.randint(0, 128, (200,))
    assert (logits(ours(model, "Qwen3ForCausalLM"), tokens) - theirs(model, tokens)).abs().max() <= 1e-4


def test_minicpm_equals_the_llama_with_its_scales_folded_in() -> None:
    # transformers has no MiniCPM; folding the muP multipliers into the weights makes it a Llama.
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LONGROPE)).eval()
    minicpm = ours(model, "MiniCPMForCausalLM", scale_emb=12, scale_depth=1.4, dim_model_base=16)
    tokens = torch.randint(0, 128, (200,))
    expected = logits(minicpm, tokens)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter *= 12
            elif "o_proj" in name or "down_proj" in name:
                parameter *= 1.4 / 3**0.5
            elif "lm_head" in name:
                parameter *= 16 / 64
    # The multipliers reach the same weights in place: both models share them.
    assert minicpm.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (expected - theirs(model, tokens)).abs().max() <= 1e-4


@pytest.mark.parametrize("sparse", [None, SparseConfig(4, 2, 8, 1, 16, 3, dense_len=40)], ids=["dense", "sparse"])
def test_chunks_equal_one_pass(sparse: SparseConfig | None) -> None:
    torch.manual_seed(4)
    config = ModelConfig.from_json({**SIZES, "architectures": ["MiniCPMForCausalLM"]})
    config = dataclasses.replace(config, sparse=sparse)
    model, tokens = create(config), torch.randint(0, 128, (90,))
    caches, start, pieces = new_caches(config, 96), 0, []
    with torch.no_grad():
        for size in (1, 30, 9, 1, 1, 48):
            pieces.append(model.head(model(tokens[start : start + size], torch.arange(start, start + size), caches)))
            start += size
    torch.testing.assert_close(torch.cat(pieces), logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_training_reaches_every_parameter() -> None:
    config = dataclasses.replace(
        ModelConfig.from_json({**SIZES, "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}),
        sparse=SparseConfig(4, 2, 8, 1, 16, 3, dense_len=20),
    )
    model = create(config)
    tokens = torch.randint(0, 128, (50,))
    torch.nn.functional.cross_entropy(model.head(model(tokens, torch.arange(50)))[:-1], tokens[1:]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_packed_weights_compute_what_they_dequantise_to() -> None:
    torch.manual_seed(5)
    config = ModelConfig.from_json({**SIZES, "architectures": ["LlamaForCausalLM"]})
    model, tokens = create(config).requires_grad_(False), torch.randint(0, 128, (20,))
    layer = model.model.layers[1].mlp.up_proj
    packed = integer.quantise(layer.weight, 4, 32)
    layer.weight.copy_(dequantise(packed))
    expected = logits(model, tokens)
    layer.pack(packed)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)


def test_every_family_has_a_model() -> None:
    assert MODELS.keys() == FAMILIES.keys()
    for architecture, family in FAMILIES.items():
        with torch.device("meta"):
            model = create(ModelConfig.from_json({**SIZES, "architectures": [architecture]}))
        assert type(model).__module__ == f"arkinfer.models.{family}"
        assert model.inverse_frequencies.device.type == "cpu", "frequencies are real even when weights are not"
