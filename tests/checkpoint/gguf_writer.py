"""Write checkpoints as GGUF with the gguf package's own writer, as llama.cpp's convert_hf_to_gguf.py does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from arkinfer.checkpoint import open_checkpoint
from arkinfer.quant.packed import dense

Q = gguf.GGMLQuantizationType


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py, word for word."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def floats(folder: Path) -> dict[str, np.ndarray]:
    """Return the weights of a checkpoint folder in float32."""
    checkpoint = open_checkpoint(folder)
    return {name: dense(weight).to(torch.float32).numpy() for name, weight in checkpoint.weights.items()}


def write_gguf(
    folder: Path,
    file: Path,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    default: gguf.GGMLQuantizationType = Q.F32,
    vocabulary: bool = True,
) -> dict[str, np.ndarray]:
    """Convert the checkpoint in ``folder``; matrices whose GGUF name contains a key of ``kinds`` get that type.

    Returns what gguf.quants.dequantize makes of what was written, by transformers' names and in its row order.
    """
    raw = json.loads((folder / "config.json").read_text())
    architecture = {"LlamaForCausalLM": "llama", "MiniCPMForCausalLM": "minicpm", "Qwen3ForCausalLM": "qwen3"}[
        raw["architectures"][0]
    ]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    head_dim = raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(raw.get("rope_theta", 10000.0))
    writer.add_vocab_size(raw["vocab_size"])
    if architecture == "minicpm":
        writer.add_embedding_scale(float(raw["scale_emb"]))
        writer.add_residual_scale(raw["scale_depth"] / raw["num_hidden_layers"] ** 0.5)
        writer.add_logit_scale(raw["hidden_size"] / raw["dim_model_base"])
    if (scaling := raw.get("rope_scaling")) is not None:
        for name in ("long", "short"):
            factors = np.array(scaling[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    if vocabulary:
        add_vocabulary(writer, folder, raw)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], raw["num_hidden_layers"])
    read: dict[str, np.ndarray] = {}
    for name, values in floats(folder).items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        heads = {"q_proj": raw["num_attention_heads"], "k_proj": raw["num_key_value_heads"]}.get(name.split(".")[-2], 0)
        permuted = heads if architecture != "qwen3" else 0
        data = permute(values, permuted) if permuted else values
        kind = next((kind for part, kind in (kinds or {}).items() if part in found), default)
        if data.ndim == 1:
            kind = Q.F32
        packed = gguf.quants.quantize(data, kind)
        writer.add_tensor(found, packed, raw_dtype=kind)
        back = gguf.quants.dequantize(packed, kind).reshape(data.shape)
        if permuted:
            rows = permute(np.arange(len(back))[:, None], permuted)[:, 0]
            restored = np.empty_like(back)
            restored[rows] = back
            back = restored
        read[name] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, raw: Mapping[str, Any]) -> None:
    """Write the byte-level vocabulary of tests/checkpoints.py as the converter writes GPT-2's."""
    model = json.loads((folder / "tokenizer.json").read_text())
    ids = {**model["model"]["vocab"], **{token["content"]: token["id"] for token in model["added_tokens"]}}
    special = {token["id"] for token in model["added_tokens"]}
    tokens = [text for text, _ in sorted(ids.items(), key=lambda item: item[1])]
    missing = raw["vocab_size"] - len(tokens)
    types = [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for index in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"[PAD{index}]" for index in range(missing)])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * missing)
    writer.add_token_merges([" ".join(pair) for pair in model["model"]["merges"]])
    writer.add_bos_token_id(raw["bos_token_id"])
    writer.add_eos_token_id(raw["eos_token_id"])
    writer.add_add_bos_token(True)
    writer.add_chat_template(json.loads((folder / "tokenizer_config.json").read_text())["chat_template"])
