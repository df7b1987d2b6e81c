"""The weight file of the CPU exporter: canonical weights repacked into panels, slice by slice, and read back.

Slices are read, quantised and repacked by all cores while finished ones are written in order, so that a few slices are
all that is in memory, whatever the size of a weight.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch

from arkinfer.artifact import tensors
from arkinfer.artifact.journal import Journal
from arkinfer.exporters.base import Progress
from arkinfer.exporters.kernels.tir import pack
from arkinfer.exporters.lowering import Stored
from arkinfer.exporters.program import Program, Value
from arkinfer.exporters.stored import Dtypes, Origins, array_of
from arkinfer.graph import ModelGraph, Weight
from arkinfer.quant.packed import Packed
from arkinfer.reference import RowSource

DTYPES = {"uint8": "U8", "int8": "I8", "float16": "F16", "float32": "F32", "int32": "I32", "uint16": "BF16"}
Result = TypeVar("Result")
_LARGEST_POOL = 16  # threads: each holds a slice


class Sink(Protocol):
    """What the parameters are given to, as TensorWriter is."""

    finished: dict[str, str]

    def pieces(self, name: str, arrays: Iterable[np.ndarray]) -> Iterator[int]: ...
    def finish(self, part: str, origin: str) -> None: ...


@dataclass(frozen=True)
class _Unit:
    """Parameters of the program that are made of the same rows of one weight: codes, scales, zero points."""

    values: tuple[Value, ...]
    stored: tuple[Stored, ...]

    @property
    def name(self) -> str:
        return self.values[0].name

    @property
    def slices(self) -> list[pack.Slice]:
        first = self.stored[0]
        whole = first.part in ("vector", "order")
        rows = first.weight.shape[0] if first.part == "vector" else 1
        return [pack.Slice(1, ((0, rows),))] if whole else pack.slices(_matrix(first.weight, first.gated))


def specs(program: Program) -> dict[str, tensors.TensorSpec]:
    """Return the tensors of the weight file, in its order."""
    return {
        value.name: tensors.TensorSpec(DTYPES[value.dtype], tuple(map(int, value.shape)))
        for value in program.parameters
    }


def write(
    program: Program,
    stored: Mapping[str, Stored],
    weights: RowSource,
    file: Path,
    journal: Journal | None,
    progress: Progress,
) -> dict[str, str]:
    """Write the parameters of ``program`` to ``file``, going on where ``journal`` ends.

    Returns the digest of the canonical form of each weight, by its first parameter; ``ArtifactWeights`` compares it
    with what it reads back. ``progress`` counts bytes of the file.
    """
    with tensors.TensorWriter(file, specs(program), journal) as writer:
        return fill(writer, program, stored, weights, progress)


def fill(
    writer: Sink, program: Program, stored: Mapping[str, Stored], weights: RowSource, progress: Progress
) -> dict[str, str]:
    """Give the parameters of ``program`` to ``writer`` in order, but for those that are finished; see ``write``."""
    shapes = specs(program)
    total = sum(spec.nbytes for spec in shapes.values())
    units = []
    for _, group in groupby(program.parameters, key=lambda value: _unit_key(stored[value.name])):
        values = tuple(group)
        units.append(_Unit(values, tuple(stored[value.name] for value in values)))
    origins: dict[str, str] = {}
    done = 0
    with pool_of_threads() as (pool, ahead):
        missing = [unit for unit in units if unit.name not in writer.finished]
        jobs = (partial(_slice, weights, unit, piece) for unit in missing for piece in unit.slices)
        results = in_order(pool, jobs, ahead)
        for unit in units:
            if unit.name in writer.finished:
                origins[unit.name] = writer.finished[unit.name]
                done += sum(shapes[value.name].nbytes for value in unit.values)
                continue
            digest = hashlib.sha256()
            later: list[list[np.ndarray]] = [[] for _ in unit.values[1:]]
            codes = _first(results, len(unit.slices), digest, later)
            for value, pieces in zip(unit.values, (codes, *later), strict=True):
                for piece in writer.pieces(value.name, pieces):
                    done += piece
                    progress("weights", done, total)
            origins[unit.name] = digest.hexdigest()
            writer.finish(unit.name, origins[unit.name])
    progress("weights", total, total)
    return origins


def _unit_key(stored: Stored) -> tuple[str, bool]:
    return stored.weight.name, stored.part in ("vector", "order")


def _first(
    results: Iterator[tuple[bytes, list[np.ndarray]]],
    count: int,
    digest: hashlib._Hash,
    later: list[list[np.ndarray]],
) -> Iterator[np.ndarray]:
    """Yield the first parameter's panels of ``count`` slices; those of the others, which are small, go to ``later``."""
    for _ in range(count):
        origin, arrays = next(results)
        digest.update(origin)
        for kept, array in zip(later, arrays[1:], strict=True):
            kept.append(array)
        yield arrays[0]


