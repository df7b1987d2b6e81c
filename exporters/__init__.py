"""Exporters by backend name, loaded when used; a backend without an entry here cannot be built for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from arkinfer.errors import UnsupportedError

if TYPE_CHECKING:
    from arkinfer.exporters.base import Exporter

EXPORTERS = {"tvm": "arkinfer.exporters.tvm:TvmExporter"}


def get(backend: str) -> Exporter:
    """Return the exporter for ``backend``; raises UnsupportedError if this version has none."""
    location = EXPORTERS.get(backend)
    if location is None:
        raise UnsupportedError(
            f"this version of arkinfer has no exporter for the backend {backend!r}",
            facts={"available": ", ".join(sorted(EXPORTERS))},
            hint="choose a target of an available backend: arkinfer targets",
            code="ARK-E301",
        )
    module, name = location.split(":")
    exporter: Exporter = getattr(import_module(module), name)()
    return exporter
