"""The weight file of an ONNX model: canonical weights laid out for its operators, streamed, and read back.

It is a safetensors file, so that it can be resumed and read like any other; the model refers to ranges of its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from arkinfer.artifact import tensors
from arkinfer.artifact.journal import Journal
from arkinfer.exporters import onnx_layout as layouts
from arkinfer.exporters.base import Progress
from arkinfer.exporters.onnx_outline import Layout
from arkinfer.exporters.stored import Dtypes, Origins, array_of
from arkinfer.exporters.weights import in_order, pool_of_threads
from arkinfer.graph import ModelGraph, Weight
from arkinfer.quant.packed import Packed, concatenate
from arkinfer.reference import RowSource

PIECE = 4 << 20  # numbers of a weight that a thread lays out at a time
LayoutOf = Callable[[Weight], Layout]


@dataclass(frozen=True)
class Stored:
    """A tensor of the file, and the part of a weight that it holds.

    "vector" is a norm or a bias in float32, "words" the codes of a table once more, where its rows are looked up.
    """

    name: str
    spec: tensors.TensorSpec
    weight: Weight
    part: str


@dataclass(frozen=True)
class Place:
    """Where in the file a tensor lies, in bytes."""

    offset: int
    length: int


def places(stored: Mapping[str, Stored]) -> dict[str, Place]:
    """Return where in the file each tensor will lie."""
    _, ends = tensors.header(_specs(stored))
    found = {}
    for name, item in stored.items():
        padded = -(-item.spec.nbytes // tensors.ALIGNMENT) * tensors.ALIGNMENT
        found[name] = Place(ends[name] - padded, item.spec.nbytes)
    return found


def write(
    stored: Mapping[str, Stored],
    layout_of: LayoutOf,
    weights: RowSource,
    file: Path,
    journal: Journal | None,
    progress: Progress,
) -> dict[str, str]:
    """Write the tensors of a model to ``file``, going on where ``journal`` ends.

    Returns the digest of the canonical form of each weight, by its first tensor; ``ArtifactWeights`` compares it with
    what it reads back. ``progress`` counts bytes of the file.
    """
    specs = _specs(stored)
    total, done = sum(spec.nbytes for spec in specs.values()), 0
    origins: dict[str, str] = {}
    with tensors.TensorWriter(file, specs, journal) as writer, pool_of_threads() as threads:
        for _, group in groupby(stored.values(), key=_unit):
            unit = list(group)
            name = unit[0].name
            if name in writer.finished:
                origins[name] = writer.finished[name]
                done += sum(item.spec.nbytes for item in unit)
                continue
            digest = hashlib.sha256()
            for item, pieces in _tensors(unit, layout_of(unit[0].weight), weights, digest, threads):
                for piece in writer.pieces(item.name, pieces):
                    done += piece
                    progress("weights", done, total)
            origins[name] = digest.hexdigest()
            writer.finish(name, origins[name])
    progress("weights", total, total)
    return origins


def _specs(stored: Mapping[str, Stored]) -> dict[str, tensors.TensorSpec]:
    return {name: item.spec for name, item in stored.items()}


def _unit(item: Stored) -> tuple[str, bool]:
    return item.weight.name, item.part in ("vector", "order")


def _tensors(
    unit: list[Stored],
    layout: Layout,
    weights: RowSource,
    digest: hashlib._Hash,
    threads: tuple[ThreadPoolExecutor, int],
) -> Iterator[tuple[Stored, Iterable[np.ndarray]]]:
    """Yield each tensor of one weight with its data; the small ones are kept while the first is made."""
    weight = unit[0].weight
    if unit[0].part in ("vector", "order"):
        first = weights.rows(weight, 0, weight.shape[0] if unit[0].part == "vector" else 1)
        whole = first.weight.float().reshape(-1) if unit[0].part == "vector" else first.order
        assert whole is not None
        digest.update(array_of(whole).data)
        yield unit[0], [array_of(whole)]
        return
    leading = unit[0].part
    later: dict[str, list[np.ndarray]] = {item.part: [] for item in unit[1:]}

    def piece(start: int, stop: int) -> tuple[Packed, dict[str, np.ndarray]]:
        rows = replace(weights.rows(weight, start, stop), order=None)
        packed = {part: array_of(tensor) for part, tensor in layouts.pack(layout, rows).items()}
        return rows, {**packed, "words": packed["weight"]}

    def codes() -> Iterator[np.ndarray]:
        jobs = (partial(piece, *ends) for ends in _pieces(weight))
        for rows, packed in in_order(threads[0], jobs, threads[1]):
            _add(digest, rows)
            for part, pieces in later.items():
                pieces.append(packed[part])
            yield packed[leading]

    yield unit[0], codes()
    for item in unit[1:]:
        yield item, later[item.part]


def _pieces(weight: Weight) -> list[tuple[int, int]]:
    """Return where the rows of a weight are cut: at even rows, in the middle of which no byte lies."""
    count = max(2, PIECE // weight.shape[1] // 2 * 2)
    return [(start, min(start + count, weight.shape[0])) for start in range(0, weight.shape[0], count)]


def _add(digest: hashlib._Hash, rows: Packed) -> None:
    for part in ("weight", "scales", "zeros"):
        tensor = getattr(rows, part)
        if tensor is not None:
            digest.update(array_of(tensor).data)


class ArtifactWeights:
    """Canonical weights read back from an artifact's weight file.

    ``origins``, if given, is what ``write`` returned: each weight is compared with it when it is first read.
    """

    def __init__(
        self, model: ModelGraph, layout_of: LayoutOf, file: Path, origins: Mapping[str, str] | None = None
    ) -> None:
        self._arrays = tensors.load(file)
        self._layout_of, self._origins, self._dtypes = layout_of, Origins(origins), Dtypes(model)
        self._orders = {
            weight.order: name for weight in model.weights.values() if (name := f"{weight.name}:order") in self._arrays
        }

    def packed(self, weight: Weight) -> Packed:
        """Return ``weight``. Raises ParityError where it is not what was packed."""
        name = f"{weight.name}:vector"
        if name in self._arrays:
            vector = self._arrays[name]
            self._origins.check(name, weight, lambda: hashlib.sha256(vector.data))
            return Packed("dense", 0, (vector.shape[0], vector.shape[0]), torch.from_numpy(vector))
        layout, digest = self._layout_of(weight), hashlib.sha256()
        codes = "weight" if f"{weight.name}:weight" in self._arrays else "words"
        parts = {
            part: self._dtypes.tensor(weight, part, self._arrays[name])
            for part, own in (("weight", codes), ("scales", "scales"), ("zeros", "zeros"))
            if (name := f"{weight.name}:{own}") in self._arrays
        }
        blocks = weight.shape[1] // (layout.block or 1)
        pieces = []
        for start, stop in _pieces(weight):
            cut = {part: layouts.cut(layout, part, tensor, blocks, start, stop) for part, tensor in parts.items()}
            shape = (stop - start, weight.shape[1])
            pieces.append(layouts.canonical(layout, weight.format, weight.group, shape, cut))
            _add(digest, pieces[-1])
        self._origins.check(f"{weight.name}:{codes}", weight, lambda: digest)
        whole = concatenate(pieces)
        return replace(whole, order=self._order(weight)) if weight.order else whole

    def _order(self, weight: Weight) -> torch.Tensor:
        name = self._orders[weight.order]
        order = self._arrays[name]
        self._origins.check(name, weight, lambda: hashlib.sha256(order.data))
        return torch.from_numpy(order)
