"""What a build for TensorRT will store, and what it cannot run, from shapes alone and without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from arkinfer.artifact.engine_recipe import LIBRARIES
from arkinfer.artifact.tensors import TensorSpec
from arkinfer.config import ModelConfig
from arkinfer.exporters import onnx_outline
from arkinfer.exporters.base import BuildOptions, StoredMatrix
from arkinfer.exporters.outline import ABSORBED, CpuOutline
from arkinfer.targets import Target

if TYPE_CHECKING:
    from arkinfer.structure import Structure

FORM = "tensorrt"
VERIFIED, CHUNK, ROWS = 8, 512, 64  # tokens of a verification; tokens, and rows of logits, of a prompt's step
# Package of a target's toolchain -> the module that it is imported as.
PACKAGES = {name.replace("_", "-"): name for name in LIBRARIES}
AHEAD = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")  # what TensorRT for RTX builds for


def library(target: Target) -> tuple[str, str]:
    """Return the module of the target's TensorRT and the range of its versions, "" where its toolchain names none."""
    for package, versions in target.toolchain.items():
        if package in PACKAGES:
            return PACKAGES[package], versions
    return "", ""


def reasons(config: ModelConfig, weights: Iterable[StoredMatrix], target: Target, options: BuildOptions) -> list[str]:
    """Return one sentence per obstacle to running a model; empty if there is none."""
    found = []
    name, _ = library(target)
    if not name:
        found.append(f"the target's toolchain names none of {', '.join(PACKAGES)}")
    if name == "tensorrt_rtx":
        found += [f"TensorRT for RTX builds nothing for {level}" for level in target.arch if level not in AHEAD]
        if len(target.arch) > 1:
            found.append("an engine is built ahead of time for one architecture")
    if options.kv != "fp16":
        found.append("TensorRT updates caches of float16 alone; --kv fp16")
    return found + onnx_outline.groups(weights)


class TensorRtOutline:
    """The tensorrt backend as `arkinfer plan` sees it."""

    def reasons(
        self, config: ModelConfig, weights: Iterable[StoredMatrix], target: Target, options: BuildOptions
    ) -> list[str]:
        """Return why TensorRT cannot run a model; empty if it can."""
        return reasons(config, weights, target, options)

    def parameters(self, weight: StoredMatrix, dtype: str, zeros: bool, gated: bool) -> Mapping[str, TensorSpec]:
        """Return the tensors that hold one matrix."""
        layout = onnx_outline.layout_of(weight, FORM, "F16")
        found = onnx_outline.tensors(layout, weight.shape, dtype, zeros)
        return {part: tensor.spec for part, tensor in found.items()}

    def caches(self, config: ModelConfig, kv: str, capacity: int) -> Mapping[str, int]:
        """Return the bytes of the state tensors of all layers by name."""
        return onnx_outline.OnnxOutline().caches(config, kv, capacity)

    def workspace(self, structure: Structure, context: int) -> int:
        """Return the bytes of a prompt's step: inner values as TensorRT may keep them, the mask, rows of logits.

        TensorRT decides what it keeps at once; nothing was measured.
        """
        mask, logits = 2 * CHUNK * context, 4 * ROWS * structure.config.vocab_size
        return CpuOutline().workspace(structure, context) + mask + logits

    def native(self, operators: Mapping[str, int]) -> dict[str, int]:
        """Return those of ``operators`` that have a layer of their own."""
        return {name: count for name, count in operators.items() if name not in ABSORBED}
