"""Read a Hugging Face checkpoint folder: its config and its tensors, lazily, without ever running code from it."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from arkinfer.artifact.tensors import TensorEntry, map_file, read_header
from arkinfer.config import ModelConfig
from arkinfer.errors import UserError, nearest

BUNDLED = Path(__file__).parent / "bundled"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Checkpoint:
    """A checkpoint folder opened for reading; tensors are memory-mapped and read only when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw_config = self._json("config.json")
        self.config = ModelConfig.from_json(self.raw_config)
        self.entries = self._entries()
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Open a checkpoint folder or a bundled model by name.

        Raises UserError when the folder, its config or its weights are missing or malformed.
        """
        bundled = sorted(folder.name for folder in BUNDLED.iterdir()) if BUNDLED.is_dir() else []
        path = BUNDLED / model if str(model) in bundled else Path(model)
        if not path.is_dir():
            raise UserError(
                f"no model at {str(model)!r}: neither a folder nor a bundled model",
                facts={"bundled models": ", ".join(bundled)},
                hint=f"{nearest(str(model), bundled)}\na folder with config.json, tokenizer.json and *.safetensors",
                code="ARK-E120",
            )
        return cls(path)

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"{self.path} has no {name}", hint="point at the folder that holds it", code="ARK-E122"
            ) from error
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{file} is not valid JSON", facts={"reason": error}, code="ARK-E122") from error
        if not isinstance(value, dict):
            raise UserError(f"{file} is not a JSON object", code="ARK-E122")
        return value

    def optional_json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in ``name``, or an empty one if the checkpoint has no such file."""
        return self._json(name) if (self.path / name).is_file() else {}

    def _entries(self) -> dict[str, TensorEntry]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            weight_map = self._json(index.name).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index} has no weight_map", code="ARK-E122")
            names = sorted({str(name) for name in weight_map.values()})
            if any(Path(name).name != name for name in names):
                raise UserError(f"{index} names files outside its folder", code="ARK-E122")
        else:
            weight_map = None
            names = sorted(file.name for file in self.path.glob("*.safetensors"))
        if not names:
            pickles = [file.name for file in self.path.iterdir() if file.suffix in (".bin", ".pt", ".pth")]
            raise UserError(
                f"{self.path} has no *.safetensors file",
                facts={"found": ", ".join(pickles)} if pickles else {},
                hint="pickle files run code when loaded and are never read; save with safe_serialization=True"
                if pickles
                else "complete the download",
                code="ARK-E123",
            )
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(names)} weight files are missing",
                facts={"missing": ", ".join(missing[:8])},
                hint="complete the download",
                code="ARK-E123",
            )
        entries: dict[str, TensorEntry] = {}
        for name in names:
            for tensor, entry in read_header(self.path / name).items():
                if tensor in entries:
                    raise UserError(
                        f"tensor {tensor} is in two files", facts={"files": f"{entries[tensor].file.name}, {name}"}
                    )
                entries[tensor] = entry
        absent = sorted(set(weight_map or ()) - set(entries))
        if absent:
            raise UserError(
                f"the index names {len(absent)} tensors that no file holds", facts={"first": absent[0]}, code="ARK-E123"
            )
        return entries

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor as a read-only view of the mapped file, in its stored dtype and shape."""
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(
                f"the checkpoint has no tensor {name}",
                facts={"nearest": nearest(name, list(self.entries))},
                code="ARK-E124",
            )
        dtype = DTYPES[entry.dtype]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.file not in self._maps:
            self._maps[entry.file] = map_file(entry.file)
        data = self._maps[entry.file]
        if entry.start % dtype.itemsize:  # the format does not promise alignment
            return torch.frombuffer(bytearray(data[entry.start : entry.stop]), dtype=dtype).reshape(entry.shape)
        return torch.frombuffer(data, dtype=dtype, count=entry.count, offset=entry.start).reshape(entry.shape)

    def names(self) -> Iterator[str]:
        return iter(self.entries)

    @cached_property
    def parameters(self) -> int:
        """Number of stored weight elements."""
        return sum(entry.count for entry in self.entries.values())
