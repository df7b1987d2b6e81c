"""MiniCPM4 and 4.1: Llama with muP scalings (MiniCPM4 report; OpenBMB's modeling code).

The residual scale lives in Layer; LongRoPE and sparse attention come from the config.
"""

from __future__ import annotations

import torch

from arkinfer.models.llama import Llama


class MiniCPM(Llama):
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(tokens) * self.config.embedding_scale

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden * self.config.logit_scale).float()
