"""Llama 2 and 3.x: the plain pre-norm decoder that the other families vary.

Tokens come first and there is no batch axis: one device, one conversation. Parameter names are the checkpoint's.
"""

from __future__ import annotations

import torch
from torch import nn

from arkinfer.config import ModelConfig
from arkinfer.ops.attention import LayerCache, attention
from arkinfer.ops.linear import linear
from arkinfer.ops.rope import rope


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.config = config
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, config.attention_bias)
        self.o_proj = Linear(width, config.hidden_size, config.attention_bias and config.family == "llama")
        self.inverse_frequencies = config.rope.inverse_frequencies(config.head_dim, context).tolist()
        self.magnitude = config.rope.magnitude(config.max_context)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, cache: LayerCache | None) -> torch.Tensor:
        split = (*x.shape[:-1], -1, self.config.head_dim)
        q, k, v = self.q_proj(x).view(split), self.k_proj(x).view(split), self.v_proj(x).view(split)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        rotated = [rope(part, positions, self.inverse_frequencies, self.magnitude) for part in (q, k)]
        out = attention(*rotated, v, positions, cache, self.config.sparse, q, k)  # (tokens, heads, head_dim)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.scale = config.residual_scale
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, context)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, h: torch.Tensor, positions: torch.Tensor, cache: LayerCache | None) -> torch.Tensor:
        h = self.add(h, self.self_attn(self.input_layernorm(h), positions, cache))
        return self.add(h, self.mlp(self.post_attention_layernorm(h)))

    def add(self, h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return h + delta if self.scale == 1.0 else h + delta * self.scale


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, context) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)


class Llama(nn.Module):
    """``forward(tokens (n,), positions (n,), caches)`` -> hidden (n, hidden); ``head(hidden)`` -> logits (n, vocab) float32.

    ``caches`` holds one LayerCache per layer and is updated in place; None runs one stateless causal pass, for training,
    which also takes a leading batch axis.
    """

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, context)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, caches: list[LayerCache] | None = None) -> torch.Tensor:
        h = self.embed(tokens)
        for index, layer in enumerate(self.model.layers):
            h = layer(h, positions, None if caches is None else caches[index])
        return self.model.norm(h)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(tokens)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden).float()
