"""What a build for a GPU will store, and what its kernels cannot run, from shapes alone and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arkinfer.artifact.tensors import TensorSpec
from arkinfer.config import ModelConfig
from arkinfer.exporters.base import BuildOptions, StoredMatrix
from arkinfer.exporters.kernels.triton.kernel import ARCHS
from arkinfer.exporters.outline import ABSORBED
from arkinfer.targets import Target

BITS = {"int8": 8, "int4": 4, "int2": 2, "ternary": 2}  # of a code
CHUNK = 64  # bytes that a row of codes is a multiple of
STEP = 16  # inputs that a group of weights is a multiple of


def parameters(weight: StoredMatrix, dtype: str, zeros: bool) -> dict[str, TensorSpec]:
    """Return the tensors that hold a matrix, by part; ``dtype`` (safetensors' name) is that of floats and scales."""
    rows, width = weight.shape
    if weight.format == "dense":
        return {"weight": TensorSpec(dtype, (rows, width))}
    words = -(-width * BITS[weight.format] // (8 * CHUNK)) * (CHUNK // 4)
    grouped = (rows, width // (weight.group or width))
    parts = {"weight": TensorSpec("I32", (rows, words)), "scales": TensorSpec(dtype, grouped)}
    return {**parts, "zeros": TensorSpec("U8", grouped)} if zeros else parts


def reasons(config: ModelConfig, weights: Iterable[StoredMatrix], target: Target, options: BuildOptions) -> list[str]:
    """Return one sentence per obstacle to running a model; empty if there is none."""
    found = [f"no kernels are compiled for {level}" for level in target.arch if level not in ARCHS]
    if options.kv == "fp32":
        found.append("the CUDA kernels keep keys and values as fp16 or int8; --kv fp16")
    if config.sparse is not None and options.attention != "dense":
        found.append("sparse attention is not lowered to CUDA yet; --attention dense")
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

    def native(self, operators: Mapping[str, int]) -> dict[str, int]:
        """Return those of ``operators`` that have a kernel of their own."""
        absorbed = (*ABSORBED, "aten.cat", "aten.mul.Tensor")  # linears write side by side, and multiply
        return {name: count for name, count in operators.items() if name not in absorbed}
