"""Operators that passes create by fusing aten nodes; models never call them directly."""

from __future__ import annotations

import torch

from arkinfer.quant.packed import PER_BYTE, Packed, dequantise


@torch.library.custom_op("arkinfer::add_rms_norm", mutates_args=())
def add_rms_norm(
    residual: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, scale: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``sum = residual + scale * delta`` and RMSNorm(sum) * weight.

    residual, delta (tokens, hidden); weight (hidden,). The two outputs have the shape and dtype of ``residual``.
    """
    total = residual + delta * scale
    return total, torch.nn.functional.rms_norm(total, (total.shape[-1],), weight.to(total.dtype), eps)


@add_rms_norm.register_fake
def _(
    residual: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, scale: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(residual), torch.empty_like(residual)


@torch.library.custom_op("arkinfer::swiglu", mutates_args=())
def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` (tokens, width) of ``gate_up`` (tokens, 2 * width), gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@swiglu.register_fake
def _(gate_up: torch.Tensor) -> torch.Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("arkinfer::embedding", mutates_args=())
def embedding(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    format: str,
    group: int,
    scale: float,
) -> torch.Tensor:
    """Return ``scale`` times the rows ``tokens`` (n,) of a packed table, float32 (n, hidden); see ops.linear."""
    rows = weight[tokens]
    width = rows.shape[1] * PER_BYTE.get(format, 1)
    picked = [None if part is None else part[tokens] for part in (scales, zeros)]
    return dequantise(Packed(format, group, (rows.shape[0], width), rows, *picked)) * scale


@embedding.register_fake
def _(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    format: str,
    group: int,
    scale: float,
) -> torch.Tensor:
    width = weight.shape[1] * PER_BYTE.get(format, 1)
    return weight.new_empty(tokens.shape[0], width, dtype=torch.float32)
