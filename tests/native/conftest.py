"""Artifacts with the runner, built once for all tests of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arkinfer import pipeline, targets
from arkinfer.artifact import Artifact
from arkinfer.targets import probe
from tests.native.capi import Library

Build = Callable[..., Artifact]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build a bundled model for this machine's processor with the runner, once for each set of options."""
    folder = tmp_path_factory.mktemp("native")
    target = folder / "mine.yaml"
    level = probe.level_for(targets.load("cpu"))
    text = f"extends: cpu\narch: [{level}]\nnative: true\ndescription: With the runner\n"
    target.write_text(text, encoding="utf-8")
    made: dict[str, Artifact] = {}

    def make(model: str, **options: object) -> Artifact:
        name = "-".join([model, *(f"{key}={value}" for key, value in sorted(options.items()))])
        if name not in made:
            out: Path = folder / f"{name}.ark"
            made[name] = pipeline.build(model, str(target), out=out, verify="none", quality="off", **options)
        return made[name]

    return make


@pytest.fixture(scope="session")
def tiny(build: Build) -> Artifact:
    return build("tiny-minicpm")


@pytest.fixture(scope="session")
def library(tiny: Artifact) -> Library:
    return Library(tiny.file("payload/native/libarkinfer.so"))
