"""The tiny architecture, its batched training form, the BitCPM4 quantiser and the Hugging Face style folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokens
import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer

from arkinfer.config import ModelConfig
from arkinfer.models import create, decoder
from arkinfer.models.decoder import CausalLM

GROUP = 64  # of the ternary scales, along the input axis
# Far from 1, as in every released MiniCPM4, so that a runtime which ignores the list fails at once.
FACTORS = [round(1 + 7 * (i / 31) ** 2, 6) for i in range(32)]
CONFIG: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "attention_bias": False,
    "bos_token_id": tokens.BOS,
    "dim_model_base": 128,
    "eos_token_id": [tokens.EOS, tokens.END],
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.08,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "model_type": "minicpm",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": tokens.EOS,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "longrope",
        "long_factor": FACTORS,
        "short_factor": FACTORS,
        "original_max_position_embeddings": 2048,
    },
    "rope_theta": 10000.0,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": tokens.VOCABULARY,
}


def new(seed: int) -> CausalLM:
    """The project's own MiniCPM module with this shape and random weights."""
    torch.manual_seed(seed)
    model = create(ModelConfig.from_json(CONFIG))
    for layer in model.model.layers:
        # Branches start silent: the residual stream begins as the embedding.
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=CONFIG["initializer_range"])
    return model


@contextmanager
def batched(rows: int, documents: torch.Tensor | None = None) -> Iterator[None]:
    """Let the batch-1 module train on ``rows`` equal sequences laid end to end.

    Everything but attention works token by token, so only attention needs to know where sequences begin; positions
    restart at 0 in each. With ``documents`` (rows, length), tokens see only tokens of their own number.
    """

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: None,
        positions: torch.Tensor,
        scale: float,
        *_: object,
    ) -> torch.Tensor:
        q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2).contiguous() for x in (q, k, v))
        kv_heads, length = k.shape[1:3]  # q (rows, heads, length, head_dim), k and v (rows, kv_heads, length, head_dim)
        # The queries of one group stand below each other: one product per kv head. On CPU twice as fast as SDPA.
        scores = (q.reshape(rows, kv_heads, -1, q.shape[3]) * scale) @ k.mT
        after = torch.full((length, length), float("-inf"), dtype=scores.dtype).triu(1)
        if documents is not None:
            apart = documents[:, :, None] != documents[:, None, :]  # (rows, length, length)
            after = after.masked_fill(apart, float("-inf"))[:, None, None]
        shares = (scores.unflatten(2, (-1, length)) + after).softmax(dim=-1).flatten(2, 3)
        return (shares @ v).view_as(q).transpose(1, 2).flatten(0, 1)  # (tokens, heads, head_dim)

    before = decoder.attention
    decoder.attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        decoder.attention = before


def ternary(weight: torch.Tensor) -> torch.Tensor:
    """BitCPM4's quantiser: per group s = mean|W|, clamp(round(W / s), -1, 1) * s, with s rounded to bfloat16."""
    groups = weight.unflatten(1, (-1, GROUP))  # (out, groups, GROUP)
    scale = groups.abs().mean(dim=2, keepdim=True).clamp_min(1e-5).bfloat16().float()
    return ((groups / scale).round().clamp(-1, 1) * scale).flatten(1)


def is_matrix(name: str) -> bool:
    """Whether a parameter is a linear weight of a layer: what Muon updates and BitCPM4 makes ternary."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def quantised(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters as the ternary model sees them; gradients pass straight through the rounding."""
    return {name: p + (ternary(p) - p).detach() if is_matrix(name) else p for name, p in parameters.items()}


def export(model: CausalLM, tokenizer: Tokenizer, folder: Path, as_ternary: bool) -> None:
    """Write config.json, model.safetensors (bfloat16, tied head omitted) and the tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (ternary(p.detach()) if as_ternary and is_matrix(name) else p.detach()).bfloat16().contiguous()
        for name, p in model.named_parameters()
        if name != "lm_head.weight"
    }
    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    tokens.save(tokenizer, folder)


def load(folder: Path) -> CausalLM:
    """An exported model in float32."""
    model = create(ModelConfig.from_json(json.loads((folder / "config.json").read_text(encoding="utf-8"))))
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model
