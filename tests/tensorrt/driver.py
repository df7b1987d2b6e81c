"""The CUDA driver in memory of tests/cuda, without a plan: TensorRT launches the kernels, not the backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cuda.bindings import driver as real

from tests.cuda.fake_driver import FakeDriver


class Stream:
    """A stream, whose address TensorRT is given."""

    def __int__(self) -> int:
        return 0x5EED


@dataclass
class MemoryDriver(FakeDriver):
    """``memory`` bytes can be allocated; no kernel can be loaded."""

    artifact: Any = None
    stream: Stream = field(default_factory=Stream)

    def __post_init__(self) -> None:
        self._next = 1 << 20

    def cuStreamCreate(self, flags: Any) -> tuple[Any, Stream]:
        return real.CUresult.CUDA_SUCCESS, self.stream

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, int]:
        raise AssertionError("the tensorrt backend loads no code by itself")
