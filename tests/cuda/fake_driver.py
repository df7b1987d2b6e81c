"""A CUDA driver in memory: the functions of cuda.bindings.driver that the backend calls, kernels by their references.

Device memory is bytes at made-up addresses; a pointer outside of what was allocated is a fault of the test. A launch
must have the grid, block, shared memory and arguments that the plan states. Captured launches run when the graph does.
"""

from __future__ import annotations

import bisect
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cuda.bindings import driver as real

from arkinfer.artifact import Artifact
from arkinfer.artifact.plan import BLOCK, Kernel, Plan, evaluate
from arkinfer.backends.cuda_driver import places
from arkinfer.exporters.kernels import triton as kernels
from arkinfer.interpreter import DTYPES
from arkinfer.targets.probe import Gpu

GPU = Gpu("A GPU that is not there", "sm_89", 1 << 34, "13.0")
_OK = real.CUresult.CUDA_SUCCESS


@dataclass
class FakeDriver:
    """Stands for the module; ``memory`` bytes can be allocated."""

    artifact: Artifact
    memory: int = 1 << 32
    integrated: bool = False
    launches: int = 0
    captures: int = 0
    replays: int = 0
    uploads: int = 0
    largest: int = 0  # bytes of an upload
    downloads: int = 0
    downloaded: int = 0  # bytes
    translated: int = 0
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    recording: list[Callable[[], None]] | None = None

    def __post_init__(self) -> None:
        self.plan = Plan.from_json(self.artifact.file("payload/plan.json").read_text(encoding="utf-8"))
        self._loaded = 0
        self._large: set[int] = set()
        self._next = 1 << 20
        self.sizes = {"n": 1, "r": 1}

    def __getattr__(self, name: str) -> Any:
        """Types and constants are the real ones; functions that are not written below do not exist."""
        if name.startswith("CU"):
            return getattr(real, name)
        raise AttributeError(name)

    def cuInit(self, flags: int) -> tuple[Any]:
        return (_OK,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, int]:
        return _OK, ordinal

    def cuDeviceGetAttribute(self, attribute: Any, device: int) -> tuple[Any, int]:
        assert attribute == real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
        return _OK, int(self.integrated)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, str]:
        return _OK, "context"

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any]:
        return (_OK,)

    def cuCtxSetCurrent(self, context: str) -> tuple[Any]:
        return (_OK,)

    def cuStreamCreate(self, flags: Any) -> tuple[Any, str]:
        return _OK, "stream"

    def cuStreamDestroy(self, stream: str) -> tuple[Any]:
        return (_OK,)

    def cuStreamSynchronize(self, stream: str) -> tuple[Any]:
        assert self.recording is None
        return (_OK,)

    # Events: the host's clock, since launches run at once

    def cuEventCreate(self, flags: int) -> tuple[Any, list[float]]:
        return _OK, [0.0]

    def cuEventRecord(self, event: list[float], stream: str) -> tuple[Any]:
        event[0] = time.perf_counter()
        return (_OK,)

    def cuEventSynchronize(self, event: list[float]) -> tuple[Any]:
        return (_OK,)

    def cuEventElapsedTime(self, start: list[float], end: list[float]) -> tuple[Any, float]:
        return _OK, 1e3 * (end[0] - start[0])

    # Memory

    def used(self) -> int:
        return sum(block.numel() for block in self.blocks.values())

    def cuMemGetInfo(self) -> tuple[Any, int, int]:
        assert not self.integrated, "it counts what the system could give back as taken"
        return _OK, self.memory - self.used(), self.memory

    def cuMemAlloc(self, nbytes: int) -> tuple[Any, int]:
        if nbytes > self.memory - self.used():
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        address, self._next = self._next, self._next + -(-nbytes // 256) * 256 + (1 << 16)
        self.blocks[address] = torch.full((nbytes,), 0xFF, dtype=torch.uint8)
        return _OK, address

    def cuMemFree(self, address: int) -> tuple[Any]:
        del self.blocks[address]
        return (_OK,)

    def at(self, address: int, nbytes: int) -> torch.Tensor:
        """Return the memory from ``address`` on, which must be allocated as one block."""
        starts = sorted(self.blocks)
        start = starts[bisect.bisect_right(starts, address) - 1]
        block = self.blocks[start]
        assert start <= address and address + nbytes <= start + block.numel(), "outside of what was allocated"
        return block[address - start : address - start + nbytes]

    def held(self, address: int) -> int:
        """Return the tokens that the caches at ``address`` have room for, by the size of their block."""
        start = max(start for start in self.blocks if start <= address)
        size, caches = self.blocks[start].numel(), self.plan.of_kind("cache")
        rooms = range(BLOCK, self.plan.capacity + 1, BLOCK)
        return next(room for room in rooms if places({b.name: b.nbytes({"c": room}) for b in caches})[1] == size)

    def cuMemsetD8Async(self, address: int, value: int, nbytes: int, stream: str) -> tuple[Any]:
        assert self.recording is None
        self.at(address, nbytes).fill_(value)
        return (_OK,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: str) -> tuple[Any]:
        assert self.recording is None
        self.uploads, self.largest = self.uploads + 1, max(self.largest, nbytes)
        self.at(target, nbytes).copy_(torch.frombuffer(bytearray(ctypes.string_at(source, nbytes)), dtype=torch.uint8))
        return (_OK,)

    def cuMemcpyDtoHAsync(self, target: int, source: int, nbytes: int, stream: str) -> tuple[Any]:
        assert self.recording is None
        self.downloads, self.downloaded = self.downloads + 1, self.downloaded + nbytes
        data = self.at(source, nbytes).numpy()
        ctypes.memmove(target, data.ctypes.data, nbytes)
        return (_OK,)

    def cuMemcpyDtoDAsync(self, target: int, source: int, nbytes: int, stream: str) -> tuple[Any]:
        assert self.recording is None
        self.at(target, nbytes).copy_(self.at(source, nbytes))
        return (_OK,)

    # Code

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, int]:
        index, self._loaded = self._loaded, self._loaded + 1
        found = self.plan.kernels[index].images["sm_89"]
        if image != self.artifact.file(found.file).read_bytes():
            assert image == self.artifact.file(found.ptx).read_bytes() + b"\0"
            self.translated += 1
        return _OK, index

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, int]:
        assert name.decode() == self.plan.kernels[module].images["sm_89"].entry
        return _OK, module

    def cuModuleUnload(self, module: int) -> tuple[Any]:
        return (_OK,)

    def cuFuncSetAttribute(self, function: int, attribute: Any, value: int) -> tuple[Any]:
        assert value == self.plan.kernels[function].images["sm_89"].shared
        self._large.add(function)
        return (_OK,)

    def cuLaunchKernel(
        self, function: int, x: int, y: int, z: int, threads: int, two: int, three: int, shared: int, stream: str,
        parameters: tuple[tuple[int, ...], tuple[Any, ...]], extra: int,
    ) -> tuple[Any]:  # fmt: skip
        kernel = self.plan.kernels[function]
        image = kernel.images["sm_89"]
        values, types = parameters
        assert (threads, two, three, shared) == (32 * image.warps, 1, 1, image.shared)
        assert shared <= 48 << 10 or function in self._large
        assert len(values) == len(types) == len(kernel.arguments) + 2 and values[-2:] == (0, 0)
        sizes = self.sizes = _sizes(kernel, values, (x, y, z), self.sizes)
        pairs = zip(kernel.arguments, values, strict=False)
        cached = [value for argument, value in pairs if any("c" in str(extent) for extent in argument.shape)]
        sizes["c"] = self.held(cached[0]) if cached else 0
        assert (x, y, z) == tuple(evaluate(extent, sizes) for extent in image.grid)
        assert 0 < x < 1 << 31 and 0 < y < 1 << 16 and 0 < z < 1 << 16

        def run() -> None:
            self.launches += 1
            arguments: dict[str, Any] = {}
            for argument, value, kind in zip(kernel.arguments, values[:-2], types[:-2], strict=True):
                assert kind is (ctypes.c_int32 if argument.role == "scalar" else ctypes.c_void_p)
                arguments[argument.name] = value
                if argument.role != "scalar":
                    assert value % 16 == 0
                    memory = self.at(value, argument.span(sizes)).view(DTYPES[argument.dtype])
                    shape = argument.extents(sizes)
                    arguments[argument.name] = memory.as_strided(
                        shape, argument.strides(sizes), memory.storage_offset()
                    )
            description = kernels.kernel(kernel.name)
            description.reference(description.parse(kernel.options), arguments, sizes["n"], sizes["r"])

        if self.recording is None:
            run()
        else:
            self.recording.append(run)
        return (_OK,)

    # Graphs

    def cuStreamBeginCapture(self, stream: str, mode: Any) -> tuple[Any]:
        assert self.recording is None
        self.captures += 1
        self.recording = []
        return (_OK,)

    def cuStreamEndCapture(self, stream: str) -> tuple[Any, list[Callable[[], None]]]:
        assert self.recording is not None
        recorded, self.recording = self.recording, None
        return _OK, recorded

    def cuGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[Any, int]:
        handle = self.captures
        self.graphs[handle] = graph
        return _OK, handle

    def cuGraphExecDestroy(self, graph: int) -> tuple[Any]:
        del self.graphs[graph]
        return (_OK,)

    def cuGraphDestroy(self, graph: Any) -> tuple[Any]:
        return (_OK,)

    def cuGraphLaunch(self, graph: int, stream: str) -> tuple[Any]:
        self.replays += 1
        for run in self.graphs[graph]:
            run()
        return (_OK,)


def _sizes(kernel: Kernel, values: tuple[int, ...], grid: tuple[int, ...], before: dict[str, int]) -> dict[str, int]:
    """Return the n and r that a launch must have been made for: its scalars and its grid tell, else those before it."""
    sizes = dict(before)
    for argument, value in zip(kernel.arguments, values, strict=False):
        if argument.role == "scalar" and argument.shape[0] in sizes:
            sizes[str(argument.shape[0])] = value
    for extent, value in zip(kernel.images["sm_89"].grid, grid, strict=True):
        if extent in sizes:
            sizes[str(extent)] = value
    return sizes


def different_from_the_real_one() -> dict[str, tuple[int, int]]:
    """Return the functions whose number of arguments differs from the real one's: (here, there)."""
    wrong = {}
    for name in (name for name in vars(FakeDriver) if name.startswith("cu")):
        text = (getattr(real, name).__doc__ or "").strip().splitlines()[0]
        inside = text[text.index("(") + 1 : text.rindex(")")]
        there = len([part for part in inside.split(",") if part.strip()])
        here = getattr(FakeDriver, name).__code__.co_argcount - 1
        if here != there:
            wrong[name] = here, there
    return wrong
