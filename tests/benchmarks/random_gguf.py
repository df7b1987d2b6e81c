"""Write a TQ2_0 GGUF of a checkpoint's shape with random blocks, for timing llama.cpp beside a ternary artifact.

    PEER/bin/python tests/benchmarks/random_gguf.py m8t m8-TQ2_0.gguf

Types are those that llama.cpp's own TQ2_0 quantisation chooses: TQ2_0 for the layers, Q6_K for the output head, Q4_K
for the embedding table. The blocks are random and sound (finite scales): text is noise, speed is that of the shape.
Needs the packages gguf and numpy; the block layouts are those of ggml's ggml-common.h.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np

VALUES = 256  # in a block of any of these types
LAYER = {
    "attn_q": ("heads", "hidden"),
    "attn_k": ("kv", "hidden"),
    "attn_v": ("kv", "hidden"),
    "attn_output": ("hidden", "heads"),
    "ffn_gate": ("intermediate", "hidden"),
    "ffn_up": ("intermediate", "hidden"),
    "ffn_down": ("hidden", "intermediate"),
}
Type = gguf.GGMLQuantizationType


def blocks(kind: gguf.GGMLQuantizationType, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return ``count`` random blocks (count, bytes)."""
    scale = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
    if kind == Type.TQ2_0:  # qs 64, d 2
        trits = generator.integers(0, 3, (count, 4, 64), np.uint8)
        codes = trits[:, 0] | trits[:, 1] << 2 | trits[:, 2] << 4 | trits[:, 3] << 6
        return np.concatenate([codes, np.broadcast_to(scale, (count, 2))], axis=1)
    if kind == Type.Q6_K:  # ql 128, qh 64, scales 16, d 2
        return np.concatenate(
            [generator.integers(0, 256, (count, 208), np.uint8), np.broadcast_to(scale, (count, 2))], axis=1
        )
    return np.concatenate(  # Q4_K: d 2, dmin 2, scales 12, qs 128
        [np.broadcast_to(scale, (count, 2)), np.broadcast_to(scale, (count, 2)),
         generator.integers(0, 256, (count, 140), np.uint8)], axis=1,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    config = json.loads((options.checkpoint / "config.json").read_text())
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    head_dim, kv_heads, vocabulary = hidden // heads, config["num_key_value_heads"], config["vocab_size"]
    sizes = {
        "hidden": hidden,
        "heads": heads * head_dim,
        "kv": kv_heads * head_dim,
        "intermediate": config["intermediate_size"],
    }
    writer = gguf.GGUFWriter(str(options.out), "minicpm")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_TQ2_0)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    writer.add_embedding_scale(float(config["scale_emb"]))
    writer.add_residual_scale(config["scale_depth"] / layers**0.5)
    writer.add_logit_scale(hidden / config["dim_model_base"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"t{index}" for index in range(vocabulary)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    tensors: list[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]] = [
        ("token_embd.weight", (vocabulary, hidden), Type.Q4_K),
        ("output.weight", (vocabulary, hidden), Type.Q6_K),
        ("output_norm.weight", (hidden,), Type.F32),
    ]
    for layer in range(layers):
        tensors += [(f"blk.{layer}.{name}.weight", (hidden,), Type.F32) for name in ("attn_norm", "ffn_norm")]
        tensors += [
            (f"blk.{layer}.{name}.weight", (sizes[rows], sizes[width]), Type.TQ2_0)
            for name, (rows, width) in LAYER.items()
        ]
    generator = np.random.default_rng(0)
    pools = {kind: blocks(kind, 1 << 16, generator) for kind in (Type.TQ2_0, Type.Q6_K, Type.Q4_K)}
    for name, shape, kind in tensors:
        count = int(np.prod(shape))
        size = 4 * count if kind == Type.F32 else count // VALUES * pools[kind].shape[1]
        # The shape of a quantised tensor is given in bytes along its last axis.
        stored = shape if kind == Type.F32 else (shape[0], size // shape[0])
        dtype = np.dtype(np.float32) if kind == Type.F32 else np.dtype(np.uint8)
        writer.add_tensor_info(name, list(stored), dtype, size, None if kind == Type.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, kind in tensors:
        count = int(np.prod(shape))
        if kind == Type.F32:
            writer.write_tensor_data(np.ones(shape, np.float32))
            continue
        chosen = generator.integers(0, len(pools[kind]), count // VALUES)
        writer.write_tensor_data(pools[kind][chosen].reshape(shape[0], -1))
    writer.close()


if __name__ == "__main__":
    main()
