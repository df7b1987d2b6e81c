"""The CUDA driver through cuda-bindings: checked calls, one device, one stream, memory by address."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arkinfer.errors import InternalError, UnsupportedError
from arkinfer.targets import probe

ALIGNMENT = 256  # bytes; what cuMemAlloc promises
SHARED_DEFAULT = 48 << 10  # bytes of shared memory that a launch may have without asking for more
BLOCK = 64  # contexts are whole attention blocks
COPIED, COPIES = 256 << 20, 8  # bytes, far more than a cache holds, and times that they are copied for one measurement
_TYPES = {"pointer": ctypes.c_void_p, "int32": ctypes.c_int32}


def bindings() -> Any:
    """Return cuda-bindings' driver module."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UnsupportedError(
            "the cuda backend needs the package cuda-bindings", hint="pip install 'arkinfer[cuda]'", code="ARK-E310"
        ) from error
    return driver


def present_gpu(levels: Sequence[str], target: str) -> probe.Gpu:
    """Return this machine's GPU. Raises UnsupportedError, which says what is missing, where there is none."""
    found = probe.gpu()
    if found is not None:
        return found
    driver = "present, but it shows no GPU" if probe.cuda_driver() is not None else "not installed (no libcuda.so.1)"
    raise UnsupportedError(
        "this artifact needs an NVIDIA GPU, and this machine has none that can be used",
        facts={"made for": f"{target} ({', '.join(levels)})", "NVIDIA driver": driver},
        hint="run it on such a machine, or here: arkinfer verify NAME.ark compares it with the reference on the CPU\n"
        "arkinfer build MODEL --target cpu",
        code="ARK-E341",
    )


