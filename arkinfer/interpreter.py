"""Run a GPU plan on the CPU: every launch in order, by its kernel's torch reference, on the memory that the plan gives.

What the device would execute is executed, but for the kernels' own code: the same weight file, the same order, the same
pointers into the same arena. A launch that comes too early, a buffer that is too small or two values in one place show
as wrong numbers, because scratch memory is filled with NaN before every step and caches before they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from arkinfer.artifact import Artifact, tensors
from arkinfer.artifact.plan import NEVER, Buffer, Launch, Piece, Plan, Schedule, whole_blocks
from arkinfer.backends import control
from arkinfer.backends.base import Draw, Executor, Rows, State, truncated
from arkinfer.backends.gears import gear
from arkinfer.backends.payload import PLAN, read
from arkinfer.backends.rotation import tables
from arkinfer.errors import ArtifactError
from arkinfer.exporters.kernels import triton as kernels

FEW = 8  # tokens of a step for which threads cost more than they bring
_POISON = 0xFF  # NaN in every float type, -1 in every signed integer
DTYPES = {
    "uint8": torch.uint8, "int8": torch.int8, "int32": torch.int32, "float16": torch.float16,
    "bfloat16": torch.bfloat16, "float32": torch.float32,
}  # fmt: skip


class PlanState(State):
    """The caches of one sequence, as bytes by buffer name; there is room for ``held`` tokens."""

    def __init__(self, buffers: Sequence[Buffer], capacity: int, held: int) -> None:
        self.length, self.capacity, self.held = 0, capacity, held
        self.memory = {buffer.name: _poisoned(buffer.nbytes({"c": held})) for buffer in buffers}

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on."""
        self.length = truncated(self, length)

    def fork(self) -> PlanState:
        """Return an independent copy."""
        twin = PlanState((), self.capacity, self.held)
        twin.length = self.length
        twin.memory = {name: memory.clone() for name, memory in self.memory.items()}
        return twin


