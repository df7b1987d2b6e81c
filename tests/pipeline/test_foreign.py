"""Checkpoints that transformers wrote, from the folder through the build to logits equal to transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import arkinfer
from arkinfer.checkpoint import open_checkpoint
from tests.checkpoints import write_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "vocab_size": 400, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=False)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    }


@pytest.mark.parametrize(("family", "shard"), [("llama", "60KB"), ("qwen3", "5GB")])
def test_logits_of_a_saved_model(family: str, shard: str, tmp_path: Path) -> None:
    model = models()[family].eval()
    folder = tmp_path / family
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder, SIZES["vocab_size"])
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (family == "llama")
    artifact = arkinfer.build(
        folder, out=tmp_path / "out.ark", weights="fp32", kv="fp32", activations="float", verify="none"
    )
    tokens = torch.randint(3, 400, (90,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    with arkinfer.load(artifact.path) as engine:
        found = torch.from_numpy(engine.score(tokens.tolist()))
    assert (found - expected).abs().max() <= 1e-3  # the gate of the fp32 path
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_that_transformers_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = models()["llama"].to(dtype)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert {weight.layout.dtype for weight in checkpoint.weights.values()} == {
        {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    }
    assert checkpoint.weights.keys() == model.state_dict().keys()
    assert checkpoint.config.rope.kind == "llama3"
