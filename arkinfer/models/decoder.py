"""The pre-norm decoder that every family shares: plain Llama. A family file holds only what differs.

Parameter names are the checkpoint's. Batch is one and tokens come first: hidden states are (tokens, hidden_size).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from arkinfer.config import ModelConfig
from arkinfer.ops.attention import LayerCache, attention
from arkinfer.ops.linear import linear
from arkinfer.ops.rope import rope
from arkinfer.quant.packed import Packed


class Linear(nn.Module):
    """A weight (out, in) in any format of arkinfer.ops.linear; dense until `pack` replaces it."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.scales: torch.Tensor | None = None
        self.zeros: torch.Tensor | None = None
        self.order: torch.Tensor | None = None
        self.format, self.group, self.activations = "dense", 0, "float"
        nn.init.normal_(self.weight, std=inputs**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def pack(self, packed: Packed, activations: str = "float") -> None:
        """Compute from ``packed`` from now on."""
        self.weight = nn.Parameter(packed.weight, requires_grad=False)
        self.scales, self.zeros, self.order = packed.scales, packed.zeros, packed.order
        self.format, self.group, self.activations = packed.format, packed.group, activations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(
            x, self.weight, self.scales, self.zeros, self.order, self.bias, self.format, self.group, self.activations
        )


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, the variance in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.scale, self.sparse = config.head_dim, config.head_dim**-0.5, config.sparse
        self.magnitude = config.rope.magnitude(config.max_context)
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query, config.attention_bias)
        self.k_proj = Linear(config.hidden_size, key, config.attention_bias)
        self.v_proj = Linear(config.hidden_size, key, config.attention_bias)
        self.o_proj = Linear(query, config.hidden_size, config.attention_bias)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), before rope."""
        q, k, v = (layer(x).unflatten(1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, inverse_frequencies: torch.Tensor, cache: LayerCache | None
    ) -> torch.Tensor:
        q, k, v = self.project(x)
        nope = (q, k) if self.sparse is not None and self.sparse.use_nope else (None, None)
        q = rope(q, positions, inverse_frequencies, self.magnitude)
        k = rope(k, positions, inverse_frequencies, self.magnitude)
        mixed = attention(q, k, v, cache, positions, self.scale, self.sparse, *nope)
        return self.o_proj(mixed.flatten(1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    attention: type[Attention] = Attention

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = self.attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.residual_scale = config.residual_scale

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, inverse_frequencies: torch.Tensor, cache: LayerCache | None
    ) -> torch.Tensor:
        x = x + self.scaled(self.self_attn(self.input_layernorm(x), positions, inverse_frequencies, cache))
        return x + self.scaled(self.mlp(self.post_attention_layernorm(x)))

    def scaled(self, branch: torch.Tensor) -> torch.Tensor:
        """Return what a branch adds to the residual stream."""
        return branch


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, layer: type[Layer]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class CausalLM(nn.Module):
    """A language model; ``forward`` gives hidden states after the final norm, ``head`` turns them into logits."""

    layer: type[Layer] = Layer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, self.layer)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.inverse_frequencies: torch.Tensor
        frequencies = torch.from_numpy(config.rope.inverse_frequencies(config.head_dim, config.max_context))
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)  # real even when weights are on meta
        self.tie()

    def tie(self) -> None:
        """Share the embedding with the output head if the model does."""
        if self.config.tie_embeddings:
            self.lm_head.weight = cast(nn.Parameter, self.model.embed_tokens.weight)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as torch does; a tied model takes a state with or without ``lm_head.weight``, and stays tied."""
        if self.config.tie_embeddings:
            state_dict = {"lm_head.weight": state_dict["model.embed_tokens.weight"], **state_dict}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self.tie()
        return result

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the first hidden states (tokens, hidden_size)."""
        return self.model.embed_tokens(tokens)  # type: ignore[no-any-return]

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, caches: list[LayerCache] | None = None
    ) -> torch.Tensor:
        """Return hidden states (tokens, hidden_size) of ``tokens`` (tokens,) int64 at consecutive ``positions``.

        ``caches`` (one a layer) are read and written; without them the tokens are a whole sequence from position 0.
        """
        x = self.embed(tokens)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, positions, self.inverse_frequencies, None if caches is None else caches[index])
        return self.model.norm(x)  # type: ignore[no-any-return]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (tokens, vocab_size) float32."""
        return self.lm_head(hidden).float()  # type: ignore[no-any-return]
