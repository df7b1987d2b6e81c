"""A device with TensorRT that is not there: its GPU, its driver's memory, its Python package, its cache folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from arkinfer.artifact import Artifact
from arkinfer.backends import cuda_driver, tensorrt_finish
from arkinfer.targets import probe
from tests.cuda.fake_driver import GPU
from tests.tensorrt import decoder, runtime
from tests.tensorrt.driver import MemoryDriver

MIMIC = Path(__file__).parent / "mimic"
Orin = Callable[..., MemoryDriver]


@pytest.fixture(scope="session")
def jetson(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The decoder written by hand, as an artifact whose engine the device builds."""
    return decoder.write_artifact(tmp_path_factory.mktemp("tensorrt") / "decoder.ark", decoder.recipe())


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that tests of the backend share, so that they build one engine."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch, engines: Path) -> Orin:
    """Return a function that makes this process, and those that it starts, think that they are on a Jetson Orin."""

    def make(
        artifact: Artifact,
        memory: int = 1 << 30,
        version: str = "10.16.2.10",
        level: str = "sm_87",
        cache: Path = engines,
    ) -> MemoryDriver:
        driver = MemoryDriver(memory=memory)
        recipe = tensorrt_finish.read_recipe(artifact)
        runtime.CURRENT.append(runtime.Scene(driver, artifact.file(recipe.model), recipe))
        monkeypatch.setenv("ARKINFER_CACHE", str(cache))
        monkeypatch.setenv("MIMIC_VERSION", version)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(MIMIC), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.syspath_prepend(MIMIC)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        monkeypatch.setattr(cuda_driver, "bindings", lambda: driver)
        monkeypatch.setattr(probe, "gpu", lambda: replace(GPU, level=level))
        return driver

    return make
