"""Qwen3: Llama with an RMSNorm over each query and key head, before rope."""

from __future__ import annotations

import torch

from arkinfer.config import ModelConfig
from arkinfer.models.decoder import Attention, CausalLM, Layer, RMSNorm


class Qwen3Attention(Attention):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().project(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen3Layer(Layer):
    attention = Qwen3Attention


class Qwen3(CausalLM):
    """Qwen3ForCausalLM of transformers (dense models)."""

    layer = Qwen3Layer
