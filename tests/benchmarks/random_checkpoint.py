"""Write a random-weight MiniCPM checkpoint of the 0.5B or the 8B shape: for measuring, where only the shape counts.

python tests/benchmarks/random_checkpoint.py OUT [--shape 0.5b|8b] [--layers N] [--ternary]

0.9 GB on disk for 0.5b, 16.4 GB for 8b, written a few rows at a time in 0.6 GB of memory; the same arguments
write the same bytes. ``--layers`` shortens the model. ``--ternary`` makes the layers' linear weights {-s, 0, +s} per
128 inputs, as BitCPM4 is released.

Rows are cut at random places from one pool of normal numbers per kind of weight: as fast as the disk, and no two alike.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import write_tokenizer

from arkinfer import models
from arkinfer.artifact import tensors
from arkinfer.config import ModelConfig

MINICPM = {
    "architectures": ["MiniCPMForCausalLM"],
    "vocab_size": 73448,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65536,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # MiniCPM4.1's own values.
    "sparse_config": {
        "kernel_size": 32,
        "kernel_stride": 16,
        "init_blocks": 1,
        "block_size": 64,
        "window_size": 2048,
        "topk": 64,
        "use_nope": False,
        "dense_len": 8192,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 4096,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "intermediate_size": 16384,
        "tie_word_embeddings": False,
    },
}
POOL = 1 << 24  # numbers that the rows of one kind of weight are cut from
BLOCK = 1 << 24  # bytes written at a time
SHARD = 4 << 30  # bytes of tensors in a file
GROUP = 128  # inputs that share a ternary scale


class Rows:
    """Random rows in bfloat16, as its uint16 bits."""

    def __init__(self, ternary: bool) -> None:
        self._ternary = ternary
        self._pools: dict[tuple[str, int], np.ndarray] = {}

    def blocks(self, name: str, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
        """Yield the tensor ``name`` some rows at a time."""
        generator = np.random.default_rng(seed)
        if len(shape) == 1:
            yield _bits(1 + 0.1 * generator.standard_normal(shape, np.float32))
            return
        rows, width = shape
        kind = "table" if "embed" in name else "ternary" if self._ternary and "lm_head" not in name else "linear"
        if (kind, width) not in self._pools:
            self._pools[kind, width] = _pool(kind, width)
        pool = self._pools[kind, width]
        windows = np.lib.stride_tricks.sliding_window_view(pool, width)[:: GROUP if kind == "ternary" else 1]
        step = max(1, BLOCK // (2 * width))
        for start in range(0, rows, step):
            yield windows[generator.integers(0, len(windows), min(step, rows - start))]


def _pool(kind: str, width: int) -> np.ndarray:
    values = np.random.default_rng(width).standard_normal(POOL, np.float32)
    values *= np.float32(0.3 if kind == "table" else width**-0.5)
    if kind == "ternary":
        grouped = values.reshape(-1, GROUP)
        scale = np.abs(grouped).mean(axis=1, keepdims=True)
        values = (np.clip(np.rint(grouped / scale), -1, 1) * scale).reshape(-1)
    return _bits(values)


def _bits(values: np.ndarray) -> np.ndarray:
    bits: np.ndarray = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    return bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--ternary", action="store_true")
    options = parser.parse_args()
    raw = {**MINICPM, **SHAPES[options.shape]}
    raw["num_hidden_layers"] = options.layers or raw["num_hidden_layers"]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    config = ModelConfig.from_json(raw)
    write_tokenizer(options.out, config.vocab_size)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in models.create(config).state_dict().items()}
    if config.tie_embeddings:
        del shapes["lm_head.weight"]
    write(options.out, shapes, Rows(options.ternary))


def write(folder: Path, shapes: dict[str, tuple[int, ...]], rows: Rows) -> None:
    """Write the tensors to shards with an index, as transformers does."""
    shards: list[dict[str, tensors.TensorSpec]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        spec = tensors.TensorSpec("BF16", shape)
        if shards[-1] and filled + spec.nbytes > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    seeds = {name: seed for seed, name in enumerate(shapes)}
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        pieces = ((name, rows.blocks(name, spec.shape, seeds[name])) for name, spec in shard.items())
        tensors.write(folder / file, shard, pieces)
        weight_map.update(dict.fromkeys(shard, file))
        print(file, file=sys.stderr)
    index = {"metadata": {"total_size": sum(spec.nbytes for shard in shards for spec in shard.values())}}
    text = json.dumps({**index, "weight_map": weight_map}, indent=1) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
