"""What determines the bytes of a weight file: two builds with one key can go on with each other's work."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import arkinfer
from arkinfer import exporters
from arkinfer.checkpoint import Checkpoint
from arkinfer.exporters.base import BuildOptions
from arkinfer.graph import ModelGraph
from arkinfer.recipe import Recipe
from arkinfer.targets import Target


def key(checkpoint: Checkpoint, graph: ModelGraph, recipe: Recipe, target: Target, options: BuildOptions) -> str:
    """Return the SHA-256 of the checkpoint's files, the graph, all choices, and the code that packs.

    Of the files names, sizes and times count, not contents; ctime is among them because it cannot be set back.
    """
    facts: dict[str, Any] = {
        "files": [_status(file) for file in checkpoint.files()],
        "config": checkpoint.raw_config,
        "graph": graph.digest(),
        "recipe": [recipe.weights, recipe.activations, recipe.to_dict()],
        "target": target.to_dict(),
        "options": asdict(options),
        "code": [arkinfer.__version__, _code(), torch.__version__, np.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _status(file: Path) -> tuple[str, int, int, int]:
    status = file.stat()
    return file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@cache
def _code() -> str:
    """Return the digest of this package's modules, and of the texts that it calibrates with."""
    digest = hashlib.sha256()
    for folder in (Path(arkinfer.__file__).parent, Path(exporters.__file__).parent):
        for file in sorted(file for file in folder.rglob("*") if file.suffix in (".py", ".txt")):
            digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()
