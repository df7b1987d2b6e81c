"""MiniCPM4 / 4.1: Llama with muP multipliers, longrope and, where the config asks, InfLLM-v2 attention."""

from __future__ import annotations

import torch

from arkinfer.models.decoder import CausalLM, Layer


class MiniCPMLayer(Layer):
    def scaled(self, branch: torch.Tensor) -> torch.Tensor:
        return branch * self.residual_scale


class MiniCPM(CausalLM):
    """MiniCPMForCausalLM of OpenBMB (MiniCPM4 report, section 2); scales as ModelConfig normalised them."""

    layer = MiniCPMLayer

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().embed(tokens) * self.config.embedding_scale

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().head(hidden * self.config.logit_scale)
