"""Puts this folder on the path, and gives each test an artifact that nobody else changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import samples

from arkinfer.artifact import Artifact


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return samples.write(tmp_path / "sample.ark")
