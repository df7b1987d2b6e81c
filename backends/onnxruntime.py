"""The onnxruntime backend: an ONNX model in a session, caches bound as input and output of one address.

Only numpy and onnxruntime are loaded. The provider that the artifact was built for must be the one that runs it:
onnxruntime would otherwise take the processor for whatever a GPU cannot do, and not say so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arkinfer.artifact import Artifact
from arkinfer.backends import onnx_file
from arkinfer.backends.base import Executor, Rows, State, truncated
from arkinfer.backends.gears import decode_bytes, gear
from arkinfer.backends.payload import PLAN, read_plan, unsound
from arkinfer.backends.rotation import tables
from arkinfer.errors import ArtifactError, UnsupportedError, UserError

PLAN_FORMAT = 1  # of payload/plan.json
OLDEST = (1, 31)  # its kernels for processors multiply 2-bit codes from this release on
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_PACKAGES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}
_LOG_ERRORS = 3


def _library(provider: str) -> Any:
    """Return the module onnxruntime if it is recent enough and has ``provider``."""
    hint = f"pip install 'arkinfer[runtime,{_PACKAGES[provider]}]'"
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError(
            f"the onnxruntime backend needs the package {_PACKAGES[provider]}", hint=hint, code="ARK-E350"
        ) from error
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < OLDEST:
        raise UnsupportedError(
            "this onnxruntime is too old for the artifact",
            facts={"installed": onnxruntime.__version__, "needed": ".".join(map(str, OLDEST))},
            hint=hint,
            code="ARK-E351",
        )
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise UnsupportedError(
            f"the onnxruntime that is installed here has no {PROVIDERS[provider]}",
            facts={"it has": ", ".join(onnxruntime.get_available_providers())},
            hint=f"pip uninstall onnxruntime; {hint}",
            code="ARK-E352",
        )
    return onnxruntime


@dataclass(frozen=True)
class CacheSpec:
    """One state tensor. ``shape`` holds -1 at the axis that grows: one entry every ``stride`` tokens.

    Where that is not every token there is one more, for what is not complete.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: int

    def extents(self, capacity: int) -> tuple[int, ...]:
        """Return the shape that holds ``capacity`` tokens."""
        extent = capacity // self.stride + (self.stride > 1)
        return tuple(extent if axis == -1 else axis for axis in self.shape)