class Driver:
    """The first GPU's primary context and one stream. A call that fails raises an ArkError with the driver's word.

    ``integrated``: the GPU shares the system's memory (Jetson).
    """

    def __init__(self) -> None:
        self.cu = bindings()
        self.call("cuInit", 0)
        self.device = self.call("cuDeviceGet", 0)
        shares = self.cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
        self.integrated = bool(self.call("cuDeviceGetAttribute", shares, self.device))
        self.context = self.call("cuDevicePrimaryCtxRetain", self.device)
        self.call("cuCtxSetCurrent", self.context)
        self.stream = self.call("cuStreamCreate", self.cu.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._blocks: list[int] = []
        self._modules: list[Any] = []

    def call(self, name: str, *arguments: Any) -> Any:
        """Call ``name`` and return its result: a value, a tuple of several, or None."""
        status, *values = getattr(self.cu, name)(*arguments)
        if status != self.cu.CUresult.CUDA_SUCCESS:
            word = getattr(status, "name", str(status))
            if "OUT_OF_MEMORY" in word:
                raise UnsupportedError(
                    "the GPU's memory is full",
                    facts={"call": name},
                    hint="close other programs that use the GPU, or build with a smaller --context",
                    code="ARK-E343",
                )
            raise InternalError("the CUDA driver refused a call", facts={"call": name, "status": word}, code="ARK-E712")
        return values[0] if len(values) == 1 else tuple(values) or None

    def current(self) -> None:
        """Make the context that of the calling thread: steps may come from any."""
        self.call("cuCtxSetCurrent", self.context)

    def free_memory(self) -> int:
        """Return the bytes that can still be allocated.

        An integrated GPU has the system's memory; the driver counts its cached files as taken, the system does not.
        """
        return probe.machine().available if self.integrated else int(self.call("cuMemGetInfo")[0])

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory, all zeros; ``close`` frees it."""
        address = int(self.call("cuMemAlloc", max(nbytes, 1)))
        self._blocks.append(address)
        self.call("cuMemsetD8Async", address, 0, max(nbytes, 1), self.stream)
        return address

    def free(self, address: int) -> None:
        """Free what ``allocate`` gave."""
        if address in self._blocks:
            self._blocks.remove(address)
            self.call("cuMemFree", address)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy ``array`` to the device; it may change once this returns."""
        data = np.ascontiguousarray(array)
        if data.nbytes:
            self.call("cuMemcpyHtoDAsync", address, data.ctypes.data, data.nbytes, self.stream)
            self.wait()

    def download(self, array: np.ndarray, address: int) -> None:
        """Fill ``array`` from the device once all that was started before is done."""
        if array.nbytes:
            self.call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self.stream)
        self.wait()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the device's memory."""
        self.call("cuMemcpyDtoDAsync", target, source, nbytes, self.stream)

    def wait(self) -> None:
        """Return when the stream is idle."""
        self.call("cuStreamSynchronize", self.stream)

    def function(self, image: bytes, entry: str, shared: int) -> Any:
        """Load a cubin, or PTX with a final zero byte, and return its function."""
        module = self.call("cuModuleLoadData", image)
        self._modules.append(module)
        function = self.call("cuModuleGetFunction", module, entry.encode())
        if shared > SHARED_DEFAULT:
            attribute = self.cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.call("cuFuncSetAttribute", function, attribute, shared)
        return function

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        values: Sequence[int],
        kinds: Sequence[str],
    ) -> None:
        """Start a kernel. ``values`` are addresses (kind "pointer") and numbers ("int32"); two zero words follow."""
        types = (*(_TYPES[kind] for kind in kinds), ctypes.c_void_p, ctypes.c_void_p)
        self.call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, self.stream, ((*values, 0, 0), types), 0)

    def capture(self, work: Any) -> Any:
        """Record what ``work()`` starts, without running it, and return it as a graph for ``replay``."""
        mode = self.cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            self.cu.cuStreamEndCapture(self.stream)  # whatever it says: the stream must be usable again
            raise
        graph = self.call("cuStreamEndCapture", self.stream)
        try:
            return self.call("cuGraphInstantiate", graph, 0)
        finally:
            self.call("cuGraphDestroy", graph)

    def replay(self, executable: Any) -> None:
        """Start a captured graph."""
        self.call("cuGraphLaunch", executable, self.stream)

    def forget(self, executable: Any) -> None:
        """Release a captured graph."""
        self.call("cuGraphExecDestroy", executable)

    def measure_copying(self, seconds: float) -> float:
        """Measure for about ``seconds`` how fast memory is copied on the device: bytes read and written, in bytes/s."""
        self.current()
        size = min(COPIED, self.free_memory() // 4)
        blocks = [self.allocate(size) for _ in range(2)]
        best, stop = 0.0, time.monotonic() + seconds
        try:
            while not best or time.monotonic() < stop:
                self.wait()
                start = time.perf_counter()
                for _ in range(COPIES):
                    self.copy(blocks[0], blocks[1], size)
                self.wait()
                best = max(best, 2 * COPIES * size / (time.perf_counter() - start))
        finally:
            for block in blocks:
                self.free(block)
        return best

    def close(self) -> None:
        """Free all memory, code and the context."""
        self.current()
        self.wait()
        for address in list(self._blocks):
            self.free(address)
        for module in self._modules:
            self.call("cuModuleUnload", module)
        self._modules = []
        self.call("cuStreamDestroy", self.stream)
        self.call("cuDevicePrimaryCtxRelease", self.device)


def require_memory(driver: Driver, fixed: int, cache: int, context: int) -> None:
    """Raise UnsupportedError if ``fixed`` and ``cache`` bytes, the caches of ``context`` tokens, are not free."""
    free = driver.free_memory()
    if fixed + cache <= free:
        return
    largest = max(0, free - fixed) * context // max(1, cache) // BLOCK * BLOCK
    raise UnsupportedError(
        "the GPU has too little free memory for this artifact",
        facts={
            "needed": f"{fixed + cache:,} bytes",
            "free": f"{free:,} bytes",
            "context": f"{context:,} tokens",
            "context that would fit": f"{largest:,} tokens" if largest else "none: the weights alone are too large",
        },
        hint=f"arkinfer build MODEL --context {largest}" if largest else "arkinfer build MODEL --weights int4",
        code="ARK-E343",
    )


def places(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Return where each of ``sizes`` (bytes by name) lies in one block, and the block's bytes."""
    offsets, end = {}, 0
    for name, size in sizes.items():
        offsets[name] = end
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end
