"""Write a random-weight MiniCPM checkpoint of the 0.5B shape: for measuring, where only the shape counts.

python tests/benchmarks/random_checkpoint.py OUT [--ternary]

About 1 GB on disk and 5 GB of memory while it is written; the same seed writes the same tensors. ``--ternary`` rounds
the layers' linear weights to {-s, 0, +s} per 128 inputs, as BitCPM4 is released.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import write_checkpoint

SHAPE = {
    "architectures": ["MiniCPMForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 4096,
    "vocab_size": 73448,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65536,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ternary", action="store_true")
    options = parser.parse_args()
    write_checkpoint(options.out, SHAPE, ternary=128 if options.ternary else 0)


if __name__ == "__main__":
    main()