class OnnxruntimeState(State):
    """The caches of one token sequence, bound once."""

    def __init__(self, executor: OnnxruntimeExecutor, capacity: int) -> None:
        self._executor, self.capacity, self.length = executor, capacity, 0
        self.values = {
            spec.name: executor.place(np.zeros(spec.extents(capacity), spec.dtype)) for spec in executor.caches
        }
        self.binding = self.bound()

    def bound(self) -> Any:
        """Return a new binding of the session in which every cache is input and output."""
        binding = self._executor.session.io_binding()
        for name, value in {**self.values, **self._executor.constants}.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in self.values.items():
            binding.bind_ortvalue_output(f"{name}.out", value)
        return binding

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on; later steps overwrite what the caches hold of them."""
        self.length = truncated(self, length)

    def fork(self) -> OnnxruntimeState:
        """Return an independent copy."""
        twin = OnnxruntimeState(self._executor, self.capacity)
        for name, value in self.values.items():
            twin.values[name].update_inplace(value.numpy())
        twin.length = self.length
        return twin


class OnnxruntimeExecutor(Executor):
    """Runs one artifact's model. Not thread-safe: the Engine serialises its steps.

    ``provider`` is "cpu" or "cuda", None for the one that the artifact was built for.
    """

    def __init__(
        self, artifact: Artifact, threads: int | None, attention: str | None, provider: str | None = None
    ) -> None:
        self.threads = threads or int(os.environ.get("ARKINFER_THREADS", "0")) or len(os.sched_getaffinity(0))
        if self.threads < 1:
            raise UserError(f"threads must be at least 1, not {self.threads}", code="ARK-E212")
        self.plan = plan = read_plan(artifact, PLAN_FORMAT)
        try:
            self._gear = gear(plan["sparse"], attention or artifact.manifest.attention)
            self.vocab_size, self.max_context = int(plan["vocab_size"]), int(plan["max_context"])
            self.caches = [
                CacheSpec(spec["name"], spec["dtype"], tuple(spec["shape"]), spec["stride"]) for spec in plan["caches"]
            ]
            frequencies = np.array([float.fromhex(value) for value in plan["rope"]["inverse_frequencies"]], np.float32)
            magnitude, activations = float.fromhex(plan["rope"]["magnitude"]), np.dtype(plan["activations"])
            self._provider = provider or {each: each for each in PROVIDERS}[plan["provider"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise unsound(PLAN, f"{type(error).__name__}: {error}") from error
        self._library = _library(self._provider)
        self.isa = f"onnxruntime {self._library.__version__}, {PROVIDERS[self._provider]}"
        self.session = self._open(artifact)
        rotation = tables(frequencies, magnitude, 0, self.max_context)
        # Models in standard operators rotate by themselves.
        self._inputs = {each.name for each in self.session.get_inputs()}
        self.constants = {
            name: self.place(np.ascontiguousarray(table, activations))
            for name, table in zip(("cos", "sin"), rotation, strict=True)
            if name in self._inputs
        }
        self._traced: dict[str, np.ndarray] = {}

    def _open(self, artifact: Artifact) -> Any:
        """Return a session of the artifact's model, on the wanted provider and no other."""
        file = artifact.file(self.plan["model"])
        onnx_file.check(file, artifact.manifest.files)
        options = self._library.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = _LOG_ERRORS
        wanted = PROVIDERS[self._provider]
        if self._provider != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            session = self._library.InferenceSession(str(file.resolve()), options, providers=[wanted])
        except Exception as error:  # onnxruntime raises types of its own for any load failure
            raise ArtifactError(
                "onnxruntime does not take the model",
                facts={"file": file.name, "provider": wanted, "reason": str(error).splitlines()[0][:300]},
                hint="arkinfer doctor --target " + str(artifact.manifest.target.get("name")),
                code="ARK-E510",
            ) from error
        if session.get_providers()[0] != wanted:
            raise UnsupportedError(
                f"onnxruntime opened the model without the {wanted}",
                facts={"it took": ", ".join(session.get_providers())},
                hint="onnxruntime's own messages say why: a CUDA library or the driver is missing",
                code="ARK-E352",
            )
        return session

    def place(self, array: np.ndarray) -> Any:
        """Return ``array`` where the provider computes; on processors its memory is shared."""
        return self._library.OrtValue.ortvalue_from_numpy(array, self._provider, 0)

    def new_state(self, capacity: int | None = None) -> OnnxruntimeState:
        """Reserve caches for ``capacity`` tokens (default: the artifact's context), rounded up to whole blocks."""
        block = self.plan["block"]
        return OnnxruntimeState(self, -(-min(capacity or self.max_context, self.max_context) // block) * block)

    def step(self, tokens: Sequence[int], state: State, logits: Rows = "last") -> np.ndarray:
        """Append ``tokens`` to ``state`` and return float32 logits (rows, vocab): the last row's, all, or none."""
        assert isinstance(state, OnnxruntimeState)
        ids, count = self.check(tokens, state), len(tokens)
        wanted = {"last": [count - 1], "all": range(count), "none": []}[logits]
        found = np.empty((len(wanted), self.vocab_size), np.float32)
        size, done = self.plan["piece"] or count, 0
        for start in range(0, count, size):
            rows = [row - start for row in wanted if start <= row < start + size]
            self._run(ids[start : start + size], rows, state, state.binding, found[done : done + len(rows)])
            done += len(rows)
        return found

    def _run(
        self, ids: np.ndarray, rows: Sequence[int], state: OnnxruntimeState, binding: Any, logits: np.ndarray
    ) -> None:
        """Append ``ids`` and write the logits of ``rows`` to ``logits``."""
        count = ids.size
        inputs: dict[str, np.ndarray] = {
            "tokens": ids.astype(np.int64),
            "rows": np.array(rows, np.int64),
            "position": np.array([state.length], np.int64),
            "gear": np.array([self._gear], np.int64),
            "span": np.arange(state.length + count),
            "last": np.array([state.length + count - 1], np.int32),
            "total": np.array(state.length + count, np.int32),
        }
        for name in inputs.keys() & self._inputs:
            array = inputs[name]
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        state.length += count

    def trace(self, tokens: Sequence[int], state: State) -> Mapping[str, np.ndarray]:
        """Run ``tokens`` like ``step`` and keep the residual stream after every layer for ``tap``."""
        assert isinstance(state, OnnxruntimeState)
        if not self.plan["taps"]:
            return super().trace(tokens, state)
        ids, binding = self.check(tokens, state), state.bound()
        hidden = next(each.shape[-1] for each in self.session.get_outputs() if each.name in self.plan["taps"])
        found = {name: np.empty((1, ids.size, hidden), np.float32) for name in self.plan["taps"]}
        for name, array in found.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._run(ids, [], state, binding, np.empty((0, self.vocab_size), np.float32))
        self._traced = {name: array[0] for name, array in found.items()}
        return self._traced

    def tap(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return inner values of the last ``trace``: ``layer.N`` is (tokens, hidden) after layer N."""
        return {name: self._traced[name] for name in names}

    def fill(self, state: State, depth: int, seed: int = 0) -> None:
        """Make ``state`` ``depth`` tokens long with random caches, for timing at depth without a prefill."""
        assert isinstance(state, OnnxruntimeState)
        generator = np.random.default_rng(seed)
        for spec in self.caches:
            shape = spec.extents(state.capacity)
            sample = generator.standard_normal(min(int(np.prod(shape)), 1 << 20), np.float32)
            state.values[spec.name].update_inplace(np.resize(sample, shape).astype(spec.dtype))
        state.length = depth

    def decode_bytes(self, depth: int) -> int:
        """Return the bytes that one decode step must read at a context of ``depth`` tokens: weights and caches."""
        return decode_bytes(self.plan["bytes"], self.plan["sparse"], self._gear, depth)

    def prefill_ops(self, tokens: int, depth: int) -> int:
        """Return the operations of the linear layers for ``tokens`` prompt tokens (attention excluded)."""
        return int(self.plan["ops_per_token"]) * tokens

    def close(self) -> None:
        """Drop the session and its memory."""
        self.session = None
        self.constants = {}


def open(artifact: Artifact, threads: int | None = None, attention: str | None = None) -> OnnxruntimeExecutor:
    """Open ``artifact`` with onnxruntime.

    Raises UnsupportedError where onnxruntime is absent, too old, or lacks the provider, and ArtifactError when the
    payload is not sound.
    """
    return OnnxruntimeExecutor(artifact, threads, attention)
