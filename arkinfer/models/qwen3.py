"""Qwen3, dense: Llama with RMSNorm on every query and key head before rotation (config.qk_norm, see llama.Attention)."""

from __future__ import annotations

from arkinfer.models.llama import Llama


class Qwen3(Llama):
    pass
