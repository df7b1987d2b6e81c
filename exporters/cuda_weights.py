"""The weight file of the CUDA exporter: canonical weights repacked as the kernels read them, and read back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from arkinfer.artifact import tensors
from arkinfer.artifact.journal import Journal
from arkinfer.artifact.plan import Buffer, Plan
from arkinfer.exporters.base import Progress
from arkinfer.exporters.kernels.triton import layout
from arkinfer.exporters.stored import Dtypes, Origins, array_of
from arkinfer.graph import ModelGraph, Weight
from arkinfer.quant.packed import Packed, concatenate
from arkinfer.reference import RowSource

ROWS = 4096  # rows of a weight that are repacked at a time
PARTS = ("weight", "scales", "zeros", "order")
DTYPES = {
    "uint8": "U8", "int8": "I8", "int32": "I32", "float16": "F16", "bfloat16": "BF16", "float32": "F32",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """What a parameter of the plan is made of: a part of a weight's layout, or a "vector" in float32."""

    weight: Weight
    part: str


def write(
    plan: Plan,
    stored: Mapping[str, Stored],
    weights: RowSource,
    file: Path,
    journal: Journal | None,
    progress: Progress,
) -> dict[str, str]:
    """Write the parameters of ``plan`` to ``file``, going on where ``journal`` ends.

    Returns the digest of the canonical form of each weight, by its first parameter; ``ArtifactWeights`` compares it
    with what it reads back. ``progress`` counts bytes of the file.
    """
    parameters = plan.of_kind("parameter")
    shapes = {buffer.name: tensors.TensorSpec(DTYPES[buffer.dtype], buffer.extents({})) for buffer in parameters}
    total, done = sum(spec.nbytes for spec in shapes.values()), 0
    origins: dict[str, str] = {}
    with tensors.TensorWriter(file, shapes, journal) as writer:
        for _, group in groupby(parameters, key=lambda buffer: stored[buffer.name].weight.name):
            unit = list(group)
            name = unit[0].name
            if name in writer.finished:
                origins[name] = writer.finished[name]
                done += sum(shapes[buffer.name].nbytes for buffer in unit)
                continue
            digest = hashlib.sha256()
            for buffer, pieces in _parameters(unit, stored[name], weights, digest):
                for piece in writer.pieces(buffer.name, pieces):
                    done += piece
                    progress("weights", done, total)
            origins[name] = digest.hexdigest()
            writer.finish(name, origins[name])
    progress("weights", total, total)
    return origins


def _parameters(
    unit: list[Buffer], first: Stored, weights: RowSource, digest: hashlib._Hash
) -> Iterator[tuple[Buffer, Iterable[np.ndarray]]]:
    """Yield each parameter of one weight with its data; the small ones are kept while the first is made."""
    weight = first.weight
    if first.part == "vector":
        vector = weights.rows(weight, 0, weight.shape[0]).weight.float().reshape(-1)
        digest.update(array_of(vector).data)
        yield unit[0], [array_of(vector)]
        return
    later: dict[str, list[np.ndarray]] = {}

    def codes() -> Iterator[np.ndarray]:
        for start in range(0, weight.shape[0], ROWS):
            rows = weights.rows(weight, start, min(start + ROWS, weight.shape[0]))
            rows = rows if start == 0 else replace(rows, order=None)
            _add(digest, rows)
            for part, tensor in layout.pack(rows).items():
                if part == "weight":
                    yield array_of(tensor)
                else:
                    later.setdefault(f"{weight.name}:{part}", []).append(array_of(tensor))

    yield unit[0], codes()
    for buffer in unit[1:]:
        yield buffer, later[buffer.name]


def _add(digest: hashlib._Hash, rows: Packed) -> None:
    for part in PARTS:
        tensor = getattr(rows, part)
        if tensor is not None:
            digest.update(array_of(tensor).data)


class ArtifactWeights:
    """Canonical weights read back from an artifact's weight file.

    ``origins``, if given, is what ``write`` returned: each weight is compared with it when it is first read.
    """

    def __init__(self, model: ModelGraph, file: Path, origins: Mapping[str, str] | None = None) -> None:
        self._arrays = tensors.load(file)
        self._origins, self._dtypes = Origins(origins), Dtypes(model)

    def packed(self, weight: Weight) -> Packed:
        """Return ``weight``. Raises ParityError where it is not what was packed."""
        digest = hashlib.sha256()
        vector = self._arrays.get(f"{weight.name}:vector")
        if vector is not None:
            digest.update(vector.data)
            self._origins.check(f"{weight.name}:vector", weight, lambda: digest)
            return Packed("dense", 0, (vector.shape[0], vector.shape[0]), torch.from_numpy(vector))
        parts = {part: tensor for part in PARTS if (tensor := self._part(weight, part)) is not None}
        order = parts.pop("order", None)
        pieces = []
        for start in range(0, weight.shape[0], ROWS):
            rows = {part: tensor[start : start + ROWS] for part, tensor in parts.items()}
            shape = (rows["weight"].shape[0], weight.shape[1])
            if order is not None and start == 0:
                rows["order"] = order
            pieces.append(layout.canonical(weight.format, weight.group, shape, **rows))
            _add(digest, pieces[-1])
        self._origins.check(f"{weight.name}:weight", weight, lambda: digest)
        return concatenate(pieces)

    def _part(self, weight: Weight, part: str) -> torch.Tensor | None:
        array = self._arrays.get(f"{weight.name}:{part}")
        if array is None:
            return None
        return self._dtypes.tensor(weight, part, array)
