"""Llama: the shared decoder as it is."""

from arkinfer.models.decoder import CausalLM


class Llama(CausalLM):
    """LlamaForCausalLM of transformers; llama3 and other rope scalings come from the config."""
