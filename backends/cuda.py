"""The cuda backend: a plan of launches on one NVIDIA GPU, weights uploaded once, decoding as one CUDA graph a token.

Only numpy, cuda-bindings and the driver are loaded. All memory is reserved when the artifact is opened: weights, the
caches of one sequence of the whole context, workspace. Further sequences take memory for the tokens that they ask for,
in whole attention blocks; caches that no state uses any more serve the next one that they are large enough for.
"""

from __future__ import annotations

import re
import weakref
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arkinfer.artifact import Artifact
from arkinfer.artifact.plan import BLOCK, NEVER, Extent, Kernel, Launch, Plan, Schedule, evaluate, whole_blocks
from arkinfer.backends import control
from arkinfer.backends.base import Draw, Executor, Rows, State, truncated
from arkinfer.backends.cuda_driver import Driver, places, present_gpu
from arkinfer.backends.gears import decode_bytes, gear
from arkinfer.backends.payload import PLAN, read
from arkinfer.backends.rotation import tables
from arkinfer.backends.upload import upload
from arkinfer.errors import UnsupportedError
from arkinfer.targets.probe import Gpu

# The CUDA versions from which drivers load the code: every 12 takes cubins of ptxas 12.9 (minor version compatibility);
# to translate PTX they must know its version, 8.5.
DRIVERS: Mapping[bool, tuple[int, int]] = {False: (12, 0), True: (12, 5)}


@dataclass(eq=False)
class Slot:
    """Caches of ``held`` tokens on the device: addresses by buffer name, and the decode graphs that use them."""

    held: int
    block: int
    addresses: Mapping[str, int]
    graphs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """A kernel on the device."""

    function: Any
    grid: tuple[Extent, Extent, Extent]
    threads: int
    shared: int
    kinds: tuple[str, ...]


