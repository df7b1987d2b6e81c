"""Plans of large shapes without their weights: what an artifact would hold, but for the numbers.

``write`` makes one here, without a GPU; ``ShapeExecutor`` runs it with random weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from arkinfer.artifact.plan import Image, Plan
from arkinfer.backends.cuda import CudaExecutor
from arkinfer.checkpoint.stored import Layout
from arkinfer.config import ModelConfig
from arkinfer.exporters.kernels import triton as kernels
from arkinfer.structure import body, shapes
from tests.benchmarks.random_checkpoint import MINICPM
from tests.benchmarks.random_checkpoint import SHAPES as CHECKPOINTS
from tests.checkpoints import CONFIGS

CONTEXT = 131072 + 1024
WHOLE = {"max_position_embeddings": 1 << 18}
SHAPES: Mapping[str, dict[str, Any]] = {
    "minicpm4-8b": {**MINICPM, **CHECKPOINTS["8b"], **WHOLE},
    "qwen3-8b": {
        **CONFIGS["qwen3"],
        **WHOLE,
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "tiny-sparse": CONFIGS["minicpm"],
    "tiny-dense": CONFIGS["qwen3"],
}
FORMATS = ("fp16", "int4", "ternary")
# What is timed: shape and format of the weights.
TIMED = (("minicpm4-8b", "ternary"), ("minicpm4-8b", "int4"), ("minicpm4-8b", "fp16"), ("qwen3-8b", "fp16"))
TINY = (("tiny-sparse", "ternary"), ("tiny-sparse", "int4"), ("tiny-sparse", "fp16"), ("tiny-dense", "fp16"))


def write(folder: Path, shape: str, weights: str, level: str, context: int, compiled: bool = True) -> Path:
    """Write the plan and its kernels for ``level`` ("sm_90") into ``folder`` and return that.

    Not ``compiled``: files that stand for the kernels, which only a driver in memory takes.
    """
    from arkinfer import pipeline
    from arkinfer.exporters import cuda
    from arkinfer.exporters.base import BuildOptions
    from arkinfer.exporters.kernels.triton.cubin import Job, compile_all
    from arkinfer.recipe import Recipe

    config = ModelConfig.from_json(SHAPES[shape])
    layouts = {name: Layout("dense", extents, "F16") for name, extents in shapes(config).items()}
    if weights == "ternary":
        for name in body(config):
            group = 64 if layouts[name].shape[1] % 128 else 128
            layouts[name] = replace(layouts[name], format="ternary", group=group, scheme="ternary")
    graph = pipeline.lower(config, context, Recipe(weights, "float", layouts), layouts, "fp16").graph
    plan, _ = cuda.planned(graph, BuildOptions("fp16", "auto", context), (level,))

    def path(name: str) -> Path:
        folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        return folder / name

    if compiled:
        jobs = [Job(kernel.name, kernel.options, level) for kernel in plan.kernels]
        plan = cuda.with_images(plan, jobs, compile_all(jobs), path)
    else:
        plan = _imagined(plan, level, path)
    path("payload/plan.json").write_text(plan.to_json(), encoding="utf-8")
    described = {"shape": shape, "weights": weights, "context": context, "level": level}
    path("shape.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def _imagined(plan: Plan, level: str, path: Any) -> Plan:
    table = []
    for index, kernel in enumerate(plan.kernels):
        description = kernels.kernel(kernel.name)
        variant = description.variant(description.parse(kernel.options), level)
        file = f"payload/{index}.cubin"
        path(file).write_bytes(f"kernel {index}".encode())
        image = Image(file, file, kernel.name, variant.grid, variant.num_warps, 0)
        table.append(replace(kernel, images={level: image}))
    return replace(plan, kernels=tuple(table))


@dataclass(frozen=True)
class Shape:
    """The folder of a plan, in the place of an artifact."""

    path: Path

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(attention="auto", target={"name": "this GPU"})

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / "shape.json").read_text(encoding="utf-8"))
        return found

    def file(self, name: str) -> Path:
        return self.path / name


class ShapeExecutor(CudaExecutor):
    """The backend as it is, with random weights: one piece of random numbers, over and over."""

    def _fill_weights(self, artifact: Any) -> None:
        generator = np.random.default_rng(0)
        codes = generator.integers(0, 1 << 32, 1 << 22, np.uint32).view(np.uint8)
        floats = generator.standard_normal(1 << 22, np.float32)
        for buffer in self.plan.of_kind("parameter"):
            part = buffer.name.rpartition(":")[2]
            if part == "vector":
                piece = np.ones(4096, np.float32).view(np.uint8)
            elif part == "weight" and buffer.dtype == "int32":
                piece = codes
            elif part == "weight":
                piece = _as(floats * np.float32(0.02), buffer.dtype)
            elif part == "scales":
                piece = _as(np.abs(floats) * np.float32(0.01), buffer.dtype)
            elif part == "zeros":
                piece = codes & 3
            else:
                raise ValueError(f"random numbers for {buffer.name}")
            size = buffer.nbytes({})
            for start in range(0, size, piece.size):
                self.driver.upload(self._addresses[buffer.name] + start, piece[: size - start])


def _as(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the bytes of ``values`` in ``dtype``; bfloat16 are the upper halves of float32."""
    if dtype == "bfloat16":
        return np.ascontiguousarray(values.view(np.uint16)[1::2]).view(np.uint8)
    return values.astype(dtype).view(np.uint8)
