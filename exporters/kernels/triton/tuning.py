"""Tile sizes by arch: the one place to write down what a measurement on a device finds.

All of these are guesses: no device has run them. They follow from registers, shared memory and the instructions in the
compiled code.
"""

from __future__ import annotations

from collections.abc import Mapping

# linear_gemv: rows of a tile by the bits of a code (16: floats). More rows share the work on x, which pays where a byte
# of weights leaves few instructions: at full bandwidth a warp has 0.4 for each byte on Orin, 0.28 on H100, 1.3 on RTX
# 4090, and 2-bit codes take 0.45 in tiles of four rows, 0.38 in tiles of eight (tests/benchmarks/kernels_cuda.py).
GEMV: Mapping[str, Mapping[int, int]] = {
    "sm_87": {2: 8, 4: 8, 8: 4, 16: 4},
    "sm_89": {2: 4, 4: 4, 8: 4, 16: 4},
    "sm_90": {2: 8, 4: 8, 8: 4, 16: 4},
}

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
