"""A folder as transformers writes it: config.json, tokenizer.json, one or more safetensors files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from arkinfer.artifact.tensors import TensorEntry, read_header
from arkinfer.checkpoint import layouts
from arkinfer.checkpoint.base import Checkpoint, parse_object
from arkinfer.checkpoint.quantization import BESIDE, Quantization
from arkinfer.config import ModelConfig
from arkinfer.errors import UserError

INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth")


class FolderCheckpoint(Checkpoint):
    """A checkpoint folder opened for reading. Raises UserError if it is incomplete or malformed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw_config = self._json("config.json")
        config = ModelConfig.from_json(self.raw_config)
        settings = Quantization.read(self.raw_config, self._beside())
        notes: list[str] = []
        self.weights = layouts.recognise(self._entries(), settings, config, notes)
        self.config = replace(config, notes=(*config.notes, *notes))

    def asset(self, name: str) -> bytes | None:
        file = self.path / name
        return file.read_bytes() if file.is_file() else None

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            raise UserError(f"{self.path} has no {name}", hint="point at the folder that holds it", code="ARK-E122")
        return parse_object(file.read_bytes(), str(file))

    def _beside(self) -> dict[str, Any] | None:
        return next((self._json(name) for name in BESIDE if (self.path / name).is_file()), None)

    def _entries(self) -> dict[str, TensorEntry]:
        index = self.path / INDEX
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
            raise self._nothing()
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

    def _nothing(self) -> UserError:
        pickles = [file.name for file in self.path.iterdir() if file.suffix in _PICKLES]
        return UserError(
            f"{self.path} has no *.safetensors file",
            facts={"found": ", ".join(pickles)} if pickles else {},
            hint="pickle files run code when loaded and are never read; save with safe_serialization=True"
            if pickles
            else "complete the download",
            code="ARK-E123",
        )
