"""Rotary position embedding, half-split (NeoX) pairs, computed in float32 whatever the activations are."""

from __future__ import annotations

import torch

from arkinfer.ops import differentiates


def reference(
    x: torch.Tensor, positions: torch.Tensor, inverse_frequencies: torch.Tensor, magnitude: float
) -> torch.Tensor:
    """Rotate pairs (i, i + head_dim / 2) of ``x`` (tokens, heads, head_dim) by position * inverse_frequencies[i]."""
    angles = positions.float()[:, None] * inverse_frequencies.float()  # (tokens, head_dim / 2), rounded to fp32
    cos, sin = (angles.cos() * magnitude)[:, None], (angles.sin() * magnitude)[:, None]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@torch.library.custom_op("arkinfer::rope", mutates_args=())
def _operator(
    x: torch.Tensor, positions: torch.Tensor, inverse_frequencies: torch.Tensor, magnitude: float
) -> torch.Tensor:
    return reference(x, positions, inverse_frequencies, magnitude)


@_operator.register_fake
def _(x: torch.Tensor, positions: torch.Tensor, inverse_frequencies: torch.Tensor, magnitude: float) -> torch.Tensor:
    return torch.empty_like(x)


def rope(x: torch.Tensor, positions: torch.Tensor, inverse_frequencies: torch.Tensor, magnitude: float) -> torch.Tensor:
    """Return ``x`` (tokens, heads, head_dim) rotated to its absolute ``positions`` (tokens,), in the dtype of ``x``.

    inverse_frequencies (head_dim / 2,) float32 and magnitude come from RopeConfig.
    """
    function = reference if differentiates(x) else _operator
    return function(x, positions, inverse_frequencies, magnitude)


def cost(tokens: int, heads: int, head_dim: int, itemsize: int = 4) -> tuple[int, int]:
    """Return (bytes read and written, floating-point operations)."""
    elements = tokens * heads * head_dim
    return 2 * elements * itemsize, 3 * elements
