"""A folder as transformers writes it: config.json, tokenizer.json, one or more safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arkinfer.artifact.tensors import TensorEntry, read_header
from arkinfer.checkpoint import layouts, sentencepiece
from arkinfer.checkpoint.base import Checkpoint, parse_object
from arkinfer.checkpoint.quantization import BESIDE, Quantization
from arkinfer.config import ModelConfig
from arkinfer.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NO_PICKLE = (
    "pickle files run code when loaded and are never read\n"
    "in Python, with the author's code: model.save_pretrained(FOLDER, safe_serialization=True)"
)
MAX_TEXT_BYTES = 256 << 20  # of a JSON file or a template; the largest tokenizer.json known has 33 MB


class FolderCheckpoint(Checkpoint):
    """A checkpoint folder opened for reading. Raises UserError if it is incomplete or malformed.

    Links are followed within ``root``, by default the folder itself; a snapshot in the cache of huggingface_hub is made
    of links to the blobs beside it. ``header`` reads the header of a weight file that may not be there yet; ``shards``
    then names those files.
    """

    def __init__(
        self,
        path: Path,
        root: Path | None = None,
        header: Callable[[Path], dict[str, TensorEntry]] | None = None,
        shards: Sequence[str] = (),
    ) -> None:
        self.path = path
        self._shards = shards
        self._root = (root or _cache_of(path)).resolve()
        self._header = header
        self.raw_config = self._json("config.json")
        config = ModelConfig.from_json(self.raw_config)
        settings = Quantization.read(self.raw_config, self._beside())
        layouts.check(settings)
        notes: list[str] = []
        self.weights = layouts.recognise(self._entries(), settings, config, notes)
        self.config = replace(config, notes=(*config.notes, *notes))

    def asset(self, name: str) -> bytes | None:
        file = self._file(name)
        if file is not None:
            return read_text(file)
        vocabulary = self._file("tokenizer.model") if name == "tokenizer.json" else None
        return None if vocabulary is None else sentencepiece.convert(read_text(vocabulary), self.json_asset)

    def _file(self, name: str) -> Path | None:
        return locate(self.path, name, self._root)

    def _json(self, name: str) -> dict[str, Any]:
        file = self._file(name)
        if file is None:
            raise UserError(f"{self.path} has no {name}", hint="point at the folder that holds it", code="ARK-E122")
        return parse_object(read_text(file), str(file))

    def _beside(self) -> dict[str, Any] | None:
        return next((self._json(name) for name in BESIDE if self._file(name) is not None), None)

    def _entries(self) -> dict[str, TensorEntry]:
        weight_map = None
        if self._file(INDEX) is not None:
            weight_map = check_index(self._json(INDEX), str(self.path / INDEX))
            names = sorted(set(weight_map.values()))
        elif self._header is not None:
            names = list(self._shards)
        elif self._file(SINGLE) is not None:
            names = [SINGLE]
        else:
            names = sorted(file.name for file in self.path.glob("*.safetensors"))
        if not names:
            raise self._nothing()
        missing = [name for name in names if self._header is None and self._file(name) is None]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(names)} weight files are missing",
                facts={"missing": ", ".join(missing[:8])},
                hint="complete the download",
                code="ARK-E123",
            )
        entries: dict[str, TensorEntry] = {}
        for name in names:
            for tensor, entry in (self._header or read_header)(self.path / name).items():
                if tensor in entries and not tensor.startswith("~"):  # the padding that arkinfer itself writes
                    raise UserError(
                        f"tensor {tensor} is in two files",
                        facts={"files": f"{entries[tensor].file.name}, {name}"},
                        hint="keep the files of one model in the folder",
                        code="ARK-E123",
                    )
                entries[tensor] = entry
        absent = sorted(set(weight_map or ()) - set(entries))
        if absent:
            raise UserError(
                f"the index names {len(absent)} tensors that no file holds",
                facts={"first": absent[0]},
                hint="complete the download",
                code="ARK-E123",
            )
        return entries

    def _nothing(self) -> UserError:
        pickles = sorted(file.name for file in self.path.iterdir() if file.suffix in PICKLES)
        return UserError(
            f"{self.path} has no *.safetensors file",
            facts={"found": ", ".join(pickles[:8])} if pickles else {},
            hint=NO_PICKLE if pickles else "complete the download",
            code="ARK-E123",
        )


def locate(folder: Path, name: str, root: Path | None = None) -> Path | None:
    """Return the file ``name`` of ``folder``, or None if there is none.

    Raises UserError for what is no regular file, and for links that leave ``root``, by default the folder itself, or of
    a snapshot in the hub's cache that model's part of it.
    """
    file = folder / name
    if not file.exists() and not file.is_symlink():
        return None
    if not file.resolve().is_relative_to((root or _cache_of(folder)).resolve()):
        raise UserError(
            f"{name} is a link that leaves the checkpoint's folder",
            facts={"link": file, "leads to": file.resolve()},
            hint=f"cp -rL {folder} COPY",
            code="ARK-E162",
        )
    if not file.is_file():
        what = "a broken link" if file.is_symlink() else "not a regular file"
        raise UserError(f"{name} is {what}", facts={"file": file}, hint="complete the download", code="ARK-E123")
    return file


def check_index(index: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the weight_map (tensor to file) of an index called ``name``. Raises UserError for unsafe file names."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{name} has no weight_map", hint="complete the download", code="ARK-E122")
    for file in weight_map.values():
        if (
            not isinstance(file, str)
            or not file.isprintable()
            or len(file) > 255
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise UserError(
                f"{name} names a file that is not a safetensors file of its own folder",
                facts={"named": repr(file)[:200]},
                hint=NO_PICKLE if str(file).endswith(PICKLES) else "use the index that its author published",
                code="ARK-E122",
            )
    return weight_map


def read_text(file: Path) -> bytes:
    """Return a JSON file or a template. Raises UserError if it is absurdly long or cannot be read."""
    try:
        size = file.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise UserError(
                f"{file.name} is too long",
                facts={"file": file, "bytes": size, "limit": MAX_TEXT_BYTES},
                hint="compare the file with the one that the model's author published",
                code="ARK-E122",
            )
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be read", facts={"file": file, "reason": error}, code="ARK-E122"
        ) from error


def _cache_of(path: Path) -> Path:
    """Return the folder that links in ``path`` may lead into: itself, or the hub cache's folder of the model."""
    place = path.resolve()
    inside = place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--")
    return place.parent.parent if inside else place
