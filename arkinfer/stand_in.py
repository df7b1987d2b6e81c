"""Executors that run on this processor what was built for another device."""

from __future__ import annotations

from arkinfer.artifact import Artifact
from arkinfer.backends.base import Executor
from arkinfer.backends.mlc import MlcExecutor
from arkinfer.backends.onnxruntime import OnnxruntimeExecutor


def on_processor(artifact: Artifact) -> Executor:
    """Open an ONNX artifact of a GPU with onnxruntime's kernels for processors: slow, and the same model."""
    return OnnxruntimeExecutor(artifact, None, None, "cpu")


def in_place_of_app(artifact: Artifact) -> Executor:
    """Open the form for this processor of an MLC package's library."""
    return MlcExecutor(artifact, None, None)
