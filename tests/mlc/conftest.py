"""One package that computes exactly, so that calls can be compared number by number."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import arkinfer
from arkinfer.artifact import Artifact
from arkinfer.backends import mlc


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The bundled model with its LongRoPE factors and muP scalings, in float32, verified."""
    out = tmp_path_factory.mktemp("mlc") / "package.ark"
    options = {"weights": "fp32", "kv": "fp32", "context": 1024, "quality": "off"}
    return arkinfer.build("tiny-minicpm", "mlc-android", out=out, **options)


@pytest.fixture(scope="session")
def executor(package: Artifact) -> Iterator[mlc.MlcExecutor]:
    opened = mlc.open(package, threads=2)
    yield opened
    opened.close()
