"""What a build for a CPU will store, keep and read, from shapes alone: the exporter and `arkinfer plan` share this."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from arkinfer.artifact.tensors import TensorSpec
from arkinfer.config import ModelConfig, SparseConfig
from arkinfer.exporters import refusals
from arkinfer.exporters.base import BuildOptions, StoredMatrix
from arkinfer.exporters.kernels.tir import layout, pack
from arkinfer.exporters.program import Value
from arkinfer.structure import Structure
from arkinfer.targets import Target

CHUNK = 512  # prompt tokens per step, as the runtime reads prompts
PANEL = layout.PANEL
KV = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
_BYTES = {"float32": 4, "float16": 2, "int8": 1}
# Operators of the graph that need no kernel of their own: views, and what the kernel that reads them computes too.
ABSORBED = ("arkinfer.rope", "aten.flatten.using_ints", "aten.slice.Tensor", "aten.unflatten.int", "getitem")


def parameters(matrix: pack.Matrix, dtype: str, zeros: bool = False) -> dict[str, TensorSpec]:
    """Return the tensors that hold a matrix, by part; ``dtype`` (safetensors' name) is that of floats and scales."""
    if matrix.format == "dense":
        return {"weight": TensorSpec(dtype, pack.weight_shape(matrix))}
    grouped = (matrix.panels, matrix.groups, PANEL)
    parts = {"weight": TensorSpec("U8", pack.weight_shape(matrix)), "scales": TensorSpec(dtype, grouped)}
    return {**parts, "zeros": TensorSpec("U8", grouped)} if zeros else parts


def caches(config: ModelConfig, kv: str) -> list[Value]:
    """Return the state tensors of all layers; the axis that grows with the context has a name for its extent."""
    kind = KV[kv]
    layers, heads, dim = config.layers, config.kv_heads, config.head_dim
    values = [
        Value("k", kind, (layers, heads, "k_panels", dim, PANEL)),
        Value("v", kind, (layers, heads, "capacity", dim)),
    ]
    real = "float16" if kind == "int8" else kind
    if kind == "int8":
        values += [
            Value("k_scale", "float32", (layers, heads, "capacity")),
            Value("v_scale", "float32", (layers, heads, "capacity")),
        ]
    if config.sparse is not None:
        values += [
            Value("fine", real, (layers, heads, "fine_panels", dim, PANEL)),
            Value("coarse", real, (layers, heads, "coarse_panels", dim, PANEL)),
        ]
        if config.sparse.use_nope:
            values.append(Value("nope", real, (layers, heads, "k_panels", dim, PANEL)))
    return values


def cache(value: Value, sparse: SparseConfig | None) -> dict[str, Any]:
    """Describe one state tensor: -1 marks the axis that grows by one every ``stride`` * ``pack`` tokens."""
    strides = {"fine": sparse.kernel_stride, "coarse": sparse.coarse_stride} if sparse else {}
    shape = [-1 if isinstance(extent, str) else extent for extent in value.shape]
    panels = any(isinstance(extent, str) and extent.endswith("panels") for extent in value.shape)
    return {
        "name": value.name,
        "dtype": value.dtype,
        "shape": shape,
        "stride": strides.get(value.name, 1),
        "pack": PANEL if panels else 1,
    }


def _nbytes(value: Value, sparse: SparseConfig | None, capacity: int) -> int:
    described = cache(value, sparse)
    places = max(1, -(-(capacity // described["stride"]) // described["pack"]))
    extents: list[int] = [places if extent == -1 else extent for extent in described["shape"]]
    return _BYTES[value.dtype] * math.prod(extents)


def traffic(config: ModelConfig, kv: str, weights: int) -> dict[str, float]:
    """Return the bytes that a decode step reads: ``weights`` of the linears, and caches for each token of context."""
    sparse, item = config.sparse, _BYTES[KV[kv]]
    real = 2 if kv == "int8" else item
    row = config.layers * config.kv_heads * config.head_dim
    scales = 8 * config.layers * config.kv_heads if kv == "int8" else 0
    compressed = 0.0
    if sparse is not None:
        compressed = row * real / sparse.kernel_stride
        compressed += row * real / sparse.coarse_stride if sparse.lse == "coarse" else 0
    return {"weights": weights, "kv_per_token": 2 * row * item + scales, "compressed_per_token": compressed}


def gear(sparse: SparseConfig | None) -> dict[str, int] | None:
    """Return what decides how much of the context a row reads."""
    if sparse is None:
        return None
    return {
        "dense_len": sparse.dense_len,
        "topk": sparse.topk,
        "window_size": sparse.window_size,
        "block_size": sparse.block_size,
    }


class CpuOutline:
    """The tvm backend as `arkinfer plan` sees it."""

    def reasons(
        self, config: ModelConfig, weights: Iterable[StoredMatrix], target: Target, options: BuildOptions
    ) -> list[str]:
        """Return why the kernels cannot run a model; empty if they can."""
        return refusals.reasons(config, target)

    def parameters(self, weight: StoredMatrix, dtype: str, zeros: bool, gated: bool) -> Mapping[str, TensorSpec]:
        """Return the tensors that hold one matrix."""
        rows, width = weight.shape
        return parameters(pack.Matrix(weight.format, rows, width, weight.group, gated), dtype, zeros)

    def caches(self, config: ModelConfig, kv: str, capacity: int) -> Mapping[str, int]:
        """Return the bytes of the state tensors of all layers by name, for ``capacity`` tokens, a multiple of 64."""
        return {value.name: _nbytes(value, config.sparse, capacity) for value in caches(config, kv)}

    def workspace(self, structure: Structure, context: int) -> int:
        """Return the bytes of inner values of a prompt's step: those of one layer together, and a row of logits."""
        config = structure.config
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        # Residual, branch, norm; q, k, v, the rotated query, attention's output; the gated half and its int8 form.
        floats = 4 * config.hidden_size + 3 * query + 2 * key + 2 * config.intermediate_size
        if config.sparse is not None:
            floats += config.kv_heads * config.sparse.budget
        return 4 * (CHUNK * floats + config.vocab_size)

    def native(self, operators: Mapping[str, int]) -> dict[str, int]:
        """Return those of ``operators`` that have a kernel of their own."""
        return {name: count for name, count in operators.items() if name not in ABSORBED}
