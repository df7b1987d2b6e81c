"""Random-weight checkpoints in the real file formats, small enough to build in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

from arkinfer import models
from arkinfer.checkpoint.stored import Layout, Parts, StoredWeight
from arkinfer.config import ModelConfig
from arkinfer.quant.packed import Packed, group_extent, pack_crumbs, pack_nibbles

SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 32, "topk": 3, "dense_len": 96}
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 192,
    "vocab_size": 400,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MUP = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SHAPE, "architectures": ["LlamaForCausalLM"], "attention_bias": True},
    "qwen3": {**SHAPE, "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "minicpm": {**SHAPE, **MUP, "architectures": ["MiniCPMForCausalLM"], "sparse_config": SPARSE},
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a byte-level BPE tokenizer with ``vocabulary`` entries."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the ferry left the harbour when the light on the water was still more grey than gold"] * 4
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"add_bos_token": True, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_checkpoint(folder: Path, raw: dict[str, Any], seed: int = 0, ternary: int = 0) -> Path:
    """Write a checkpoint of ``raw``'s shape; ``ternary`` > 0 makes the linears ternary in groups of that size."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    config = ModelConfig.from_json(raw)
    torch.manual_seed(seed)
    state = {}
    for name, tensor in models.create(config).state_dict().items():
        if config.tie_embeddings and name == "lm_head.weight":
            continue
        value = torch.randn_like(tensor)
        if name.endswith("norm.weight"):
            value = 1 + 0.1 * value
        elif "embed" in name:
            value = value * 0.3
        elif value.ndim == 2:
            value = value / tensor.shape[1] ** 0.5
            if ternary and "lm_head" not in name:
                grouped = value.reshape(value.shape[0], -1, ternary)
                scale = grouped.abs().mean(dim=2, keepdim=True)
                value = (torch.round(grouped / scale).clamp(-1, 1) * scale.bfloat16().float()).reshape(value.shape)
        else:
            value = value * 0.1
        state[name] = value.bfloat16().contiguous()
    save_file(state, folder / "model.safetensors")
    write_tokenizer(folder, config.vocab_size)
    return folder


class InMemory(StoredWeight):
    """A float tensor that stands for a weight of a checkpoint."""

    def __init__(self, tensor: torch.Tensor) -> None:
        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        self._bits = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        self.layout = Layout("dense", tuple(tensor.shape), names[tensor.dtype])

    @property
    def nbytes(self) -> int:
        return self._bits.nbytes

    def rows(self, start: int, stop: int) -> Parts:
        return Parts(self._bits[start:stop])


class PackedInMemory(StoredWeight):
    """A quantised matrix that stands for a weight of a checkpoint."""

    def __init__(self, packed: Packed, order: str = "") -> None:
        self.packed = packed
        zeros = packed.zeros is not None
        self.layout = Layout(packed.format, packed.shape, "F16", packed.group, zeros, order, "test", 0)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def rows(self, start: int, stop: int) -> Parts:
        packed = self.packed
        parts = (packed.weight, packed.scales, packed.zeros)
        return Parts(*(None if part is None else part[start:stop].numpy() for part in parts))  # type: ignore[arg-type]

    def order(self) -> np.ndarray | None:
        return None if self.packed.order is None else self.packed.order.numpy()


def quantised(
    dense: torch.Tensor, format: str, group: int, zeros: bool = False, order: torch.Tensor | None = None
) -> Packed:
    """Round ``dense`` (N, K) to the nearest codes, over the range of each group, with columns in ``order`` (K,)."""
    rows, width = dense.shape
    values = dense.float() if order is None else dense.float()[:, order.long()]
    grouped = values.reshape(rows, -1, group_extent(group, width))
    limit = {"int8": 255, "int4": 15, "int2": 3}[format]
    low, high = grouped.amin(2), grouped.amax(2)
    if not zeros:
        high = torch.maximum(high, -low)
        low = -high * (limit + 1) / (limit - 1)
    scales = ((high - low) / limit).half()
    zero = torch.round(-low / scales).clamp(0, limit)
    codes = torch.round(grouped / scales[:, :, None] + zero[:, :, None]).clamp(0, limit).reshape(rows, width)
    pack = {"int8": lambda c: (c.int() - 128).to(torch.int8), "int4": pack_nibbles, "int2": pack_crumbs}[format]
    weight = pack(codes if format == "int8" else codes.to(torch.uint8))
    return Packed(format, group, (rows, width), weight, scales, zero.to(torch.uint8) if zeros else None, order)
