"""The graph's weights, packed from a checkpoint one at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from arkinfer.checkpoint import Checkpoint
from arkinfer.errors import UserError
from arkinfer.graph import Weight
from arkinfer.quant import integer, ternary
from arkinfer.quant.packed import Packed, concatenate, dequantise, read, with_group

ROWS = 2048  # rows read and packed at a time: bounds the float32 copies that quantising makes


class CheckpointWeights:
    """Packs weights on demand and keeps the recent ones, so that export and verification pack a small model once."""

    def __init__(self, checkpoint: Checkpoint, keep_bytes: int = 1 << 30) -> None:
        self._checkpoint = checkpoint
        self._keep_bytes = keep_bytes
        self._kept: OrderedDict[Weight, Packed] = OrderedDict()

    def packed(self, weight: Weight) -> Packed:
        """Return ``weight`` in the canonical form of its format; matrices are (N, K), vectors dense (N,)."""
        key = replace(weight, part="weight")
        if key not in self._kept:
            self._kept[key] = self._pack(key)
            while len(self._kept) > 1 and sum(item.nbytes for item in self._kept.values()) > self._keep_bytes:
                self._kept.popitem(last=False)
        return self._kept[key]

    def _pack(self, weight: Weight) -> Packed:
        parts = [self._checkpoint.weight(source) for source in weight.sources]
        work = [
            (source, part, start, min(start + ROWS, part.layout.shape[0]))
            for source, part in zip(weight.sources, parts, strict=True)
            for start in range(0, part.layout.shape[0], ROWS)
        ]
        convert = _converter(weight)
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            pieces = list(pool.map(lambda item: convert(read(*item[1:]), item[0]), work))
        return concatenate(pieces)


def _converter(weight: Weight) -> Callable[[Packed, str], Packed]:
    """Return the function that brings rows as stored, of the named source, into the form that ``weight`` has."""

    def convert(rows: Packed, name: str) -> Packed:
        if rows.format != "dense" and weight.format == rows.format:
            return with_group(rows, weight.group)
        dense = rows.weight if rows.format == "dense" else dequantise(rows)
        if weight.format == "dense":
            converted = _converted(dense, weight.dtype, name)
            return Packed("dense", 0, (rows.shape[0], converted.shape[-1]), converted)
        if weight.format == "ternary":
            return _ternary(dense, weight.group, name)
        return integer.quantise(dense, 8 if weight.format == "int8" else 4, weight.group)

    return convert


def _ternary(dense: torch.Tensor, group: int, name: str) -> Packed:
    try:
        return ternary.pack(dense, group)
    except ValueError as error:
        raise UserError(
            f"{name} is ternary in some rows and not in others",
            facts={"reason": error},
            hint=f"--rule '{name}=int8' stores this one otherwise",
            code="ARK-E170",
        ) from error


def _converted(tensor: torch.Tensor, dtype: torch.dtype | None, name: str) -> torch.Tensor:
    """Return ``tensor`` as ``dtype``; raises UserError where that would turn large weights into infinities."""
    if dtype is None or tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if not bool(torch.isfinite(converted).all()):
        raise UserError(
            f"{name} holds values that float16 cannot",
            facts={"largest": float(tensor.abs().max())},
            hint="--weights fp32 keeps the checkpoint's own values",
            code="ARK-E128",
        )
    return converted
