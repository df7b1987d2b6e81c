"""Model families: architecture name in config.json -> "module:class", imported only when used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arkinfer.config import ModelConfig
    from arkinfer.models.decoder import CausalLM

MODELS: Mapping[str, str] = {
    "MiniCPMForCausalLM": "arkinfer.models.minicpm:MiniCPM",
    "LlamaForCausalLM": "arkinfer.models.llama:Llama",
    "Qwen3ForCausalLM": "arkinfer.models.qwen3:Qwen3",
}


def create(config: ModelConfig) -> CausalLM:
    """Return the module of ``config.family`` with random weights on torch's current default device."""
    from arkinfer.config import FAMILIES

    architecture = next(name for name, family in FAMILIES.items() if family == config.family)
    module, _, name = MODELS[architecture].partition(":")
    model: CausalLM = getattr(import_module(module), name)(config)
    return model