def _slice(weights: RowSource, unit: _Unit, piece: pack.Slice) -> tuple[bytes, list[np.ndarray]]:
    """Return the digest of some canonical rows, and what they are in each parameter of ``unit``."""
    first = unit.stored[0]
    rows = [weights.rows(first.weight, *part) for part in piece.ranges]
    if first.part in ("vector", "order"):
        array = _whole(rows[0], first.part)
        return hashlib.sha256(array.data).digest(), [array]
    parts = [stored.part for stored in unit.stored]
    canonical = [[array_of(getattr(packed, part)) for packed in rows] for part in parts]
    matrix = _matrix(first.weight, first.gated)
    panels = [
        pack.weight_panels(matrix, piece, arrays) if part == "weight" else pack.vector_panels(piece, arrays)
        for part, arrays in zip(parts, canonical, strict=True)
    ]
    return _digest(canonical), panels


def _digest(canonical: list[list[np.ndarray]]) -> bytes:
    digest = hashlib.sha256()
    for arrays in canonical:
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _whole(packed: Packed, part: str) -> np.ndarray:
    tensor = packed.order if part == "order" else packed.weight.float().reshape(-1)
    assert tensor is not None
    return array_of(tensor)


def _matrix(weight: Weight, gated: bool) -> pack.Matrix:
    return pack.Matrix(weight.format, weight.shape[0], weight.shape[1], weight.group, gated)


@contextmanager
def pool_of_threads() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Give a thread per core, and how many slices may wait for the writer."""
    count, before = min(_LARGEST_POOL, len(os.sched_getaffinity(0))), torch.get_num_threads()
    try:
        # One torch thread in each: blocks are small, and torch's own threads wait for one another.
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, count + 2
    finally:
        torch.set_num_threads(before)  # for threads that begin later


def in_order(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], Result]], ahead: int) -> Iterator[Result]:
    """Yield the jobs' results in order, with at most ``ahead`` begun or waiting."""
    pending: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


class ArtifactWeights:
    """Canonical weights read back from the arrays of an artifact's weight file.

    ``origins``, if given, is what ``write`` returned: each weight is compared with it when it is first read.
    """

    def __init__(
        self, model: ModelGraph, arrays: Mapping[str, np.ndarray], origins: Mapping[str, str] | None = None
    ) -> None:
        self._arrays = arrays
        self._origins, self._dtypes = Origins(origins), Dtypes(model)
        self._orders = {
            weight.order: f"{weight.name}:order"
            for weight in model.weights.values()
            if f"{weight.name}:order" in self._arrays
        }

    def packed(self, weight: Weight) -> Packed:
        """Return ``weight``. Raises ParityError where it is not what was packed."""
        name = f"{weight.name}:vector"
        if name in self._arrays:
            vector = self._arrays[name]
            self._origins.check(name, weight, lambda: hashlib.sha256(hashlib.sha256(vector.data).digest()))
            return Packed("dense", 0, (vector.shape[0], vector.shape[0]), torch.from_numpy(vector))
        gated = f"{weight.name}:gated.weight" in self._arrays
        stem = f"{weight.name}:{'gated' if gated else 'panels'}"
        matrix = _matrix(weight, gated)
        codes = self._arrays[f"{stem}.weight"]
        parts = {"weight": pack.unpack(matrix, codes) if weight.format == "dense" else pack.canonical(matrix, codes)}
        for part in ("scales", "zeros"):
            if f"{stem}.{part}" in self._arrays:
                parts[part] = pack.unpack(matrix, self._arrays[f"{stem}.{part}"])
        self._origins.check(f"{stem}.weight", weight, lambda: _digest_of(matrix, list(parts.values())))
        found = {part: self._dtypes.tensor(weight, part, array) for part, array in parts.items()}
        order = self._arrays[self._orders[weight.order]] if weight.order else None
        if order is not None:
            self._origins.check(
                self._orders[weight.order], weight, lambda: hashlib.sha256(hashlib.sha256(order.data).digest())
            )
        return Packed(
            weight.format,
            weight.group,
            (matrix.rows, matrix.width),
            found["weight"],
            found.get("scales"),
            found.get("zeros"),
            None if order is None else torch.from_numpy(order),
        )


def _digest_of(matrix: pack.Matrix, canonical: list[np.ndarray]) -> hashlib._Hash:
    """Return the digest that ``write`` gives to these canonical arrays."""
    digest = hashlib.sha256()
    for piece in pack.slices(matrix):
        digest.update(_digest([[array[start:stop] for start, stop in piece.ranges] for array in canonical]))
    return digest
