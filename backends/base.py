"""What every backend provides: an Executor that runs an artifact, and the State of one token sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from arkinfer.errors import UnsupportedError, UserError
from arkinfer.targets import probe

Rows: TypeAlias = Literal["last", "all", "none"]


@dataclass(frozen=True, eq=False)
class Draw:
    """How an executor chooses the tokens of one answer by itself. ``temperature`` 0 or ``top_k`` 1: the largest logit.

    ``numbers`` (count,) float32 from 0 to below 1: ``numbers[i]`` decides on the token at position ``first + i``, as
    runtime/sampling.py would with the same number. ``top_k`` 0 and ``top_p`` 1 exclude nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    first: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


class State(ABC):
    """The caches of one token sequence, made by ``Executor.new_state``.

    ``length`` tokens are in the caches; ``capacity`` is the most they can hold.
    """

    length: int
    capacity: int

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget every token from position ``length`` on. Raises UserError outside ``0..self.length``."""

    @abstractmethod
    def fork(self) -> State:
        """Return an independent copy: steps on one never show in the other."""


class Executor(ABC):
    """Runs one artifact. Not thread-safe: the Engine serialises its steps.

    Logits do not depend on how tokens are cut into steps (on GPUs: but for float16 rounding), nor on the thread count.
    """

    vocab_size: int
    max_context: int
    threads: int
    isa: str
    draws: bool = False  # whether ``sample`` is there

    @abstractmethod
    def new_state(self, capacity: int | None = None) -> State:
        """Reserve caches for at least ``capacity`` tokens (default and most: ``max_context``)."""

    @abstractmethod
    def step(self, tokens: Sequence[int], state: State, logits: Rows = "last") -> np.ndarray:
        """Append ``tokens`` to ``state`` and return logits (rows, vocab) float32.

        Row i belongs to the i-th of ``tokens`` for ``logits="all"``; ``"last"`` gives one row, ``"none"`` no row and
        skips the output layer. The array stays valid after later steps. Raises UserError, with the state as it was,
        when a token is outside the vocabulary or the state would overflow.
        """

    def sample(self, tokens: Sequence[int], state: State, draw: Draw) -> int:
        """Append ``tokens`` to ``state`` like ``step`` and return the token that follows, chosen where logits are made.

        Handing the token that it returned to the next call with the same ``draw`` is the cheap case: on GPUs it lies
        where that step reads it. Raises what ``step`` raises, and InternalError for logits that are not numbers.
        """
        raise UnsupportedError(f"the {type(self).__name__} leaves choosing tokens to the host", code="ARK-E320")

    def check(self, tokens: Sequence[int], state: State) -> np.ndarray:
        """Return ``tokens`` as int32 if ``state`` can take them. Raises UserError for the reasons that `step` names."""
        ids = np.array(tokens, np.int64)
        if ids.size == 0:
            raise UserError("a step needs at least one token", code="ARK-E214")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise UserError(
                "a token id lies outside the vocabulary",
                facts={"ids": f"{ids.min()}..{ids.max()}", "vocabulary": self.vocab_size},
                code="ARK-E215",
            )
        if state.length + ids.size > state.capacity:
            raise UserError(
                "the context is full",
                facts={"in the context": state.length, "new tokens": ids.size, "capacity": state.capacity},
                hint="start a new session, or build again with a larger --context",
                code="ARK-E216",
            )
        return ids.astype(np.int32)

    def trace(self, tokens: Sequence[int], state: State) -> Mapping[str, np.ndarray]:
        """Append ``tokens`` like ``step`` and return inner values by name, see ``tap``."""
        raise UnsupportedError(f"the {type(self).__name__} shows no inner values", code="ARK-E320")

    @abstractmethod
    def tap(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return inner values of the last traced step by name: ``layer.N`` is (tokens, hidden) after layer N."""

    @abstractmethod
    def close(self) -> None:
        """Release the artifact's files and memory. Closing twice is harmless."""

    def fill(self, state: State, depth: int) -> None:
        """Make ``state`` ``depth`` tokens long with arbitrary contents, so that timing at depth needs no prefill."""
        raise UnsupportedError(f"the {type(self).__name__} cannot fill a context without computing it", code="ARK-E320")

    def decode_bytes(self, depth: int) -> int:
        """Return the bytes that one decode step must read when ``depth`` tokens are in the context."""
        raise UnsupportedError(f"the {type(self).__name__} does not count its memory traffic", code="ARK-E320")

    def bandwidth(self, seconds: float = 1.0) -> float:
        """Measure for about ``seconds`` how fast the memory that the executor reads can be read, in bytes/s."""
        return probe.measure_read_bandwidth(self.threads, seconds)

    def prefill_ops(self, tokens: int, depth: int) -> int:
        """Return the multiply and add operations of a prefill of ``tokens`` after ``depth`` (attention excluded)."""
        raise UnsupportedError(f"the {type(self).__name__} does not count its operations", code="ARK-E320")

    def peak_ops(self) -> float:
        """Measure the operations per second that this executor's threads and instruction set can reach, at most.

        Counted as in ``prefill_ops``, for the arithmetic that the artifact's linear layers use. Takes about a second.
        """
        raise UnsupportedError(f"the {type(self).__name__} does not measure its arithmetic peak", code="ARK-E320")


def truncated(state: State, length: int) -> int:
    """Return ``length`` if ``state`` can be cut to it. Raises UserError otherwise."""
    if not 0 <= length <= state.length:
        raise UserError(f"cannot truncate a state of {state.length} tokens to {length}", code="ARK-E211")
    return length
