"""What a build for ONNX will store, and what its operators cannot run, from shapes alone and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from arkinfer.artifact.tensors import TensorSpec
from arkinfer.config import ModelConfig
from arkinfer.exporters.base import BuildOptions, StoredMatrix
from arkinfer.exporters.outline import ABSORBED, CpuOutline
from arkinfer.quant.groups import activation_group
from arkinfer.structure import Structure
from arkinfer.targets import Target

BITS = {"int8": 8, "int4": 4, "int2": 2, "ternary": 2}  # of a code
_ITEM = {"fp32": 4, "fp16": 2, "int8": 1}  # bytes of a cached value
LEAST = 16  # inputs that a group is a multiple of
BLOCKS = (16, 32, 64, 128, 256)  # inputs in a block of onnxruntime's
CRUMBS = (32, 64, 128)  # inputs in a block of 2-bit codes that onnxruntime multiplies in integers


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in the file: see exporters/onnx_layout.py. ``block`` inputs share a scale."""

    kind: str  # "dense", "blocks" or "signed"
    bits: int = 0
    block: int = 0


@dataclass(frozen=True)
class Tensor:
    """A tensor of the weight file: as the file holds it, and as the model sees the same bytes."""

    spec: TensorSpec
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def plain(cls, dtype: str, *shape: int) -> Tensor:
        """Return one that is the same for both."""
        return cls(TensorSpec(dtype, shape), dtype, shape)


def layout_of(weight: StoredMatrix, form: str, products: str) -> Layout:
    """Return how ``weight`` lies in the file for the consumer ``form``.

    ``products`` is what matrices are multiplied by: "int8" (activations rounded in groups, which the blocks equal where
    onnxruntime has blocks of that size), "F32" or "F16". onnxruntime's kernels for processors are many times slower at
    multiplying floats by 2- and 8-bit codes than by 4-bit ones: for them 2-bit codes are stored in 4 bits, and 8-bit
    codes are multiplied out when the model is opened.
    """
    if weight.format == "dense":
        return Layout("dense")
    width = weight.shape[1]
    extent, bits = weight.group or width, BITS[weight.format]
    if form != "onnxruntime":
        return Layout("signed", 8 if bits == 8 else 4, extent)
    block = activation_group(weight.group, width)
    if products == "int8" and block in BLOCKS:
        return Layout("blocks", bits if bits > 2 or block in CRUMBS else 4, block)
    block = min(128, extent & -extent)  # the largest power of two that divides it
    if products == "F16":
        return Layout("blocks", bits, block)
    return Layout("signed", 8, extent) if bits == 8 else Layout("blocks", 4, block)


def tensors(layout: Layout, shape: tuple[int, ...], dtype: str, zeros: bool) -> dict[str, Tensor]:
    """Return the tensors that hold a matrix, by part; ``dtype`` (safetensors' name) is that of floats and scales."""
    rows, width = shape
    if layout.kind == "dense":
        return {"weight": Tensor.plain(dtype, rows, width)}
    groups = width // layout.block
    parts = {"weight": _codes(layout, rows, width), "scales": Tensor.plain(dtype, rows, groups)}
    if layout.kind == "blocks":
        nbytes = layout.block * layout.bits // 8
        parts["weight"] = Tensor.plain("U8", rows, groups, nbytes)
    if zeros and layout.kind == "blocks":
        parts["zeros"] = Tensor.plain("U8", rows, -(-groups * layout.bits // 8))
    elif zeros:
        parts["zeros"] = Tensor.plain("I8", rows, groups)
        if layout.bits == 4:  # the codes of all rows follow one another, and a row may end within a byte
            parts["zeros"] = Tensor(TensorSpec("U8", (-(-rows * groups // 2),)), "I4", (rows, groups))
    return parts


def words(codes: Tensor) -> Tensor:
    """Return what holds the same bytes as ``codes`` and is a table of int32."""
    rows, nbytes = codes.spec.shape
    return Tensor(TensorSpec("U8", (rows, nbytes)), "I32", (rows, nbytes // 4))


def _codes(layout: Layout, rows: int, width: int) -> Tensor:
    if layout.bits == 8:
        return Tensor.plain("I8", rows, width)
    return Tensor(TensorSpec("U8", (rows, width // 2)), "I4", (rows, width))


def reasons(config: ModelConfig, weights: Iterable[StoredMatrix], target: Target, options: BuildOptions) -> list[str]:
    """Return one sentence per obstacle to running a model; empty if there is none."""
    found = []
    kv = "fp16" if narrow(target.arch) else "fp32"
    if options.kv != kv:
        found.append(f"onnxruntime's attention keeps keys and values as it computes, {kv} here; --kv {kv}")
    if config.sparse is not None and options.attention != "dense" and narrow(target.arch):
        found.append("onnxruntime has no sparse attention on GPUs that keeps to them; --attention dense")
    return found + groups(weights)


def groups(weights: Iterable[StoredMatrix]) -> list[str]:
    """Return a sentence where a matrix has groups that no operator of ONNX takes; empty if there is none."""
    for weight in weights:
        width = weight.shape[1]
        if weight.format == "dense":
            continue
        extent = weight.group or width
        if extent % LEAST or width % extent:
            return [f"{weight.name}: groups of {extent} inputs are not multiples of {LEAST}; --weights fp16"]
    return []


def narrow(levels: Iterable[str]) -> bool:
    """Return whether values between operators are float16: on GPUs; processors compute in float32."""
    return any(level.startswith("sm_") for level in levels)


class OnnxOutline:
    """The onnxruntime backend as `arkinfer plan` sees it."""

    def reasons(
        self, config: ModelConfig, weights: Iterable[StoredMatrix], target: Target, options: BuildOptions
    ) -> list[str]:
        """Return why the operators cannot run a model; empty if they can."""
        return reasons(config, weights, target, options)

    def parameters(self, weight: StoredMatrix, dtype: str, zeros: bool, gated: bool) -> Mapping[str, TensorSpec]:
        """Return the tensors that hold one matrix."""
        found = tensors(layout_of(weight, "onnxruntime", "int8"), weight.shape, dtype, zeros)
        return {part: tensor.spec for part, tensor in found.items()}

    def caches(self, config: ModelConfig, kv: str, capacity: int) -> Mapping[str, int]:
        """Return the bytes of the state tensors of all layers by name."""
        row = config.layers * config.kv_heads * config.head_dim * _ITEM[kv]
        found, sparse = {"k": row * capacity, "v": row * capacity}, config.sparse
        if sparse is not None:
            strides = {"fine": sparse.kernel_stride, "coarse": sparse.coarse_stride}
            found |= {name: row * (capacity // stride + 1) for name, stride in strides.items()}
            found |= {"nope": row * capacity} if sparse.use_nope else {}
        return found

    def workspace(self, structure: Structure, context: int) -> int:
        """Return the bytes of inner values of a prompt's step, in float32, and of the rotation tables."""
        return CpuOutline().workspace(structure, context) + 4 * context * structure.config.head_dim

    def native(self, operators: Mapping[str, int]) -> dict[str, int]:
        """Return those of ``operators`` that have a kernel of their own."""
        return {name: count for name, count in operators.items() if name not in ABSORBED}
