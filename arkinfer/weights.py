"""The graph's weights, packed from a checkpoint one at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from arkinfer.checkpoint import Checkpoint
from arkinfer.errors import UserError
from arkinfer.graph import Weight
from arkinfer.quant import integer, ternary
from arkinfer.quant.packed import Packed, concatenate, dequantise, read, with_group

ROWS = 1024  # rows read and packed at a time


class CheckpointWeights:
    """Packs weights on demand, some rows at a time: nothing is kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def rows(self, weight: Weight, start: int, stop: int) -> Packed:
        """Return rows ``start`` to ``stop`` of ``weight`` in the canonical form of its format.

        Of a vector (N,) these are elements. Raises UserError for values that the format cannot hold.
        """
        convert = _converter(weight)
        pieces, before = [], 0
        for source in weight.sources:
            stored = self._checkpoint.weight(source)
            count = stored.layout.shape[0]
            first, last = max(start - before, 0), min(stop - before, count)
            if first < last:
                pieces.append(convert(read(stored, first, last), source))
            before += count
        return concatenate(pieces)

    def packed(self, weight: Weight) -> Packed:
        """Return the whole of ``weight``; matrices are (N, K), vectors dense (N,)."""
        count = weight.shape[0]
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            starts = range(0, count, ROWS)
            pieces = list(pool.map(lambda start: self.rows(weight, start, min(start + ROWS, count)), starts))
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
        if not bool(torch.isfinite(dense).all()):  # a group would lose its scale, and nothing later would tell
            raise UserError(
                f"{name} holds values that are not finite numbers",
                hint="fetch the file again: its weights are damaged",
                code="ARK-E128",
            )
        if weight.format == "ternary":
            return _ternary(dense, weight.group, name)
        largest, steps = float(dense.abs().max()), 127 if weight.format == "int8" else 8
        if largest / steps > torch.finfo(torch.float16).max:
            raise UserError(
                f"{name} holds values too large for float16 scales",
                facts={"largest": largest},
                hint="--weights fp32 keeps the checkpoint's own values",
                code="ARK-E128",
            )
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
            f"{name} holds values that {str(dtype).removeprefix('torch.')} cannot",
            facts={"largest": float(tensor.abs().max())},
            hint="--weights fp32 keeps the checkpoint's own values",
            code="ARK-E128",
        )
    return converted
