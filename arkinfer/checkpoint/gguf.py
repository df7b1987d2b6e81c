"""A GGUF file of the Llama, MiniCPM or Qwen3 family as a checkpoint.

Names, keys and the order of q and k rows are those that llama.cpp's convert_hf_to_gguf.py writes; a tokenizer.json,
tokenizer_config.json, generation_config.json or chat_template.jinja beside the file goes before what is in it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from arkinfer.checkpoint import vocabulary
from arkinfer.checkpoint.base import Checkpoint
from arkinfer.checkpoint.folder import locate, read_text
from arkinfer.checkpoint.gguf_blocks import KEPT, GgufWeight
from arkinfer.checkpoint.gguf_file import GgufTensor, read_gguf, unsound
from arkinfer.checkpoint.stored import StoredWeight
from arkinfer.config import ModelConfig
from arkinfer.errors import UnsupportedError, UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "minicpm": "MiniCPMForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_PERMUTED = ("llama", "minicpm")  # their rotary embedding interleaves the halves of each head
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.(weight|bias)")
_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight")


class GgufCheckpoint(Checkpoint):
    """A .gguf file opened for reading. Raises UserError if it is malformed, UnsupportedError for other families."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_gguf(path)
        self._metadata, self._tensors = header.metadata, header.tensors
        self._architecture = self._text("general.architecture")
        if self._architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"{path.name} holds a model of architecture {self._architecture[:80]!r}",
                facts={"known": ", ".join(ARCHITECTURES)},
                hint="give the checkpoint in safetensors if its family is known",
                code="ARK-E310",
            )
        self.raw_config = self._config()
        config = ModelConfig.from_json(self.raw_config)
        self.weights = self._weights(config)
        self.config = replace(config, notes=(*config.notes, *self._notes()))

    @property
    def name(self) -> str:
        return self.path.stem

    def asset(self, name: str) -> bytes | None:
        beside = locate(self.path.parent, name)
        if beside is not None:
            return read_text(beside)
        if name == "tokenizer.json":
            return vocabulary.from_gguf(self._metadata, self.path)
        if name == "tokenizer_config.json":
            return self._tokenizer_settings()
        return None

    def _text(self, key: str) -> str:
        value = self._metadata.get(key)
        if not isinstance(value, str):
            raise unsound(self.path, f"{key} is {'missing' if value is None else 'not a text'}")
        return value

    def _key(self, name: str) -> Any:
        """Return a value of this architecture, or None; a list of equal numbers, one a layer, counts as one."""
        value = self._metadata.get(f"{self._architecture}.{name}")
        if isinstance(value, np.ndarray):
            if value.size == 0 or not bool((value == value[0]).all()):
                raise UnsupportedError(f"{name} differs from layer to layer in {self.path.name}", code="ARK-E311")
            value = value[0].item()
        return value

    def _config(self) -> dict[str, Any]:
        """Return what the metadata say, in the spelling of transformers' config.json."""
        if self._key("expert_count"):
            raise UnsupportedError(f"{self.path.name} is a mixture of experts", code="ARK-E311")
        fields = {
            "hidden_size": self._key("embedding_length"),
            "num_hidden_layers": self._key("block_count"),
            "num_attention_heads": self._key("attention.head_count"),
            "num_key_value_heads": self._key("attention.head_count_kv"),
            "head_dim": self._key("attention.key_length") or self._key("rope.dimension_count"),
            "intermediate_size": self._key("feed_forward_length"),
            "rms_norm_eps": self._decimal(self._key("attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": self._key("context_length"),
            "rope_theta": self._decimal(self._key("rope.freq_base")),
            "bos_token_id": self._metadata.get("tokenizer.ggml.bos_token_id"),
            "pad_token_id": self._metadata.get("tokenizer.ggml.padding_token_id"),
        }
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise unsound(self.path, "it has no matrix token_embd.weight")
        ends = [self._metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        fields |= {
            "architectures": [ARCHITECTURES[self._architecture]],
            "model_type": self._architecture,
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._tensors,
            "eos_token_id": sorted({end for end in ends if isinstance(end, int)}) or None,
            "hidden_act": "silu",
            "dtype": "float32",
            "rope_scaling": self._rope(),
        }
        if self._architecture == "minicpm":
            fields |= self._multipliers(fields["hidden_size"], fields["num_hidden_layers"])
        return {name: value for name, value in fields.items() if value is not None}

    def _decimal(self, value: Any, forward: Callable[[float], float] = float) -> Any:
        """Return the shortest decimal number that ``forward`` takes to the float32 ``value``: what the author wrote."""
        if not isinstance(value, float) or not math.isfinite(value):
            return value
        inverse = value / forward(1.0)
        for digits in range(1, 9):
            candidate = float(f"{inverse:.{digits}g}")
            if np.float32(forward(candidate)) == np.float32(value):
                return candidate
        return inverse

    def _multipliers(self, hidden: Any, layers: Any) -> dict[str, Any]:
        """Return MiniCPM's muP fields; the file holds scale_depth / sqrt(layers) and hidden / dim_model_base."""
        found = {name: self._key(f"{name}_scale") for name in ("embedding", "residual", "logit")}
        for name, value in found.items():
            if value is not None and not (isinstance(value, float) and 0 < value < 1e9):
                raise unsound(self.path, f"minicpm.{name}_scale is {value!r}"[:120])
        if type(hidden) is not int or type(layers) is not int or layers < 1:
            raise unsound(self.path, "its sizes are missing")
        depth = found["residual"]
        return {
            "scale_emb": self._decimal(found["embedding"]),
            "scale_depth": depth and self._decimal(depth, lambda value: value / math.sqrt(layers)),
            "dim_model_base": found["logit"] and self._decimal(hidden / found["logit"]),
        }

    def _rope(self) -> dict[str, Any] | None:
        """Return rope_scaling; factors in tensors apply at every position, whatever the keys say."""
        context = self._key("context_length")
        original = self._key("rope.scaling.original_context_length") or context
        factors = {name: self._factors(name) for name in _FACTORS if name in self._tensors}
        if "rope_freqs.weight" in factors:
            values = factors["rope_freqs.weight"]
            return {"rope_type": "longrope", "short_factor": values, "long_factor": values, "attention_factor": 1.0,
                    "original_max_position_embeddings": context}  # fmt: skip
        if factors:
            if len(factors) != 2:
                raise unsound(self.path, f"of the two lists of rope factors it has {', '.join(factors)} only")
            magnitude = self._key("rope.scaling.attn_factor")
            return {"rope_type": "longrope", "long_factor": factors[_FACTORS[0]], "short_factor": factors[_FACTORS[1]],
                    "original_max_position_embeddings": original,
                    **({} if magnitude is None else {"attention_factor": self._decimal(magnitude)})}  # fmt: skip
        kind = self._key("rope.scaling.type") or ("linear" if self._key("rope.scale_linear") else "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise UnsupportedError(f"rope scaling {kind!r} is not supported", code="ARK-E311")
        factor = self._decimal(self._key("rope.scaling.factor") or self._key("rope.scale_linear"))
        return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}

    def _factors(self, name: str) -> list[float]:
        tensor = self._tensors[name]
        if tensor.type != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 1024:
            raise unsound(self.path, f"{name} is not a short list of float32")
        return [self._decimal(float(value)) for value in GgufWeight(tensor).rows(0, tensor.shape[0]).weight]

    def _weights(self, config: ModelConfig) -> Mapping[str, StoredWeight]:
        weights: dict[str, StoredWeight] = {}
        unknown = []
        for name, tensor in self._tensors.items():
            found = _BLOCK.fullmatch(name)
            if name in _TOP:
                weights[_TOP[name]] = self._weight(tensor)
            elif found is not None and found[2] in _LAYER:
                heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(found[2], 0)
                permuted = heads if self._architecture in _PERMUTED else 0
                weights[f"model.layers.{found[1]}.{_LAYER[found[2]]}.{found[3]}"] = self._weight(tensor, permuted)
            elif name not in _FACTORS:
                unknown.append(name)
        if unknown:
            raise UserError(
                f"{self.path.name} has {len(unknown)} tensors that mean nothing here",
                facts={"first": unknown[0]},
                hint="give the checkpoint in safetensors",
                code="ARK-E126",
            )
        return weights

    def _weight(self, tensor: GgufTensor, heads: int = 0) -> StoredWeight:
        if len(tensor.shape) > 2:
            raise unsound(self.path, f"a weight has the shape {list(tensor.shape)}")
        if len(tensor.shape) == 1 and tensor.type in KEPT:
            raise unsound(self.path, f"a vector is stored as {tensor.type}, which is for matrices")
        if heads and tensor.shape[0] % (2 * heads):
            raise unsound(self.path, f"{tensor.shape[0]} rows of q or k are not those of {heads} heads")
        return GgufWeight(tensor, heads)

    def _notes(self) -> list[str]:
        notes = []
        kinds = sorted(
            {weight.layout.scheme for weight in self.weights.values() if weight.layout.scheme}
            - {weight.layout.scheme for weight in self.weights.values() if weight.layout.quantised}
        )
        if kinds:
            notes.append(f"weights in {', '.join(kinds)} are multiplied out and stored anew")
        if self._architecture == "minicpm":
            notes.append("a GGUF file does not say whether the model has sparse attention: built dense")
        return notes

    def _tokenizer_settings(self) -> bytes:
        """Return a tokenizer_config.json of what the metadata say."""
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        settings: dict[str, Any] = {}
        for name, key in _SPECIAL.items():
            index = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
            if isinstance(tokens, list) and isinstance(index, int) and 0 <= index < len(tokens):
                settings[name] = tokens[index]
        adds = self._metadata.get("tokenizer.ggml.add_bos_token")
        settings["add_bos_token"] = adds if isinstance(adds, bool) else vocabulary.adds_bos(self._metadata)
        template = self._metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            settings["chat_template"] = template
        return json.dumps(settings).encode()
