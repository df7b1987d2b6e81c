"""Device side: the backend that a manifest names turns its payload into an Executor."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from arkinfer.errors import ArtifactError, nearest

if TYPE_CHECKING:
    from arkinfer.artifact import Artifact
    from arkinfer.backends.base import Executor

BACKENDS = {
    "cuda": "arkinfer.backends.cuda:open",
    "onnxruntime": "arkinfer.backends.onnxruntime:open",
    "tvm": "arkinfer.backends.tvm:open",
}


def open(artifact: Artifact, threads: int | None = None, attention: str | None = None) -> Executor:
    """Open ``artifact`` with the backend that its manifest names.

    ``threads`` None means ``ARKINFER_THREADS`` or every core; ``attention`` is auto, dense or sparse, None what the
    artifact was built for. Raises ArtifactError for a backend that this version lacks, and whatever the backend raises
    when it cannot run here.
    """
    name = artifact.manifest.backend
    if name not in BACKENDS:
        raise ArtifactError(
            f"the artifact needs the backend `{name}`, which this version of arkinfer does not have",
            facts={"artifact": artifact.path, "backends": nearest(name, list(BACKENDS))},
            hint="pip install --upgrade arkinfer",
            code="ARK-E520",
        )
    module, function = BACKENDS[name].split(":")
    executor: Executor = getattr(importlib.import_module(module), function)(artifact, threads, attention)
    return executor
