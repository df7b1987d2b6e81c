"""What a build for a GPU will store, and what its kernels cannot run, from shapes alone and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arkinfer.artifact.plan import BLOCK, whole_blocks
from arkinfer.artifact.tensors import TensorSpec
from arkinfer.config import ModelConfig, SparseConfig
from arkinfer.exporters.base import BuildOptions, StoredMatrix
from arkinfer.exporters.kernels.triton.kernel import ARCHS
from arkinfer.exporters.outline import ABSORBED
from arkinfer.structure import Structure
from arkinfer.targets import Target

BITS = {"int8": 8, "int4": 4, "int2": 2, "ternary": 2}  # of a code
CHUNK = 64  # bytes that a row of codes is a multiple of
ITEM = {"fp32": 4, "fp16": 2, "int8": 1}  # bytes of a cached number
STEP = 16  # inputs that a group of weights is a multiple of
LEAST = 16  # keys of a block: what a tensor core takes at once
LARGEST = 16384  # numbers in the keys of a block: with their values and the next ones, shared memory holds no more


def parameters(weight: StoredMatrix, dtype: str, zeros: bool) -> dict[str, TensorSpec]:
    """Return the tensors that hold a matrix, by part; ``dtype`` (safetensors' name) is that of floats and scales."""
    rows, width = weight.shape
    if weight.format == "dense":
        return {"weight": TensorSpec(dtype, (rows, width))}
    words = -(-width * BITS[weight.format] // (8 * CHUNK)) * (CHUNK // 4)
    grouped = (rows, width // (weight.group or width))
    parts = {"weight": TensorSpec("I32", (rows, words)), "scales": TensorSpec(dtype, grouped)}
    return {**parts, "zeros": TensorSpec("U8", grouped)} if zeros else parts


def unselectable(config: ModelConfig) -> list[str]:
    """Return why the kernels cannot choose blocks as the model's sparse_config asks; it can still be built dense."""
    if config.sparse is None:
        return []
    block, stride, found = config.sparse.block_size, config.sparse.kernel_stride, []
    if block < LEAST or not _is_power(block):
        found.append(f"`block_size` {block} is not a power of two from {LEAST} on")
    elif block * config.head_dim > LARGEST:
        found.append(f"`block_size` {block} is above {LARGEST // config.head_dim}, what shared memory holds")
    if not _is_power(block // stride):
        found.append(f"`block_size` / `kernel_stride`, {block} / {stride}, is not a power of two")
    return [f"sparse attention on CUDA: {reason}; --attention dense" for reason in found]


def selects(config: ModelConfig) -> SparseConfig | None:
    """Return what the sparse gear of a plan follows, or None where the plan has the dense gear alone."""
    return None if unselectable(config) else config.sparse


def caches(config: ModelConfig, kv: str, capacity: int) -> dict[str, int]:
    """Return the bytes of the state tensors of all layers by name, for ``capacity`` tokens, a multiple of 64."""
    rows, sparse = config.layers * config.kv_heads, selects(config)
    half = 2 * rows * config.head_dim  # bytes of one position in float16
    keys = capacity * half * ITEM[kv] // 2
    found = {"k": keys, "v": keys}
    if kv == "int8":
        found |= dict.fromkeys(("k_scale", "v_scale"), 4 * rows * capacity)
    if sparse is not None:
        # One compressed key a stride: a little more than the tokens complete.
        found["fine"] = half * -(-capacity // sparse.kernel_stride)
        found["coarse"] = half * -(-capacity // sparse.coarse_stride)
        if sparse.use_nope:
            found["nope"] = half * capacity
    return found


def _is_power(value: int) -> bool:
    return value & (value - 1) == 0


def reasons(config: ModelConfig, weights: Iterable[StoredMatrix], target: Target, options: BuildOptions) -> list[str]:
    """Return one sentence per obstacle to running a model; empty if there is none."""
    found = [f"no kernels are compiled for {level}" for level in target.arch if level not in ARCHS]
    if options.kv == "fp32":
        found.append("the CUDA kernels keep keys and values as fp16 or int8; --kv fp16")
    if options.attention != "dense":
        found += unselectable(config)
    keys = config.kv_heads * whole_blocks(options.context) * config.head_dim
    if keys >= 1 << 31:
        most = ((1 << 31) - 1) // (config.kv_heads * config.head_dim) // BLOCK * BLOCK
        found.append(f"one layer's keys, {keys:,} numbers, are more than the CUDA kernels can count; --context {most}")
    weights = list(weights)
    if any(weight.wide for weight in weights):
        found.append("the CUDA kernels read dense weights as float16 or bfloat16, not float32; --weights fp16")
    for weight in weights:
        width = weight.shape[1]
        if weight.format != "dense" and weight.group and (weight.group % STEP or width % weight.group):
            found.append(f"{weight.name}: groups of {weight.group} inputs are not multiples of {STEP}; --weights fp16")
            break
    return found


class CudaOutline:
    """The cuda backend as `arkinfer plan` sees it."""

    def reasons(
        self, config: ModelConfig, weights: Iterable[StoredMatrix], target: Target, options: BuildOptions
    ) -> list[str]:
        """Return why the kernels cannot run a model; empty if they can."""
        return reasons(config, weights, target, options)

    def parameters(self, weight: StoredMatrix, dtype: str, zeros: bool, gated: bool) -> Mapping[str, TensorSpec]:
        """Return the tensors that hold one matrix."""
        return parameters(weight, dtype, zeros)

    def caches(self, config: ModelConfig, kv: str, capacity: int) -> Mapping[str, int]:
        """Return the bytes of the state tensors of all layers by name."""
        return caches(config, kv, capacity)

    def workspace(self, structure: Structure, context: int) -> int:
        """Return the bytes of inner values, inputs and outputs, as an artifact reserves them."""
        from arkinfer.exporters import cuda_workspace

        return cuda_workspace.nbytes(structure, context)

    def native(self, operators: Mapping[str, int]) -> dict[str, int]:
        """Return those of ``operators`` that have a kernel of their own."""
        absorbed = (*ABSORBED, "aten.cat", "aten.mul.Tensor")  # linears write side by side, and multiply
        return {name: count for name, count in operators.items() if name not in absorbed}
