"""Exporters by backend name, loaded when used; a backend without an entry here cannot be built for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from arkinfer.errors import UnsupportedError

if TYPE_CHECKING:
    from arkinfer.exporters.base import Exporter
    from arkinfer.exporters.outline import CpuOutline

EXPORTERS = {"tvm": "arkinfer.exporters.tvm:TvmExporter"}
OUTLINES = {"tvm": "arkinfer.exporters.outline:CpuOutline"}  # what `plan` asks instead: they load no compiler


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


def outline_of(backend: str) -> CpuOutline | None:
    """Return what this version knows of payloads for ``backend`` without building one, or None."""
    if backend not in OUTLINES:
        return None
    module, name = OUTLINES[backend].split(":")
    found: CpuOutline = getattr(import_module(module), name)()
    return found
