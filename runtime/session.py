"""A Session: one conversation, whose keys and values stay computed from turn to turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Unpack

import numpy as np

from arkinfer.backends.base import Draw, Executor, Rows, State
from arkinfer.errors import UserError
from arkinfer.runtime.options import Message, Options, Prompt
from arkinfer.runtime.result import Result
from arkinfer.runtime.stream import CHUNK, Run, Stream

if TYPE_CHECKING:
    from arkinfer.runtime.engine import Engine, Prepared


class Session:
    """One conversation on an Engine. Made by ``Engine.session``; use it from one place at a time.

    A prompt that begins like what the session holds costs only its new part: the longest common prefix is kept.
    A call while another call or an unfinished stream is at work on the same session raises UserError; ``cancel`` is
    the one method that other threads may call.
    """

    def __init__(self, engine: Engine, state: State, system: str | None = None) -> None:
        self.engine = engine
        self._state = state
        self._tokens: list[int] = []
        self._system = system
        self._messages: list[Message] = self._opening()
        self._busy = threading.Lock()
        self._stopped: threading.Event | None = None

    @property
    def length(self) -> int:
        """Tokens in the context."""
        return self._state.length

    @property
    def capacity(self) -> int:
        """Most tokens that the context can hold."""
        return min(self._state.capacity, self.engine.max_context)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids in the context."""
        return tuple(self._tokens)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far, system message included."""
        return tuple(self._messages)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Append ``tokens`` and return their next-token logits (n, vocab) float32, however they are cut into calls.

        Raises UserError, before anything is computed, if the context cannot hold them or an id is out of range.
        """
        ids = self.engine.check(tokens)
        with self._working():
            if self.length + len(ids) > self.capacity:
                raise self._overflow(len(ids))
            logits = np.empty((len(ids), self.engine.vocab_size), np.float32)
            for start in range(0, len(ids), CHUNK):
                chunk = ids[start : start + CHUNK]
                logits[start : start + len(chunk)] = self.append(chunk, "all")
            return logits

    def truncate(self, length: int) -> None:
        """Forget everything from token ``length`` on. Raises UserError outside ``0..self.length``."""
        with self._working():
            if not 0 <= length <= self.length:
                raise UserError(
                    f"cannot cut a context of {self.length} tokens to {length}",
                    hint=f"any length from 0 to {self.length}",
                    code="ARK-E211",
                )
            self._cut(length)

    def reset(self) -> None:
        """Begin the conversation anew, with the same system message."""
        with self._working():
            self._cut(0)
            self._messages = self._opening()

    def fork(self) -> Session:
        """Return an independent copy of the conversation and its context."""
        with self._working():
            with self.engine.computing():
                twin = Session(self.engine, self._state.fork(), self._system)
            twin._tokens, twin._messages = list(self._tokens), list(self._messages)
            return twin

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Result:
        """Generate from ``prompt``, the whole of it: text, messages or ids; see ``Engine.generate``."""
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Generate from ``prompt`` piece by piece; see ``Engine.stream``."""
        return self.start(self.engine.prepare(prompt, options))

    def chat(self, message: str, **options: Unpack[Options]) -> Result:
        """Answer the next ``message`` of the conversation and remember both."""
        return self.chat_stream(message, **options).finish()

    def chat_stream(self, message: str, **options: Unpack[Options]) -> Stream:
        """Answer ``message`` piece by piece.

        A cancelled answer is remembered as far as it went; after an error, or with no answer at all, the conversation
        is what it was before.
        """
        if not isinstance(message, str) or not message.strip():
            raise UserError("the message is empty", hint="write something to answer", code="ARK-E222")
        prompt: list[Message] = [*self._messages, {"role": "user", "content": message}]
        return self.start(self.engine.prepare(prompt, options), message)

    def cancel(self) -> None:
        """End the running generation, if any, within one step. Safe from any thread."""
        stopped = self._stopped
        if stopped is not None:
            stopped.set()

    def start(self, prepared: Prepared, message: str | None = None) -> Stream:
        """Generate from a prepared prompt, and remember ``message`` and its answer if given. Internal."""
        ids, request, splitter = prepared
        if len(ids) >= self.capacity:
            raise UserError(
                "the prompt does not fit into the context",
                facts={
                    "prompt": f"{len(ids)} tokens",
                    "context": f"{self.capacity} tokens, one of them for the answer",
                },
                hint="shorten the prompt, reset the session, or build again with a larger --context",
                code="ARK-E216",
            )
        self._acquire()
        run = Run(self, ids, request, splitter, lambda result: self._finished(result, message))
        self._stopped = run.stopped
        return Stream(run)

    def append(self, tokens: Sequence[int], logits: Rows) -> np.ndarray:
        """Run one executor step and record it. Internal: ``step`` is the checked form."""
        with self._advancing(tokens) as executor:
            return executor.step(tokens, self._state, logits)

    def sample(self, tokens: Sequence[int], draw: Draw) -> int:
        """Run one executor step that chooses the next token, and record it. Internal."""
        with self._advancing(tokens) as executor:
            return executor.sample(tokens, self._state, draw)

    def rewind(self, prompt: Sequence[int]) -> int:
        """Keep the longest beginning that ``prompt`` shares with the context, short of its last token. Internal."""
        most = min(len(prompt) - 1, len(self._tokens))
        shared = next((index for index in range(most) if prompt[index] != self._tokens[index]), most)
        self._cut(shared)
        return shared

    def _opening(self) -> list[Message]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]

    def _cut(self, length: int) -> None:
        if length < self._state.length:
            with self.engine.computing():
                self._state.truncate(length)
        del self._tokens[length:]

    def _finished(self, result: Result, message: str | None) -> None:
        answered = result.finish_reason != "error" and (result.text or result.reasoning)
        if message is not None and answered:
            answer: dict[str, object] = {"role": "assistant", "content": result.text}
            if result.reasoning:
                answer["reasoning_content"] = result.reasoning
            self._messages += [{"role": "user", "content": message}, answer]
        self._stopped = None
        self._busy.release()
        self.engine.record(result)

    def _acquire(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise UserError(
                "the session is at work: a Session serves one call at a time",
                hint="finish or close its stream first, or use one session per thread (engine.session())",
                code="ARK-E223",
            )

    @contextmanager
    def _working(self) -> Iterator[None]:
        self._acquire()
        try:
            yield
        finally:
            self._busy.release()

    @contextmanager
    def _advancing(self, tokens: Sequence[int]) -> Iterator[Executor]:
        """Hold the executor for a step of ``tokens``; one that fails half-way leaves the context as it was."""
        with self.engine.computing() as executor:
            try:
                yield executor
            except BaseException:
                if self._state.length > len(self._tokens):
                    self._state.truncate(len(self._tokens))
                raise
        self._tokens += tokens

    def _overflow(self, count: int) -> UserError:
        return UserError(
            "the context is full",
            facts={"in the context": self.length, "new tokens": count, "capacity": self.capacity},
            hint="truncate or reset the session, or build again with a larger --context",
            code="ARK-E216",
        )
