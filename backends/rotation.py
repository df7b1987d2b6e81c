"""Tables of cosines and sines for rotary embedding, as every implementation of these models computes them."""

from __future__ import annotations

import numpy as np


def tables(frequencies: np.ndarray, magnitude: float, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines (count, head_dim / 2) float32 for positions start, start + 1, ...

    ``frequencies`` (head_dim / 2,) float32 in radians per position. The angle is rounded to float32 before its cosine
    is taken; both are multiplied by ``magnitude``.
    """
    positions = np.arange(start, start + count, dtype=np.float32)
    angles = positions[:, None] * frequencies  # (count, head_dim / 2)
    return np.cos(angles) * np.float32(magnitude), np.sin(angles) * np.float32(magnitude)
