"""The tvm backend: a compiled Relax module, mapped weights, and caches that the kernels update in place.

Only numpy, tvm_ffi and libtvm_runtime are loaded; the compiler stays on the build host.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arkinfer import targets
from arkinfer.artifact import Artifact
from arkinfer.artifact.tensors import load as load_tensors
from arkinfer.backends.base import Executor, State, truncated
from arkinfer.backends.gears import decode_bytes, gear
from arkinfer.backends.payload import read_plan
from arkinfer.errors import ArtifactError, UnsupportedError, UserError
from arkinfer.targets import probe

PLAN_FORMAT = 1  # of payload/plan.json
BLOCK = 64  # capacities are whole attention blocks
_CPU = 1  # DLPack's kDLCPU
_POOLED = 2  # the VM's pooled allocator
_SUFFIXES = {"macos": ".dylib"}  # of shared libraries, where it is not .so

_runtime: ctypes.CDLL | None = None


def thread_count(threads: int | None) -> int:
    """Return how many threads compute: ``threads``, else ``ARKINFER_THREADS``, else one for each core."""
    count = threads or int(os.environ.get("ARKINFER_THREADS", "0")) or probe.cores()
    if count < 1:
        raise UserError(f"threads must be at least 1, not {count}", code="ARK-E212")
    return count


def load_ffi(threads: int) -> Any:
    """Load the TVM runtime library once per process and set its pool to ``threads``; return the tvm_ffi module."""
    global _runtime
    if _runtime is None:
        # Read once, when the pool starts: pinning the caller would confine every thread that it spawns later.
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        os.environ["TVM_NUM_THREADS"] = str(os.cpu_count() or 1)
    # tvm_ffi imports torch wherever it finds it, only to exchange tensors with it; a runtime has no use for either.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm_ffi
    except ImportError as error:
        raise UnsupportedError(
            "the tvm backend needs the package apache-tvm-ffi", hint="pip install 'arkinfer[tvm]'", code="ARK-E310"
        ) from error
    finally:
        if hidden:
            del sys.modules["torch"]
    if _runtime is None:
        spec = importlib.util.find_spec("tvm")
        roots = list(spec.submodule_search_locations or ()) if spec is not None else []
        libraries = [file for root in roots for file in Path(root).glob("**/libtvm_runtime.*") if file.suffix != ".py"]
        if not libraries:
            raise UnsupportedError(
                "the tvm backend needs the library libtvm_runtime of the package apache-tvm",
                hint="pip install 'arkinfer[tvm]'",
                code="ARK-E310",
            )
        _runtime = ctypes.CDLL(str(libraries[0]), ctypes.RTLD_GLOBAL)
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
    return tvm_ffi


def _targets_here() -> str:
    """Return the shipped targets that this machine runs, as words."""
    found = [name for name in targets.names() if probe.level_for(targets.load(name)) is not None]
    return ", ".join(f"--target {name}" for name in found) or "none of the shipped targets is"


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return zeros at a 64-byte boundary; untouched pages of a large array take no memory."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.zeros(nbytes + 64, np.uint8)
    offset = -buffer.ctypes.data % 64
    array: np.ndarray = buffer[offset : offset + nbytes].view(dtype).reshape(shape)
    return array


@dataclass(frozen=True)
class CacheSpec:
    """One state tensor of all layers. ``shape`` holds -1 at the axis that grows: one entry every ``stride`` tokens,
    ``pack`` entries to a place.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: int
    pack: int

    def extents(self, capacity: int) -> tuple[int, ...]:
        """Return the shape that holds ``capacity`` tokens, a multiple of BLOCK."""
        extent = max(1, -(-(capacity // self.stride) // self.pack))
        return tuple(extent if axis == -1 else axis for axis in self.shape)

    def nbytes(self, capacity: int) -> int:
        """Return the bytes that ``capacity`` tokens, a multiple of BLOCK, take."""
        return math.prod(self.extents(capacity)) * np.dtype(self.dtype).itemsize

    def allocate(self, capacity: int) -> np.ndarray:
        return aligned(self.extents(capacity), np.dtype(self.dtype))

    def used(self, length: int) -> tuple[slice, ...]:
        """Return the index of what ``length`` tokens have filled."""
        axis = self.shape.index(-1)
        return (slice(None),) * axis + (slice(0, -(-length // (self.stride * self.pack))),)


class TvmState(State):
    """The caches of one sequence."""

    def __init__(self, executor: TvmExecutor, capacity: int) -> None:
        self._executor = executor
        self.length = 0
        self.capacity = capacity
        self.arrays = {spec.name: spec.allocate(capacity) for spec in executor.cache_specs}
        self.tensors = [executor.ffi.from_dlpack(array) for array in self.arrays.values()]

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on; later steps overwrite what the caches hold of them."""
        self.length = truncated(self, length)

    def fork(self) -> TvmState:
        """Return an independent copy."""
        twin = TvmState(self._executor, self.capacity)
        for spec in self._executor.cache_specs:
            filled = spec.used(self.length)  # copying the rest would only take memory that is not in use
            twin.arrays[spec.name][filled] = self.arrays[spec.name][filled]
        twin.length = self.length
        return twin


class TvmExecutor(Executor):
    """Runs one artifact's compiled module. Not thread-safe: the Engine serialises its steps."""

    def __init__(self, artifact: Artifact, threads: int | None, attention: str | None) -> None:
        self.threads = thread_count(threads)
        self.ffi = load_ffi(self.threads)
        self.plan = plan = read_plan(artifact, PLAN_FORMAT)
        target = artifact.manifest.target
        self.isa = probe.usable(plan["isa"], target.get("platform")) or ""
        if not self.isa:
            machine = probe.machine()
            levels = ", ".join(machine.levels) or "no level that arkinfer knows"
            raise UnsupportedError(
                "this artifact holds no code for this machine",
                facts={
                    "artifact": f"{target.get('platform') or 'linux'}: {', '.join(plan['isa'])}",
                    "this machine": f"{probe.system()} {machine.architecture}: {levels}",
                },
                hint=f"copy it to such a device, or build for this machine: {_targets_here()}",
                code="ARK-E311",
            )
        self.vocab_size = int(plan["vocab_size"])
        self.max_context = int(plan["max_context"])
        self.cache_specs = [CacheSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in plan["caches"]]
        self._attention = attention or artifact.manifest.attention
        self._gear = gear(plan["sparse"], self._attention)
        frequencies = plan["rope"]["inverse_frequencies"]
        self._frequencies = np.array([float.fromhex(value) for value in frequencies], np.float32)
        self._magnitude = np.float32(float.fromhex(plan["rope"]["magnitude"]))
        library = f"payload/{self.isa}{_SUFFIXES.get(probe.system(), '.so')}"
        try:
            module = self.ffi.load_module(str(artifact.file(library).resolve()))
            machine = module["vm_load_executable"]()
            machine["vm_initialization"](_CPU, 0, _POOLED)
        except Exception as error:  # tvm_ffi raises types of its own for any load failure
            raise ArtifactError(
                "the compiled module does not load",
                facts={"file": library, "reason": str(error).splitlines()[-1]},
                hint="build the artifact again with this version of apache-tvm",
                code="ARK-E510",
            ) from error
        self._machine = machine
        self._step, self._decode, self._trace = machine["step"], machine["decode"], machine["trace"]
        self._arrays = load_tensors(artifact.file(plan["weights"]), ArtifactError, "ARK-E511")
        self._parameters = self.ffi.convert([self.ffi.from_dlpack(self._arrays[name]) for name in plan["parameters"]])
        self._traced: dict[str, np.ndarray] = {}
        self._one = aligned((1,), np.int32)
        self._one_tensor = self.ffi.from_dlpack(self._one)
        self._row = self.ffi.from_dlpack(aligned((1,), np.int32))

    def new_state(self, capacity: int | None = None) -> TvmState:
        """Reserve caches for ``capacity`` tokens (default: the artifact's context), rounded up to whole blocks."""
        capacity = min(capacity or self.max_context, self.max_context)
        return TvmState(self, -(-capacity // BLOCK) * BLOCK)

    def rotation(self, start: int, count: int) -> np.ndarray:
        """Return the table (count, head_dim) float32 of cosines, then sines, for positions start..start+count-1.

        The angle is rounded to float32 before its cosine is taken, as every implementation of these models does.
        """
        positions = np.arange(start, start + count, dtype=np.float32)
        angles = positions[:, None] * self._frequencies  # (count, head_dim / 2)
        table = aligned((count, 2 * self._frequencies.size), np.float32)
        np.cos(angles, out=table[:, : self._frequencies.size])
        np.sin(angles, out=table[:, self._frequencies.size :])
        if self._magnitude != 1:
            table *= self._magnitude
        return table

    def step(self, tokens: Sequence[int], state: State, logits: str = "last") -> np.ndarray:
        """Append ``tokens`` to ``state`` and return float32 logits (rows, vocab): the last row's, all, or none."""
        count = len(tokens)
        ids = self._check(tokens, state)
        if count == 1 and logits != "none":
            self._one[0] = ids[0]
            result = self._call(self._decode, self._one_tensor, state, 1, self._row)
        else:
            rows = {"last": [count - 1], "all": range(count), "none": []}[logits]
            indices = aligned((len(rows),), np.int32)
            indices[:] = rows
            result = self._call(self._step, self.ffi.from_dlpack(ids), state, count, self.ffi.from_dlpack(indices))
        state.length += count
        return np.from_dlpack(result[0])

    def _call(self, function: Any, ids: Any, state: State, count: int, rows: Any) -> Any:
        assert isinstance(state, TvmState)
        table = self.ffi.from_dlpack(self.rotation(state.length, count))
        scalars = self.ffi.Shape([state.length, self._gear])
        return function(ids, table, rows, scalars, *state.tensors, self._parameters)

    def _check(self, tokens: Sequence[int], state: State) -> np.ndarray:
        ids = aligned((len(tokens),), np.int32)
        ids[:] = self.check(tokens, state)
        return ids

    def tap(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return inner values of the last ``trace``: ``layer.N`` is (tokens, hidden) after layer N."""
        return {name: self._traced[name] for name in names}

    def trace(self, tokens: Sequence[int], state: State) -> Mapping[str, np.ndarray]:
        """Run ``tokens`` like ``step`` and keep the residual stream after every layer for ``tap``."""
        ids = self._check(tokens, state)
        rows = aligned((1,), np.int32)
        rows[:] = len(tokens) - 1
        result = self._call(self._trace, self.ffi.from_dlpack(ids), state, len(tokens), self.ffi.from_dlpack(rows))
        state.length += len(tokens)
        values = [np.from_dlpack(result[index]) for index in range(1, 1 + len(self.plan["taps"]))]
        self._traced = dict(zip(self.plan["taps"], values, strict=True))
        return self._traced

    def fill(self, state: State, depth: int, seed: int = 0) -> None:
        """Make ``state`` ``depth`` tokens long with random caches, for timing at depth without a prefill."""
        assert isinstance(state, TvmState)
        generator = np.random.default_rng(seed)
        for spec in self.cache_specs:
            array = state.arrays[spec.name].reshape(-1)
            tile = generator.standard_normal(min(array.size, 1 << 20), np.float32)
            if array.dtype == np.int8:
                tile *= 40
            elif spec.name.endswith("_scale"):
                tile = np.abs(tile) * np.float32(0.02)
            sample = tile.astype(array.dtype)
            for start in range(0, array.size, sample.size):
                part = array[start : start + sample.size]
                part[:] = sample[: part.size]
        state.length = depth

    def decode_bytes(self, depth: int) -> int:
        """Return the bytes that one decode step must read at a context of ``depth`` tokens: weights and caches."""
        return decode_bytes(self.plan["bytes"], self.plan["sparse"], self._gear, depth)

    def prefill_ops(self, tokens: int, depth: int) -> int:
        """Return the operations of the linear layers for ``tokens`` prompt tokens (attention excluded)."""
        return int(self.plan["ops_per_token"]) * tokens

    def peak_ops(self) -> float:
        """Return the best rate over a few runs of the dot product, all threads busy, no memory touched."""
        plan = self.plan["peak"]
        values = aligned((plan["values"],), np.dtype(plan["dtype"]))
        values[:] = np.arange(values.size) % 100
        source, items = self.ffi.from_dlpack(values), 4 * self.threads
        best = 0.0
        for _ in range(8):
            start = time.perf_counter()
            self._machine["peak"](source, self.ffi.Shape([items]))
            best = max(best, items * plan["operations"][self.isa] / (time.perf_counter() - start))
        return best

    def close(self) -> None:
        """Drop the module and the weight map."""
        self._step = self._decode = self._trace = self._machine = None
        self._parameters = None
        self._arrays = {}


def open(artifact: Artifact, threads: int | None = None, attention: str | None = None) -> TvmExecutor:
    """Open ``artifact`` on this machine's processor.

    Raises UnsupportedError when no code in the artifact fits the processor or the runtime library is absent, and
    ArtifactError when the payload does not load.
    """
    return TvmExecutor(artifact, threads, attention)
