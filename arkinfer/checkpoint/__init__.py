"""Checkpoints: config and weights of a model, read lazily, without ever running code from them, and without torch."""

from __future__ import annotations

from pathlib import Path

from arkinfer.checkpoint.base import Checkpoint
from arkinfer.checkpoint.folder import FolderCheckpoint
from arkinfer.errors import UserError, nearest

BUNDLED = Path(__file__).parent.parent / "bundled"

__all__ = ["BUNDLED", "Checkpoint", "bundled_models", "open_checkpoint"]


def bundled_models() -> list[str]:
    """Return the names of the models that arkinfer brings along."""
    return sorted(folder.name for folder in BUNDLED.iterdir()) if BUNDLED.is_dir() else []


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a checkpoint folder, or a bundled model by name.

    Raises UserError when the checkpoint, its config or its weights are missing or malformed.
    """
    bundled = bundled_models()
    path = BUNDLED / model if str(model) in bundled else Path(model)
    if not path.is_dir():
        raise UserError(
            f"no model at {str(model)!r}: neither a folder nor a bundled model",
            facts={"bundled models": ", ".join(bundled)},
            hint=f"{nearest(str(model), bundled)}\na folder with config.json, tokenizer.json and *.safetensors",
            code="ARK-E120",
        )
    return FolderCheckpoint(path)
