"""Write tensors and settings as a checkpoint file holds them, and open them with the reader under test."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from arkinfer.artifact.tensors import read_header
from arkinfer.checkpoint import layouts
from arkinfer.checkpoint.quantization import Quantization
from arkinfer.checkpoint.stored import StoredWeight
from arkinfer.config import ModelConfig
from arkinfer.quant.packed import concatenate, dequantise, read
from tests.checkpoints import CONFIGS

CONFIG = ModelConfig.from_json(CONFIGS["llama"])


def recognised(
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any] | None,
    folder: Path,
    config: ModelConfig = CONFIG,
    notes: list[str] | None = None,
) -> dict[str, StoredWeight]:
    """Return the weights in a file of ``tensors`` under ``settings`` (quantization_config)."""
    file = folder / "model.safetensors"
    save_file(dict(tensors), file)
    raw = {} if settings is None else {"quantization_config": settings}
    return layouts.recognise(read_header(file), Quantization.read(raw), config, [] if notes is None else notes)


def module(name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def multiplied(stored: StoredWeight, step: int = 0) -> np.ndarray:
    """Return the whole weight in float32, read ``step`` rows at a time."""
    rows = stored.layout.shape[0]
    step = step or rows
    pieces = [read(stored, start, min(start + step, rows)) for start in range(0, rows, step)]
    values: np.ndarray = dequantise(concatenate(pieces)).numpy()
    return values


def one(tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any] | None) -> tuple[StoredWeight, np.ndarray]:
    """Return the output head made of ``tensors``, and its values, read in uneven pieces."""
    with tempfile.TemporaryDirectory() as folder:
        stored = recognised(module("lm_head", tensors), settings, Path(folder))["lm_head.weight"]
        whole = multiplied(stored)
        assert np.array_equal(multiplied(stored, 13), whole)
        return stored, whole