class CudaState(State):
    """One sequence: a slot of caches and how much of it is in use."""

    def __init__(self, executor: CudaExecutor, capacity: int) -> None:
        self.executor, self.capacity, self.length = executor, capacity, 0
        self.slot = executor.take_slot(whole_blocks(capacity))
        # A state that nobody holds any more gives its caches back, whatever thread collects it.
        weakref.finalize(self, executor.idle.append, self.slot).atexit = False

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on; later steps overwrite what the caches hold of them."""
        self.length = truncated(self, length)

    def fork(self) -> CudaState:
        """Return an independent copy, made on the device."""
        twin = CudaState(self.executor, self.capacity)
        self.executor.copy_slot(twin.slot, self.slot, self.length)
        twin.length = self.length
        return twin


class CudaExecutor(Executor):
    """Runs one artifact on the first GPU. Not thread-safe: the Engine serialises its steps."""

    draws = True

    def __init__(self, artifact: Artifact, threads: int | None, attention: str | None) -> None:
        self.plan = plan = read(artifact, PLAN, Plan.from_json)
        facts = plan.facts
        self.threads = threads or 1
        self.vocab_size, self.max_context = int(facts["vocab_size"]), int(facts["max_context"])
        self._gear = min(gear(facts["sparse"], attention or artifact.manifest.attention), NEVER)
        gpu = present_gpu(plan.levels, str(artifact.manifest.target.get("name")))
        level, translated = _level(artifact, plan, gpu)
        _require_driver(gpu, translated)
        self.isa = f"{gpu.level}, translated from {level}" if translated else level
        self._slots: list[Slot] = []
        self.driver = Driver()
        # What the device's memory holds: position, token and draw of the next step, and whose random numbers.
        self._ready: tuple[int, int, Draw] | None = None
        self._numbers: Draw | None = None
        try:
            self._reserve(artifact)
            self._kernels = [self._load(artifact, kernel, level, translated) for kernel in plan.kernels]
        except BaseException:
            self.close()
            raise
        self._traced: dict[str, np.ndarray] = {}

    def _load(self, artifact: Artifact, kernel: Kernel, level: str, translated: bool) -> Loaded:
        image = kernel.images[level]
        code = artifact.file(image.ptx if translated else image.file).read_bytes()
        function = self.driver.function(code + b"\0" * translated, image.entry, image.shared)
        kinds = tuple("int32" if argument.role == "scalar" else "pointer" for argument in kernel.arguments)
        return Loaded(function, image.grid, 32 * image.warps, image.shared, kinds)

    def _reserve(self, artifact: Artifact) -> None:
        """Allocate all memory and fill it with what stays. Raises UnsupportedError where it does not fit."""
        plan, driver = self.plan, self.driver
        fixed = {
            b.name: b.nbytes({}) for kind in ("control", "input", "output", "parameter") for b in plan.of_kind(kind)
        }
        offsets, size = places({**fixed, "arena": plan.arena})
        self._fit(size, plan.capacity, "arkinfer build MODEL --context {}", "arkinfer build MODEL --weights int4")
        block = driver.allocate(size)
        self._addresses = {name: block + offset for name, offset in offsets.items()}
        self.idle = [self._new_slot(plan.capacity)]
        self._fill_weights(artifact)
        rope = plan.facts["rope"]
        frequencies = np.array([float.fromhex(value) for value in rope["inverse_frequencies"]], np.float32)
        rotation = tables(frequencies, float.fromhex(rope["magnitude"]), 0, plan.capacity)
        for name, table in zip(("cos", "sin"), rotation, strict=True):
            driver.upload(self._addresses[name], table)

    def _fill_weights(self, artifact: Artifact) -> None:
        driver = self.driver
        sizes = {buffer.name: buffer.nbytes({}) for buffer in self.plan.of_kind("parameter")}

        def put(name: str, start: int, piece: np.ndarray) -> None:
            driver.upload(self._addresses[name] + start, piece)

        upload(artifact.file(self.plan.facts["weights"]), sizes, put, drop=driver.integrated)

    def _fit(self, fixed: int, held: int, shorter: str, other: str) -> None:
        """Raise UnsupportedError where ``fixed`` bytes and caches of ``held`` tokens do not fit.

        Its hint is ``shorter`` with the tokens that would, or ``other`` where none do.
        """
        free = self.driver.free_memory()
        needed = fixed + self._cache_places(held)[1]
        if needed <= free:
            return
        largest = BLOCK * bisect_right(
            range(BLOCK, held, BLOCK), free - fixed, key=lambda held: self._cache_places(held)[1]
        )
        shared = {"memory": "shared with the system: what /proc/meminfo calls available"}
        raise UnsupportedError(
            "the GPU has too little free memory for this artifact"
            if fixed
            else "the GPU has no room for this sequence",
            facts={
                "needed": f"{needed:,} bytes",
                "free": f"{free:,} bytes",
                "context": f"{min(held, self.max_context):,} tokens",
                "context that would fit": f"{largest:,} tokens" if largest else "none",
                **(shared if self.driver.integrated else {}),
            },
            hint=shorter.format(largest) if largest else other,
            code="ARK-E343",
        )

    def _cache_places(self, held: int) -> tuple[dict[str, int], int]:
        """Return where the caches of ``held`` tokens lie in one block, and its bytes."""
        return places({buffer.name: buffer.nbytes({"c": held}) for buffer in self.plan.of_kind("cache")})

    def _new_slot(self, held: int) -> Slot:
        offsets, size = self._cache_places(held)
        block = self.driver.allocate(size)
        self._slots.append(Slot(held, block, {name: block + offset for name, offset in offsets.items()}))
        return self._slots[-1]

    def take_slot(self, held: int) -> Slot:
        """Return the smallest caches of at least ``held`` tokens that no state uses; new ones if there are none.

        New ones take the place of those that are idle, which are too small.
        """
        self.driver.current()
        idle = sorted(self.idle, key=lambda slot: slot.held)  # finalisers may append meanwhile
        large = next((slot for slot in idle if slot.held >= held), None)
        for slot in [large] if large is not None else idle:
            self.idle.remove(slot)
            if slot is not large:
                self._drop(slot)
        if large is not None:
            return large
        self._fit(0, held, "ask for at most {} tokens: engine.session(capacity=...)", "close other sessions first")
        return self._new_slot(held)

    def _drop(self, slot: Slot) -> None:
        self._slots.remove(slot)
        self.driver.wait()
        for graph in slot.graphs.values():
            self.driver.forget(graph)
        self.driver.free(slot.block)

    def copy_slot(self, target: Slot, source: Slot, length: int) -> None:
        """Copy the caches of ``length`` tokens, which are the beginning of each buffer."""
        self.driver.current()
        for buffer in self.plan.of_kind("cache"):
            size = buffer.nbytes({"c": whole_blocks(length)})
            if size:
                self.driver.copy(target.addresses[buffer.name], source.addresses[buffer.name], size)

    def new_state(self, capacity: int | None = None) -> CudaState:
        """Reserve caches for ``capacity`` tokens, in whole attention blocks; the first state's are there already."""
        return CudaState(self, min(capacity or self.max_context, self.max_context))

    def step(self, tokens: Sequence[int], state: State, logits: Rows = "last") -> np.ndarray:
        """Append ``tokens`` to ``state`` and return float32 logits (rows, vocab): the last row's, all, or none."""
        return self._run(tokens, state, logits, {})

    def _run(self, tokens: Sequence[int], state: State, logits: Rows, kept: dict[str, list[np.ndarray]]) -> np.ndarray:
        assert isinstance(state, CudaState)
        ids = self.check(tokens, state)
        self.driver.current()
        rows = {"last": 1, "all": len(ids), "none": 0}[logits]
        found = np.empty((rows, self.vocab_size), np.float32)
        self._compute(ids, state, logits, kept, found)
        self.driver.wait()
        return found

    def _compute(
        self,
        ids: np.ndarray,
        state: CudaState,
        logits: Rows,
        kept: dict[str, list[np.ndarray]],
        found: np.ndarray | None,
    ) -> None:
        """Append ``ids``; fill ``found`` (rows, vocab) with the wanted logits, or leave them on the device if None."""
        row = 0
        for piece in self.plan.pieces(len(ids), logits):
            schedule = self.plan.schedules[piece.schedule]
            count = piece.stop - piece.start
            self._write_inputs(state.length, ids[piece.start : piece.stop])
            if schedule.tokens == 1 and piece.groups and not kept:
                self.driver.replay(self._graph(state.slot, "logits"))
            else:
                last = schedule.head if piece.groups or kept else self.plan.storing(schedule)
                self._start(schedule, schedule.launches[:last], state.slot, count, 0, kept)
            for group in piece.groups:
                if schedule.tokens > 1 or kept:
                    self.driver.upload(self._addresses["rows"], np.array(group, np.int32))
                    self._start(schedule, schedule.launches[schedule.head :], state.slot, count, len(group), {})
                if found is not None:
                    self.driver.download(found[row : row + len(group)], self._addresses["logits"])
                row += len(group)
            state.length += count

    def sample(self, tokens: Sequence[int], state: State, draw: Draw) -> int:
        """Append ``tokens`` and return the token that the device chose: for one token, one graph launch and one read.

        The host writes nothing where the device's memory holds what is asked for: the token that it chose last.
        """
        assert isinstance(state, CudaState)
        driver, name = self.driver, "greedy" if draw.greedy else "draw"
        ids = self.check(tokens, state)
        driver.current()
        if name == "draw":
            start, numbers = control.numbers(draw, state.length + len(ids), self.plan.capacity)
            if self._numbers is not draw:
                self._numbers = None
                driver.upload(self._addresses["random"] + 4 * start, numbers)
                self._numbers = draw
        if len(ids) == 1:
            if self._ready != (state.length, int(ids[0]), draw):
                self._write_inputs(state.length, ids, draw)
            self._ready = None
            driver.replay(self._graph(state.slot, name))
            state.length += 1
        else:
            self._compute(ids, state, "last", {}, None)
            self._write_inputs(state.length - 1, ids[-1:], draw)
            choice = self.plan.sampling[name]
            self._start(choice, choice.launches, state.slot, 1, 1, {})
        found = np.empty(1, np.int32)
        driver.download(found, self._addresses["token"])
        token = control.chosen(int(found[0]), self.vocab_size)
        self._ready = state.length, token, draw
        return token

    def forget_inputs(self) -> None:
        """Write position and token anew before the next step: something else has moved them on."""
        self._ready = None

    def _write_inputs(self, position: int, ids: np.ndarray, draw: Draw | None = None) -> None:
        self._ready = None
        self.driver.upload(self._addresses["control"], control.values(position, self._gear, len(ids), draw))
        self.driver.upload(self._addresses["tokens"], ids)

    def _graph(self, slot: Slot, name: str) -> Any:
        """Return the captured decode step on ``slot`` that ends with logits, or with a token chosen as ``name`` says.

        Position, token and how to draw are read from the device's memory.
        """

        def work() -> None:
            decode = self.plan.schedules["decode"]
            self._start(decode, decode.launches, slot, 1, 1, {})
            if name in self.plan.sampling:
                choice = self.plan.sampling[name]
                self._start(choice, choice.launches, slot, 1, 1, {})

        if name not in slot.graphs:
            slot.graphs[name] = self.driver.capture(work)
        return slot.graphs[name]

    def _start(
        self,
        schedule: Schedule,
        launches: Sequence[Launch],
        slot: Slot,
        tokens: int,
        rows: int,
        kept: dict[str, list[np.ndarray]],
    ) -> None:
        """Start ``launches``; where ``kept`` has a tap's name, append what its buffer then holds."""
        sizes = {"n": tokens, "r": rows}
        arena = self._addresses["arena"]
        scratch = {buffer.name: arena + int(buffer.offset or 0) for buffer in schedule.scratch}
        addresses = {**self._addresses, **slot.addresses, **scratch}
        taps = {tap.after: tap for tap in schedule.taps} if kept else {}
        for index, launch in enumerate(launches):
            kernel, loaded = self.plan.kernels[launch.kernel], self._kernels[launch.kernel]
            pointers = iter(launch.pointers)
            values = []
            for argument in kernel.arguments:
                if argument.role == "scalar":
                    values.append(evaluate(argument.shape[0], sizes))
                else:
                    pointer = next(pointers)
                    values.append(addresses[pointer.buffer] + pointer.offset)
            x, y, z = (evaluate(extent, sizes) for extent in loaded.grid)
            self.driver.launch(loaded.function, (x, y, z), loaded.threads, loaded.shared, values, loaded.kinds)
            if index in taps:
                buffer = next(each for each in schedule.scratch if each.name == taps[index].buffer)
                stream = np.empty(buffer.extents(sizes), np.float32)
                self.driver.download(stream, addresses[buffer.name])
                kept[taps[index].name].append(stream)

    def trace(self, tokens: Sequence[int], state: State) -> Mapping[str, np.ndarray]:
        """Run ``tokens`` like ``step`` and keep the residual stream after every layer for ``tap``."""
        names = [tap.name for schedule in self.plan.schedules.values() for tap in schedule.taps]
        kept: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self._run(tokens, state, "last", kept)
        self._traced = {name: np.concatenate(parts) for name, parts in kept.items()}
        return self._traced

    def tap(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return inner values of the last ``trace``: ``layer.N`` is (tokens, hidden) after layer N."""
        return {name: self._traced[name] for name in names}

    def fill(self, state: State, depth: int, seed: int = 0) -> None:
        """Make ``state`` ``depth`` tokens long with random caches, for timing at depth without a prefill."""
        assert isinstance(state, CudaState)
        self.driver.current()
        generator = np.random.default_rng(seed)
        for buffer in self.plan.of_kind("cache"):
            size = buffer.nbytes({"c": state.slot.held})
            tile = generator.standard_normal(min(size, 1 << 20), np.float32)
            if buffer.dtype == "int8":
                tile *= 40
            elif buffer.name.endswith("_scale"):
                tile = np.abs(tile) * np.float32(0.02)
            sample = tile.astype(buffer.dtype).view(np.uint8)
            for start in range(0, size, sample.size):
                self.driver.upload(state.slot.addresses[buffer.name] + start, sample[: size - start])
        state.length = depth

    def decode_bytes(self, depth: int) -> int:
        """Return the bytes that one decode step must read at a context of ``depth`` tokens: weights and caches."""
        return decode_bytes(self.plan.facts["bytes"], self.plan.facts["sparse"], self._gear, depth)

    def bandwidth(self, seconds: float = 1.0) -> float:
        """Measure for about ``seconds`` how fast the device copies within its memory: bytes read and written, in /s."""
        return self.driver.measure_copying(seconds)

    def prefill_ops(self, tokens: int, depth: int) -> int:
        """Return the operations of the linear layers for ``tokens`` prompt tokens (attention excluded)."""
        return int(self.plan.facts["ops_per_token"]) * tokens

    def close(self) -> None:
        """Free the device's memory."""
        driver, self.driver = getattr(self, "driver", None), None  # type: ignore[assignment]
        if driver is not None:
            driver.current()
            for graph in [graph for slot in self._slots for graph in slot.graphs.values()]:
                driver.forget(graph)
            driver.close()


def _level(artifact: Artifact, plan: Plan, gpu: Gpu) -> tuple[str, bool]:
    """Return which of the plan's levels ``gpu`` runs, and whether the driver must translate its PTX.

    Cubins run on their own architecture. PTX runs on every later one, unless its target ends with a letter (sm_90a).
    """
    if gpu.level in plan.levels:
        return gpu.level, False
    here = int(gpu.level.removeprefix("sm_"))
    for level in sorted(plan.levels, key=lambda level: -int(level.removeprefix("sm_"))):
        text = artifact.file(plan.kernels[0].images[level].ptx).read_text(encoding="utf-8")
        target = re.search(r"^\.target sm_([0-9]+)\b", text, re.MULTILINE)
        if target is not None and int(target[1]) <= here:
            return level, True
    raise UnsupportedError(
        "this artifact holds no code for this GPU",
        facts={"artifact": ", ".join(plan.levels), "this machine": f"{gpu.name} ({gpu.level})"},
        hint="build again for a target whose arch lists this GPU's level: arkinfer targets",
        code="ARK-E311",
    )


def _require_driver(gpu: Gpu, translated: bool) -> None:
    """Raise UnsupportedError where the driver is too old to load the artifact's code."""
    needed = DRIVERS[translated]
    if tuple(int(part) for part in gpu.cuda.split(".")[:2]) < needed:
        raise UnsupportedError(
            "the NVIDIA driver is too old for this artifact",
            facts={"GPU": gpu.name, "driver": f"CUDA {gpu.cuda}", "needed": "CUDA {}.{}".format(*needed)},
            hint="install a newer NVIDIA driver (on Jetson: a newer JetPack)",
            code="ARK-E342",
        )


def open(artifact: Artifact, threads: int | None = None, attention: str | None = None) -> CudaExecutor:
    """Open ``artifact`` on this machine's GPU.

    Raises UnsupportedError where there is no GPU, no code for it in the artifact, too old a driver or too little
    memory, and ArtifactError when the payload is not sound.
    """
    return CudaExecutor(artifact, threads, attention)
