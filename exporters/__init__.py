"""Exporters by backend name, loaded when used; a backend without an entry here cannot be built for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from arkinfer.errors import UnsupportedError

if TYPE_CHECKING:
    from arkinfer.exporters.base import Exporter, Outline
    from arkinfer.targets import Target

EXPORTERS = {
    "cuda": "arkinfer.exporters.cuda:CudaExporter",
    "mlc": "arkinfer.exporters.mlc:MlcExporter",
    "onnxruntime": "arkinfer.exporters.onnxruntime:OnnxruntimeExporter",
    "tensorrt": "arkinfer.exporters.tensorrt:TensorRtExporter",
    "tvm": "arkinfer.exporters.tvm:TvmExporter",
}
# What `plan` asks instead: they load no compiler.
OUTLINES = {
    "cuda": "arkinfer.exporters.cuda_outline:CudaOutline",
    "mlc": "arkinfer.exporters.mlc_outline:MlcOutline",
    "onnxruntime": "arkinfer.exporters.onnx_outline:OnnxOutline",
    "tensorrt": "arkinfer.exporters.tensorrt_outline:TensorRtOutline",
    "tvm": "arkinfer.exporters.outline:CpuOutline",
}

# How kernels round int8 activations where not by division, see arkinfer.ops.linear: verification rounds alike.
ROUNDING = {"onnxruntime": "int8_reciprocal"}

# Where attention that chooses blocks reads the caches to their end, and hides what was not chosen.
WHOLE_CONTEXT = ("tensorrt",)


def builds_engine(target: Target) -> bool:
    """Tell whether a build for ``target`` makes an engine of all the weights, beside the weights."""
    return target.backend == "tensorrt" and "tensorrt-rtx" in target.toolchain


def get(backend: str) -> Exporter:
    """Return the exporter for ``backend``; raises UnsupportedError if this version has none."""
    if backend not in EXPORTERS:
        raise UnsupportedError(
            f"this version of arkinfer has no exporter for the backend {backend!r}",
            facts={"available": ", ".join(sorted(EXPORTERS))},
            hint="choose a target of an available backend: arkinfer targets",
            code="ARK-E301",
        )
    module, name = EXPORTERS[backend].split(":")
    exporter: Exporter = getattr(import_module(module), name)()
    return exporter


def outline_of(backend: str) -> Outline | None:
    """Return what this version knows of payloads for ``backend`` without building one, or None."""
    if backend not in OUTLINES:
        return None
    module, name = OUTLINES[backend].split(":")
    found: Outline = getattr(import_module(module), name)()
    return found


def multiplies_floats(target: Target) -> bool:
    """Tell whether what runs ``target``'s artifacts has no products of int8 activations: kernels of GPUs."""
    return any(level.startswith("sm_") for level in target.arch)
