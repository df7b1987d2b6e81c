"""Recognise how the tensors of a checkpoint make up its weights: from names, dtypes and shapes, never from its path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arkinfer.artifact.tensors import TensorEntry
from arkinfer.checkpoint.stored import FLOATS, DenseWeight, StoredWeight
from arkinfer.config import ModelConfig
from arkinfer.errors import UserError


def recognise(
    entries: Mapping[str, TensorEntry], raw_config: Mapping[str, Any], config: ModelConfig
) -> dict[str, StoredWeight]:
    """Return the weights that ``entries`` hold, by transformers' names.

    Raises UserError for tensors that no known format explains.
    """
    weights: dict[str, StoredWeight] = {}
    for name, entry in entries.items():
        if name.startswith("~"):  # the padding between tensors that arkinfer itself writes
            continue
        if entry.dtype not in FLOATS:
            raise UserError(
                "a weight is stored as integers",
                facts={"tensor": name, "dtype": entry.dtype},
                hint="quantised checkpoints cannot be read yet; give the original one",
                code="ARK-E126",
            )
        weights[name] = DenseWeight(entry)
    return weights