class PlanInterpreter(Executor):
    """Runs an artifact of the cuda backend without a GPU."""

    draws = True

    def __init__(self, artifact: Artifact, threads: int | None = None, attention: str | None = None) -> None:
        self.plan = plan = read(artifact, PLAN, Plan.from_json)
        facts = plan.facts
        self.threads, self.isa = threads or torch.get_num_threads(), "interpreted"
        self.vocab_size, self.max_context = int(facts["vocab_size"]), int(facts["max_context"])
        self._dense_len = min(gear(facts["sparse"], attention or artifact.manifest.attention), NEVER)
        arrays = tensors.load(artifact.file(facts["weights"]), ArtifactError, "ARK-E511")
        self._fixed = {
            buffer.name: _bytes(torch.from_numpy(arrays[buffer.name])) for buffer in plan.of_kind("parameter")
        }
        for kind in ("control", "input", "output"):
            self._fixed |= {buffer.name: _poisoned(buffer.nbytes({})) for buffer in plan.of_kind(kind)}
        frequencies = np.array([float.fromhex(value) for value in facts["rope"]["inverse_frequencies"]], np.float32)
        cos, sin = tables(frequencies, float.fromhex(facts["rope"]["magnitude"]), 0, plan.capacity)
        self._fixed["cos"], self._fixed["sin"] = _bytes(torch.from_numpy(cos)), _bytes(torch.from_numpy(sin))
        self._arena = torch.empty(plan.arena, dtype=torch.uint8)
        self._traced: dict[str, np.ndarray] = {}
        self._ready: tuple[int, int, Draw] | None = None  # position, token and draw of the next step, as memory has it

    def new_state(self, capacity: int | None = None) -> PlanState:
        """Reserve caches for ``capacity`` tokens, in whole attention blocks."""
        capacity = min(capacity or self.max_context, self.max_context)
        return PlanState(self.plan.of_kind("cache"), capacity, whole_blocks(capacity))

    def step(self, tokens: Sequence[int], state: State, logits: Rows = "last") -> np.ndarray:
        """Append ``tokens`` to ``state`` and return float32 logits (rows, vocab): the last row's, all, or none."""
        ids = self.check(tokens, state)
        found = [np.empty((0, self.vocab_size), np.float32)]
        for piece in self.plan.pieces(len(ids), logits):
            with _threads(1 if piece.stop - piece.start <= FEW else self.threads):
                found += self._run(piece, ids[piece.start : piece.stop], state)
        return np.concatenate(found)

    def sample(self, tokens: Sequence[int], state: State, draw: Draw) -> int:
        """Append ``tokens`` and return the token that the plan's launches choose.

        A token that they chose is read by the next step from where they put it.
        """
        ids = self.check(tokens, state)
        length = state.length + len(ids)
        if not draw.greedy:
            start, numbers = control.numbers(draw, length, self.plan.capacity)
            self._write("random", numbers, start)
        ready = len(ids) == 1 and self._ready == (state.length, int(ids[0]), draw)
        for piece in self.plan.pieces(len(ids), "last"):
            with _threads(1 if piece.stop - piece.start <= FEW else self.threads):
                self._run(piece, ids[piece.start : piece.stop], state, ready=ready)
        if not ready:
            self._write("control", control.values(length - 1, self._dense_len, 1, draw))
        choice = self.plan.sampling["greedy" if draw.greedy else "draw"]
        self._arena.fill_(_POISON)
        memory = self._memory(choice, state)
        for launch in choice.launches:
            self._launch(launch, memory, {"n": 1, "r": 1, "c": 0})
        token = control.chosen(int(self._fixed["token"].view(torch.int32)[0]), self.vocab_size)
        self._ready = length, token, draw
        return token

    def trace(self, tokens: Sequence[int], state: State) -> Mapping[str, np.ndarray]:
        """Run ``tokens`` like ``step`` and keep the residual stream after every layer for ``tap``."""
        ids = self.check(tokens, state)
        kept: dict[str, list[np.ndarray]] = {}
        for piece in self.plan.pieces(len(ids), "last"):
            self._run(piece, ids[piece.start : piece.stop], state, kept)
        self._traced = {name: np.concatenate(parts) for name, parts in kept.items()}
        return self._traced

    def tap(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return inner values of the last ``trace``: ``layer.N`` is (tokens, hidden) after layer N."""
        return {name: self._traced[name] for name in names}

    def close(self) -> None:
        """Drop the weights and the arena."""
        self._fixed, self._arena = {}, torch.empty(0, dtype=torch.uint8)

    def _memory(self, schedule: Schedule, state: State) -> dict[str, torch.Tensor]:
        """Return the bytes of every buffer that ``schedule`` may name."""
        assert isinstance(state, PlanState)
        memory = {**self._fixed, **state.memory}
        for buffer in schedule.scratch:
            assert buffer.offset is not None
            end = buffer.offset + buffer.nbytes({"n": schedule.tokens, "r": schedule.rows})
            memory[buffer.name] = self._arena[buffer.offset : end]
        return memory

    def _run(
        self,
        piece: Piece,
        ids: np.ndarray,
        state: State,
        kept: dict[str, list[np.ndarray]] | None = None,
        ready: bool = False,
    ) -> list[np.ndarray]:
        """Run one piece; return the logits of each group of rows and append what taps see to ``kept``, if given.

        Where memory is ``ready``, position and token stand there already.
        """
        schedule = self.plan.schedules[piece.schedule]
        self._arena.fill_(_POISON)
        self._ready = None
        if not ready:
            self._write("control", control.values(state.length, self._dense_len, len(ids)))
            self._write("tokens", ids)
        assert isinstance(state, PlanState)
        sizes = {"n": len(ids), "r": 0, "c": state.held}
        memory = self._memory(schedule, state)
        taps = {tap.after: tap for tap in schedule.taps}
        count = self.plan.storing(schedule) if kept is None and not piece.groups else schedule.head
        for index, launch in enumerate(schedule.launches[:count]):
            self._launch(launch, memory, sizes)
            if kept is not None and index in taps:
                stream = memory[taps[index].buffer].view(torch.float32).view(schedule.tokens, -1)
                kept.setdefault(taps[index].name, []).append(stream[: len(ids)].numpy().copy())
        found = []
        for group in piece.groups:
            self._write("rows", np.array(group, np.int32))
            for launch in schedule.launches[schedule.head :]:
                self._launch(launch, memory, {**sizes, "r": len(group)})
            logits = self._fixed["logits"].view(torch.float32).view(-1, self.vocab_size)
            found.append(logits[: len(group)].numpy().copy())
        state.length += len(ids)
        return found

    def _write(self, name: str, values: np.ndarray, start: int = 0) -> None:
        place = self._fixed[name].view(torch.float32 if values.dtype == np.float32 else torch.int32)
        place[start : start + values.size] = torch.from_numpy(values)

    def _launch(self, launch: Launch, memory: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
        kernel = self.plan.kernels[launch.kernel]
        pointers = iter(launch.pointers)
        arguments: dict[str, Any] = {}
        for argument in kernel.arguments:
            extents = argument.extents(sizes)
            if argument.role == "scalar":
                arguments[argument.name] = extents[0]
                continue
            pointer = next(pointers)
            values = memory[pointer.buffer][pointer.offset :].view(DTYPES[argument.dtype])
            arguments[argument.name] = values.as_strided(extents, argument.strides(sizes), values.storage_offset())
        description = kernels.kernel(kernel.name)
        description.reference(description.parse(kernel.options), arguments, sizes["n"], sizes["r"])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _poisoned(nbytes: int) -> torch.Tensor:
    return torch.full((nbytes,), _POISON, dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def open(artifact: Artifact, threads: int | None = None, attention: str | None = None) -> PlanInterpreter:
    """Open ``artifact`` of the cuda backend on the CPU."""
    return PlanInterpreter(artifact, threads, attention)
