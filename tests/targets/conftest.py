"""A folder for target files, and a way to read one from its text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arkinfer import targets
from arkinfer.targets import Target


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Target]:
    """Return a function that writes the text to a YAML file and loads it as a target."""

    def load(text: str | bytes, name: str = "device.yaml") -> Target:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return targets.load(tmp_path / name)

    return load
