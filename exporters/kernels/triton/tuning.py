"""Tile sizes by arch: the one place to write down what a measurement on a device finds.

All of these are guesses: no device has run them. They follow from registers, shared memory and the instructions that
were read in the compiled code.
"""

from __future__ import annotations

from collections.abc import Mapping

# linear_gemm: tokens and outputs of a tile, warps.
GEMM: Mapping[str, tuple[int, int, int]] = {
    "sm_87": (64, 128, 4),
    "sm_89": (64, 128, 4),
    "sm_90": (128, 128, 8),
}

# attention_prefill: rows of a tile (tokens times query heads of a kv head), warps.
PREFILL: Mapping[str, tuple[int, int]] = {
    "sm_87": (64, 4),
    "sm_89": (64, 4),
    "sm_90": (128, 8),
}
