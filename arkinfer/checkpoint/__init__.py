"""Checkpoints: config and weights of a model, read lazily, without ever running code from them, and without torch."""

from __future__ import annotations

from pathlib import Path

from arkinfer.checkpoint import hub
from arkinfer.checkpoint.adapter import AdaptedCheckpoint
from arkinfer.checkpoint.base import Checkpoint
from arkinfer.checkpoint.folder import NO_PICKLE, PICKLES, FolderCheckpoint
from arkinfer.checkpoint.gguf import GgufCheckpoint
from arkinfer.errors import UserError, nearest

BUNDLED = Path(__file__).parent.parent / "bundled"

__all__ = ["BUNDLED", "Checkpoint", "bundled_models", "open_checkpoint"]


def bundled_models() -> list[str]:
    """Return the names of the models that arkinfer brings along."""
    return sorted(folder.name for folder in BUNDLED.iterdir()) if BUNDLED.is_dir() else []


def open_checkpoint(
    model: str | Path,
    revision: str | None = None,
    offline: bool = False,
    headers_only: bool = False,
    adapter: str | Path | None = None,
) -> Checkpoint:
    """Open a checkpoint folder, a .gguf file, a bundled model by name, or a model of the hub.

    The hub's are named ``owner/name`` or ``owner/name@revision``; a folder of that name goes before. ``offline``: only
    what was fetched before is used. ``headers_only``: weights that are not here are not fetched, and reading their rows
    raises UserError. ``adapter``: the folder of a LoRA adapter that is merged into the weights as they are read.

    Raises UserError when the checkpoint, its config or its weights are missing or malformed.
    """
    opened = _open(model, revision, offline, headers_only)
    return opened if adapter is None else AdaptedCheckpoint(opened, Path(adapter))


def _open(model: str | Path, revision: str | None, offline: bool, headers_only: bool) -> Checkpoint:
    bundled = bundled_models()
    path = BUNDLED / model if str(model) in bundled else Path(model)
    if not path.exists() and (named := hub.parse_id(str(model), revision)) is not None:
        return hub.HubCheckpoint(named, offline, headers_only)
    if revision is not None:
        raise UserError(
            "--revision is for models of the hub", facts={"model": model}, hint="leave --revision out", code="ARK-E120"
        )
    if path.is_dir():
        return FolderCheckpoint(path)
    if path.suffix == ".gguf" and path.is_file():
        return GgufCheckpoint(path)
    if path.exists():
        raise UserError(
            f"{path.name} is a file",
            facts={"file": path},
            hint=NO_PICKLE if path.suffix in PICKLES else f"give its folder: {path.parent}",
            code="ARK-E120",
        )
    raise UserError(
        f"no model at {str(model)!r}: neither a folder, nor a bundled model, nor OWNER/NAME of the hub",
        facts={"bundled models": ", ".join(bundled)},
        hint=f"{nearest(str(model), bundled)}\na folder with config.json, tokenizer.json and *.safetensors",
        code="ARK-E120",
    )
