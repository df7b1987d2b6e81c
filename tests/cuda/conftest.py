"""Artifacts of the cuda backend, built once a session: the cubins are kept by the compiler's own cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from arkinfer import pipeline
from arkinfer.artifact import Artifact
from arkinfer.exporters import cuda
from arkinfer.exporters.kernels.triton.cubin import Cubin, Job
from tests.checkpoints import CONFIGS, write_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random checkpoint per family, and a ternary MiniCPM."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {name: write_checkpoint(root / name, raw) for name, raw in CONFIGS.items()}
    found["bitcpm"] = write_checkpoint(root / "bitcpm", CONFIGS["minicpm"], ternary=64)
    return found


@pytest.fixture(scope="session")
def llama(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random Llama with int4 weights, not verified."""
    out = tmp_path_factory.mktemp("cuda") / "llama.ark"
    return pipeline.build(checkpoints["llama"], target="rtx-4090", out=out, weights="int4", verify="none")


def _named(jobs: Sequence[Job]) -> list[Cubin]:
    return [Cubin(b"", "", job.name, shared=0, registers=0, stack=0, num_warps=4) for job in jobs]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds leave the kernels' code empty, for tests that ask what the plan computes: other builds compile it."""
    monkeypatch.setattr(cuda, "compile_all", _named)


@pytest.fixture(scope="session")
def sparse(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random MiniCPM with int8 weights whose rows are sparse from dense_len on, verified; no code in its kernels."""
    out = tmp_path_factory.mktemp("cuda") / "sparse.ark"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "compile_all", _named)
        return pipeline.build(checkpoints["minicpm"], target="rtx-4090", out=out, weights="int8")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The references' sums depend on how many threads add them; one thread makes two executors equal to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
