"""Exporters by backend name, loaded when used; a backend without an entry here cannot be built for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from arkinfer.errors import UnsupportedError

if TYPE_CHECKING:
    from arkinfer.exporters.base import Exporter, Outline

EXPORTERS = {"cuda": "arkinfer.exporters.cuda:CudaExporter", "tvm": "arkinfer.exporters.tvm:TvmExporter"}
# What `plan` asks instead: they load no compiler.
OUTLINES = {
    "cuda": "arkinfer.exporters.cuda_outline:CudaOutline",
    "tvm": "arkinfer.exporters.outline:CpuOutline",
}
ACTIVATIONS = {"cuda": "float"}  # what auto means, where it is not for the weights to decide


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
