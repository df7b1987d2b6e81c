"""Device side: the backend that a manifest names turns its payload into an Executor."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from arkinfer.errors import ArtifactError, nearest

if TYPE_CHECKING:
    from arkinfer.artifact import Artifact
    from arkinfer.backends.base import Executor
    from arkinfer.backends.tensorrt_finish import Finished

BACKENDS = {
    "cuda": "arkinfer.backends.cuda:open",
    "mlc": "arkinfer.backends.mlc:open",
    "onnxruntime": "arkinfer.backends.onnxruntime:open",
    "tensorrt": "arkinfer.backends.tensorrt:open",
    "tvm": "arkinfer.backends.tvm:open",
}
# What is built on the device, for backends that have such a thing.
FINISHERS = {"tensorrt": "arkinfer.backends.tensorrt_finish:finish"}


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


def finish(
    artifact: Artifact,
    say: Callable[[str], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    force: bool = False,
) -> Finished | None:
    """Build on this device what cannot be built elsewhere, unless it is there and ``force`` is false.

    Returns None for an artifact that runs as it is. ``say`` is told in a sentence when work begins. Raises whatever the
    backend raises when it cannot run here.
    """
    if artifact.manifest.backend not in FINISHERS:
        return None
    module, function = FINISHERS[artifact.manifest.backend].split(":")
    finished: Finished | None = getattr(importlib.import_module(module), function)(artifact, say, progress, force)
    return finished
