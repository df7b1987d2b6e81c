"""The tensorrt backend: TensorRT's engine on one NVIDIA GPU, caches written in place, decoding as one CUDA graph.

Memory, streams and graphs are the CUDA driver's (cuda_driver.py); of TensorRT only the runtime is used here, as a
module that is handed in. All memory is reserved when the artifact is opened: the engine with its weights, one scratch
for all profiles, the caches of one sequence.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arkinfer.artifact import Artifact, tensorrt
from arkinfer.artifact.engine_recipe import PROFILES, EngineRecipe
from arkinfer.backends import tensorrt_finish
from arkinfer.backends.base import Executor, Rows, State
from arkinfer.backends.cuda_driver import Driver, places, require_memory
from arkinfer.backends.gears import NEVER, decode_bytes, gear, threshold
from arkinfer.backends.slots import Slot, Slots, SlotState
from arkinfer.backends.tensorrt_finish import Device
from arkinfer.errors import ArtifactError, InternalError, UnsupportedError, UserError

INPUTS = ("position", "rows", "tokens")  # in the order in which they lie in memory
_TILE = 1 << 20  # values of random caches that are repeated


class TensorRtExecutor(Executor):
    """Runs one engine on the first GPU. Not thread-safe: the Engine serialises its steps."""

    def __init__(
        self, artifact: Artifact, recipe: EngineRecipe, device: Device, engine: Path, attention: str | None
    ) -> None:
        self.recipe, facts = recipe, recipe.facts
        self.threads = 1
        self.isa = device.gpu.level
        self.vocab_size, self.max_context = int(facts["vocab_size"]), int(facts["max_context"])
        _check_gear(facts["sparse"], artifact.manifest.attention, attention)
        self._module, self._log = device.module, tensorrt.logger(device.module)
        # TensorRT for RTX captures graphs by itself, and only so.
        self._captures = not hasattr(device.module, "CudaGraphStrategy")
        self.driver = Driver()
        try:
            self._reserve(engine)
        except BaseException:
            self.close()
            raise

    def _reserve(self, file: Path) -> None:
        """Load the engine and allocate all memory. Raises UnsupportedError where it does not fit."""
        recipe, driver = self.recipe, self.driver
        require_memory(driver, file.stat().st_size, recipe.cache_bytes, self.max_context)
        self._runtime = self._module.Runtime(self._log)
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise UnsupportedError(
                "TensorRT cannot load the engine",
                facts={"engine": file, "reason": self._log.errors[-1] if self._log.errors else "it names none"},
                hint="arkinfer finish NAME.ark --force",
                code="ARK-E348",
            )
        self._check_engine()
        most = {name: max(getattr(recipe.profiles[each], name) for each in PROFILES) for name in ("tokens", "rows")}
        shapes = {"position": (1,), "rows": (most["rows"],), "tokens": (most["tokens"],)}
        if self._spans:
            shapes["span"] = (recipe.capacity,)
        self._types = {name: np.dtype(self._module.nptype(self._engine.get_tensor_dtype(name))) for name in shapes}
        self._offsets, inputs = places({name: self._types[name].itemsize * shape[0] for name, shape in shapes.items()})
        logits, scratch = 4 * most["rows"] * self.vocab_size, int(self._engine.device_memory_size_v2)
        offsets, size = places({"inputs": inputs, "logits": logits, "scratch": scratch})
        require_memory(driver, size, recipe.cache_bytes, self.max_context)
        block = driver.allocate(size)
        start = block + offsets["inputs"]
        self._inputs = start
        self._addresses = {name: start + offset for name, offset in self._offsets.items()}
        self._addresses["logits"] = block + offsets["logits"]
        if self._spans:
            driver.upload(self._addresses["span"], np.arange(recipe.capacity, dtype=self._types["span"]))
        self.slots = Slots(driver, {cache.name: cache.nbytes for cache in recipe.caches})
        # A context for each profile: a captured graph stays valid as long as its context is left alone.
        self._contexts = {
            name: self._context(index, block + offsets["scratch"], scratch) for index, name in enumerate(PROFILES)
        }

    def _context(self, index: int, scratch: int, nbytes: int) -> Any:
        """Return a context of profile ``index``; all share ``scratch``, since steps follow one another."""
        module, engine = self._module, self._engine
        strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._captures:
            context = engine.create_execution_context(strategy)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        if context is None:
            raise self._fault("create_execution_context")
        context.set_device_memory(scratch, nbytes)
        self._require(
            context.set_optimization_profile_async(index, int(self.driver.stream)), "set_optimization_profile"
        )
        self.driver.wait()
        for name, address in self._addresses.items():
            self._require(context.set_tensor_address(name, address), name)
        return context

    def _check_engine(self) -> None:
        """Raise ArtifactError unless the engine takes and gives what the recipe says."""
        engine, module = self._engine, self._module
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._spans = "span" in names  # else every step reads the caches to their end
        expected = {*INPUTS, "logits", *(("span",) if self._spans else ())}
        for cache in self.recipe.caches:
            for name in (cache.name, f"{cache.name}.out"):
                expected.add(name)
                if name in names and (
                    tuple(engine.get_tensor_shape(name)) != cache.shape
                    or np.dtype(module.nptype(engine.get_tensor_dtype(name))) != np.dtype(cache.dtype)
                ):
                    expected.discard(name)
        if set(names) != expected or engine.num_optimization_profiles != len(PROFILES):
            raise ArtifactError(
                "the engine is not the one that the artifact's recipe describes",
                facts={"differs in": ", ".join(sorted(set(names) ^ expected)[:3]) or "its profiles"},
                hint="arkinfer build MODEL -o NAME.ark --force",
                code="ARK-E513",
            )

    def new_state(self, capacity: int | None = None) -> SlotState:
        """Reserve caches; the engine is built for the artifact's whole context, so it takes that much memory."""
        return SlotState(self.slots, min(capacity or self.max_context, self.max_context))

    def step(self, tokens: Sequence[int], state: State, logits: Rows = "last") -> np.ndarray:
        """Append ``tokens`` to ``state`` and return float32 logits (rows, vocab): the last row's, all, or none."""
        assert isinstance(state, SlotState)
        ids = self.check(tokens, state)
        self.driver.current()
        pieces = self.recipe.pieces(len(ids), logits)
        found = np.empty((sum(rows for _, _, rows in pieces), self.vocab_size), np.float32)
        start = row = 0
        for profile, count, rows in pieces:
            # The engine gives one row at least; where none is wanted it stays on the device.
            wanted = np.arange(count - max(rows, 1), count)
            self._write_inputs(state.length, ids[start : start + count], wanted)
            span = self.recipe.span(state.length + count) if self._spans else 0
            self._run(profile, count, len(wanted), span, state.slot)
            self.driver.download(found[row : row + rows], self._addresses["logits"])
            state.length += count
            start, row = start + count, row + rows
        return found

    def _write_inputs(self, position: int, ids: np.ndarray, rows: np.ndarray) -> None:
        """Put a step's inputs on the device, in one copy."""
        end = self._offsets["tokens"] + self._types["tokens"].itemsize * len(ids)
        data = np.zeros(end, np.uint8)
        for name, values in (("position", np.array([position])), ("rows", rows), ("tokens", ids)):
            raw = values.astype(self._types[name]).view(np.uint8)
            data[self._offsets[name] : self._offsets[name] + raw.size] = raw
        self.driver.upload(self._inputs, data)

    def _run(self, profile: str, tokens: int, rows: int, span: int, slot: Slot) -> None:
        if profile == "decode" and span in slot.graphs:
            self.driver.replay(slot.graphs[span])
            return
        self._start(profile, tokens, rows, span, slot)
        if profile == "decode" and self._captures:
            # Recorded right after it ran as it is: a context has work to do after a change of shapes.
            slot.graphs[span] = self.driver.capture(lambda: self._start(profile, tokens, rows, span, slot))

    def _start(self, profile: str, tokens: int, rows: int, span: int, slot: Slot) -> None:
        context = self._contexts[profile]
        self._require(context.set_input_shape("tokens", (tokens,)), "tokens")
        self._require(context.set_input_shape("rows", (rows,)), "rows")
        if self._spans:
            self._require(context.set_input_shape("span", (span,)), "span")
        for name, address in slot.addresses.items():
            self._require(context.set_tensor_address(name, address), name)
            self._require(context.set_tensor_address(f"{name}.out", address), name)
        self._require(context.execute_async_v3(int(self.driver.stream)), "execute_async_v3")

    def _require(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise self._fault(what)

    def _fault(self, what: str) -> InternalError:
        reason = self._log.errors[-1] if self._log.errors else "it names none"
        return InternalError("TensorRT refused a call", facts={"call": what, "reason": reason}, code="ARK-E713")

    def tap(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Raise UnsupportedError: an engine has no inner values to show."""
        raise UnsupportedError(f"the {type(self).__name__} shows no inner values", code="ARK-E320")

    def fill(self, state: State, depth: int, seed: int = 0) -> None:
        """Make ``state`` ``depth`` tokens long with random caches, for timing at depth without a prefill."""
        assert isinstance(state, SlotState)
        self.driver.current()
        generator = np.random.default_rng(seed)
        for cache in self.recipe.caches:
            tile = generator.standard_normal(min(cache.nbytes, _TILE), np.float32)
            sample = tile.astype(cache.dtype).view(np.uint8)
            for start in range(0, cache.nbytes, sample.size):
                self.driver.upload(state.slot.addresses[cache.name] + start, sample[: cache.nbytes - start])
        state.length = depth

    def decode_bytes(self, depth: int) -> int:
        """Return the bytes that one decode step must read at a context of ``depth`` tokens: weights and caches.

        All keys are read, whatever blocks are chosen: rows hide the others by a mask.
        """
        return decode_bytes(self.recipe.facts["bytes"], None, NEVER, depth)

    def bandwidth(self, seconds: float = 1.0) -> float:
        """Measure for about ``seconds`` how fast the device copies within its memory: bytes read and written, in /s."""
        return self.driver.measure_copying(seconds)

    def prefill_ops(self, tokens: int, depth: int) -> int:
        """Return the operations of the linear layers for ``tokens`` prompt tokens (attention excluded)."""
        return int(self.recipe.facts["ops_per_token"]) * tokens

    def close(self) -> None:
        """Release the engine, then the device's memory."""
        driver, self.driver = getattr(self, "driver", None), None  # type: ignore[assignment]
        if driver is None:
            return
        driver.current()
        driver.wait()
        for name in ("_contexts", "_engine", "_runtime"):  # each before what it was made by
            self.__dict__.pop(name, None)
        driver.close()


def _check_gear(sparse: Mapping[str, int] | None, built: str, asked: str | None) -> None:
    """Raise UserError for another gear than the engine's."""
    if gear(sparse, asked or built) != threshold(sparse, built):
        raise UserError(
            f"this artifact was built for {built} attention, and its engine knows no other",
            facts={"asked for": asked},
            hint=f"arkinfer build MODEL --attention {asked}",
            code="ARK-E213",
        )


def open(artifact: Artifact, threads: int | None = None, attention: str | None = None) -> TensorRtExecutor:
    """Open ``artifact`` on this machine's GPU; its engine is built first if it is not there yet, which is logged.

    Raises UnsupportedError where the GPU or a fitting TensorRT is missing, or memory is too small, and ArtifactError
    when the payload is not sound.
    """
    recipe = tensorrt_finish.read_recipe(artifact)
    device = tensorrt_finish.require(recipe, str(artifact.manifest.target.get("name")))
    finished = tensorrt_finish.finish(artifact, logging.getLogger("arkinfer").warning)
    engine = artifact.file(str(recipe.engine)) if finished is None else finished.engine
    return TensorRtExecutor(artifact, recipe, device, engine, attention)
