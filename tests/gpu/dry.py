"""A GPU that is not there, for `run.py --dry`: the tests' driver in memory, whose kernels are their references."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from arkinfer.artifact import Artifact
from arkinfer.backends import cuda_driver
from arkinfer.targets import probe
from tests.gpu.shapes import Shape


@contextmanager
def gpu(folder: Path, wanted: bool) -> Iterator[None]:
    """Stand in for the driver while the artifact or plan in ``folder`` is open; do nothing unless ``wanted``."""
    with ExitStack() as stack:
        if wanted:
            from tests.cuda.fake_driver import GPU, FakeDriver

            driver = FakeDriver(Artifact.open(folder) if folder.suffix == ".ark" else Shape(folder))  # type: ignore[arg-type]
            stack.enter_context(mock.patch.object(cuda_driver, "bindings", lambda: driver))
            stack.enter_context(mock.patch.object(probe, "gpu", lambda: GPU))
        yield
