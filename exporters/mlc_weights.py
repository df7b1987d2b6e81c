"""Parameters in MLC's format: tensor-cache.json and shards of at most 32 MiB, each tensor whole in one of them.

An app reads a shard into memory at a time, so that little more than the model itself is ever in memory. The format is
that of tvm.contrib.tvmjs: raw little-endian bytes, in C order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arkinfer.artifact.tensors import NUMPY, TensorSpec, map_file
from arkinfer.errors import ArtifactError
from arkinfer.exporters import mlc_outline

INDEX = "tensor-cache.json"
CAP = 32 << 20  # bytes of a shard; a larger tensor has one of its own
# bfloat16 as its bits: kernels read them as uint16, and "bfloat16" would be converted on loading.
NAMES = {"U8": "uint8", "I8": "int8", "F16": "float16", "F32": "float32", "I32": "int32", "BF16": "uint16"}


class ShardWriter:
    """Writes tensors, in the order of ``specs``, into shards in ``folder``, and the index when all are there."""

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], cap: int = CAP) -> None:
        self.finished: dict[str, str] = {}  # a build that was interrupted begins anew
        self._folder, self._specs = folder, specs
        self._shards = _plan(specs, cap)
        self._places = {name: index for index, shard in enumerate(self._shards) for name in shard}

    def __enter__(self) -> ShardWriter:
        self._open: int | None = None
        self._stream: Any = None
        self._digests: list[str] = []
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._close()
        if kind is None:
            (self._folder / INDEX).write_text(json.dumps(self._index(), indent=1) + "\n", encoding="utf-8")

    def pieces(self, name: str, arrays: Iterable[np.ndarray]) -> Iterator[int]:
        """Write a tensor given in consecutive pieces, and yield the bytes of each when it is written.

        Raises ValueError when they do not fill its spec, or it is not the tensor's turn.
        """
        place = self._places[name]
        if place != self._open:
            self._close()
            if place != len(self._digests):
                raise ValueError(f"tensor {name} is out of order")
            self._open, self._digest = place, hashlib.md5(usedforsecurity=False)
            self._stream = (self._folder / _file(place)).open("wb")
        written = 0
        for array in arrays:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            self._stream.write(data)
            self._digest.update(data)
            written += data.nbytes
            yield data.nbytes
        if written != self._specs[name].nbytes:
            raise ValueError(f"tensor {name} has {written} bytes of data and {self._specs[name].nbytes} declared")

    def finish(self, part: str, origin: str) -> None:
        """End a part; nothing is kept of it for a later build."""

    def _close(self) -> None:
        if self._open is not None:
            self._stream.close()
            self._digests.append(self._digest.hexdigest())
            self._open = None

    def _index(self) -> dict[str, Any]:
        count, nbytes = mlc_outline.parameter_count(self._specs), mlc_outline.parameter_bytes(self._specs)
        records = []
        for place, (shard, digest) in enumerate(zip(self._shards, self._digests, strict=True)):
            offset, entries = 0, []
            for name in shard:
                spec = self._specs[name]
                entries.append(
                    {
                        "name": name,
                        "shape": list(spec.shape),
                        "dtype": NAMES[spec.dtype],
                        "format": "raw",
                        "nbytes": spec.nbytes,
                        "byteOffset": offset,
                    }
                )
                offset += spec.nbytes
            records.append(
                {
                    "dataPath": _file(place),
                    "format": "raw-shard",
                    "nbytes": offset,
                    "records": entries,
                    "md5sum": digest,
                }
            )
        sizes = {"ParamSize": len(self._specs), "ParamBytes": float(nbytes), "BitsPerParam": 8 * nbytes / max(count, 1)}
        return {"metadata": sizes, "records": records}


def _plan(specs: Mapping[str, TensorSpec], cap: int) -> list[list[str]]:
    """Return the names in each shard."""
    shards: list[list[str]] = []
    room = 0
    for name, spec in specs.items():
        if not shards or spec.nbytes > room:
            shards.append([])
            room = cap
        shards[-1].append(name)
        room -= spec.nbytes
    return shards


def _file(place: int) -> str:
    return f"params_shard_{place}.bin"


def load(folder: Path) -> dict[str, np.ndarray]:
    """Return every tensor of the package in ``folder`` as a view of its shard's memory map.

    Raises ArtifactError (ARK-E513) where the index and the shards do not agree.
    """
    known = {name: NUMPY[kind] for kind, name in NAMES.items()}
    try:
        found: dict[str, np.ndarray] = {}
        for record in json.loads((folder / INDEX).read_text(encoding="utf-8"))["records"]:
            data = map_file(folder / Path(record["dataPath"]).name)
            for entry in record["records"]:
                dtype, count = np.dtype(known[entry["dtype"]]), int(np.prod(entry["shape"], dtype=np.int64))
                array = np.frombuffer(data, dtype, count, entry["byteOffset"])
                found[entry["name"]] = array.reshape(entry["shape"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            "the parameters of the MLC package cannot be read",
            facts={"folder": folder, "reason": str(error)},
            hint="copy or build the artifact again",
            code="ARK-E513",
        ) from error
    return found
