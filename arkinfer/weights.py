"""The graph's weights, packed from a checkpoint one at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from arkinfer.checkpoint import Checkpoint
from arkinfer.errors import UserError
from arkinfer.graph import Weight
from arkinfer.quant import integer, ternary
from arkinfer.quant.packed import Packed

ROWS = 2048  # rows packed at a time: bounds the float32 copies that quantising makes


class CheckpointWeights:
    """Packs weights on demand and keeps the recent ones, so that export and verification pack a small model once."""

    def __init__(self, checkpoint: Checkpoint, keep_bytes: int = 1 << 30) -> None:
        self._checkpoint = checkpoint
        self._keep_bytes = keep_bytes
        self._kept: OrderedDict[tuple[str, str, int, torch.dtype | None], Packed] = OrderedDict()

    def packed(self, weight: Weight) -> Packed:
        """Return ``weight`` in the canonical form of its format; matrices are (N, K), vectors dense (N,)."""
        key = (weight.name, weight.format, weight.group, weight.dtype)
        if key not in self._kept:
            self._kept[key] = self._pack(weight)
            while len(self._kept) > 1 and sum(item.nbytes for item in self._kept.values()) > self._keep_bytes:
                self._kept.popitem(last=False)
        return self._kept[key]

    def _pack(self, weight: Weight) -> Packed:
        parts = [self._checkpoint.tensor(source) for source in weight.sources]
        rows = sum(part.shape[0] for part in parts)
        if (rows, *parts[0].shape[1:]) != weight.shape:
            shapes = ", ".join(
                f"{source} {list(part.shape)}" for source, part in zip(weight.sources, parts, strict=True)
            )
            raise UserError(
                "a weight does not have the shape that config.json implies",
                facts={"expected": list(weight.shape), "found": shapes},
                hint="use the config.json that belongs to these weights",
                code="ARK-E125",
            )
        if not all(part.is_floating_point() for part in parts):
            raise UserError(
                "a weight is stored as integers",
                facts={"tensor": weight.sources[0], "dtype": parts[0].dtype},
                hint="quantised checkpoints cannot be read yet; give the original one",
                code="ARK-E126",
            )
        if weight.format == "dense":
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            joined = _converted(joined, weight.dtype, weight.sources[0])
            return Packed("dense", 0, (rows, joined.shape[-1]), joined)
        quantise: Callable[[torch.Tensor], Packed]
        if weight.format == "ternary":
            quantise = lambda tensor: ternary.pack(tensor, weight.group)  # noqa: E731
        else:
            bits = 8 if weight.format == "int8" else 4
            quantise = lambda tensor: integer.quantise(tensor, bits, weight.group)  # noqa: E731
        slices = [part[start : start + ROWS] for part in parts for start in range(0, part.shape[0], ROWS)]
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            pieces = list(pool.map(quantise, slices))
        scales = torch.cat([piece.scales for piece in pieces if piece.scales is not None])
        return Packed(
            weight.format, weight.group, (rows, weight.shape[1]), torch.cat([piece.weight for piece in pieces]), scales
        )


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


def dtypes(checkpoint: Checkpoint) -> Mapping[str, torch.dtype]:
    """Return the stored dtype of every tensor of the checkpoint."""
    from arkinfer.checkpoint import DTYPES

    return {name: DTYPES[entry.dtype] for name, entry in checkpoint.entries.items()}
