"""What every kind of checkpoint offers: a config, weights by name, and the files that a tokenizer is made of."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arkinfer.checkpoint.stored import Layout, StoredWeight
from arkinfer.config import ModelConfig
from arkinfer.errors import UserError, nearest

# What `asset` may be asked for.
ASSETS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
_AGAIN = "compare the file with the one that the model's author published"


class Checkpoint(ABC):
    """An opened checkpoint; tensors stay on disk until some of their rows are asked for.

    ``weights`` maps the names of transformers' model to what the files hold, whatever those call it.
    """

    path: Path
    raw_config: dict[str, Any]  # config.json, or what stands in for it
    config: ModelConfig
    weights: Mapping[str, StoredWeight]
    headers_only = False  # reading rows of the weights raises UserError: they are not on this machine

    @property
    def source(self) -> dict[str, Any]:
        """What an artifact says of where the model comes from, beyond its name; plain JSON values."""
        return {}

    @property
    def name(self) -> str:
        """What to call the model in messages and artifacts."""
        return self.path.resolve().name

    def files(self) -> list[Path]:
        """Return the files that determine the weights, and perhaps others beside them."""
        found = self.path.iterdir() if self.path.is_dir() else [self.path]
        return sorted(file for file in found if file.is_file())

    @abstractmethod
    def asset(self, name: str) -> bytes | None:
        """Return the file ``name`` (one of ASSETS), read or converted, or None if the checkpoint has none."""

    def weight(self, name: str) -> StoredWeight:
        """Return one weight. Raises UserError if there is none of that name."""
        if name not in self.weights:
            raise UserError(
                f"the checkpoint has no tensor {name}",
                facts={"nearest": nearest(name, list(self.weights))},
                code="ARK-E124",
            )
        return self.weights[name]

    def layouts(self) -> dict[str, Layout]:
        """Return how each weight is stored."""
        return {name: weight.layout for name, weight in self.weights.items()}

    def json_asset(self, name: str) -> dict[str, Any]:
        """Return the JSON object in the asset ``name``, or an empty one if the checkpoint has none."""
        data = self.asset(name)
        return {} if data is None else parse_object(data, name)

    @property
    def parameters(self) -> int:
        """Number of weight elements of the model."""
        total = 0
        for weight in self.weights.values():
            count = 1
            for extent in weight.layout.shape:
                count *= extent
            total += count
        return total


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in ``data``. Raises UserError, calling it ``name``, for anything else."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON", facts={"reason": error}, hint=_AGAIN, code="ARK-E122") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a JSON object", hint=_AGAIN, code="ARK-E122")
    return value
