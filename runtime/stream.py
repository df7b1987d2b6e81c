"""One generation, piece by piece: prefill in chunks, then sample, decode and filter a token at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from arkinfer.runtime.options import Request
from arkinfer.runtime.reasoning import Kind, ReasoningSplitter
from arkinfer.runtime.result import Finish, Piece, Result, Timing, Usage
from arkinfer.runtime.sampling import Sampler, drawing
from arkinfer.runtime.stops import StopFilter

if TYPE_CHECKING:
    from arkinfer.runtime.session import Session

CHUNK = 512  # prompt tokens per step: the longest that a cancel has to wait


class Stream:
    """Iterates over the ``Piece``s of one generation; after the last one, ``result`` holds all of it.

    Leaving the loop early is fine: ``close`` (or the end of the ``with`` block, or dropping the stream) frees the
    session. ``cancel`` may be called from any thread and takes effect within one step.
    """

    def __init__(self, run: Run) -> None:
        # Nothing that the run holds may lead back to this object, or dropping it would not free the session at once.
        self._run = run
        self._pieces = run.pieces()

    @property
    def result(self) -> Result | None:
        """The whole generation, once it has ended."""
        return self._run.result

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def cancel(self) -> None:
        """End the generation after the step that is running; ``result`` then says ``cancelled``."""
        self._run.stopped.set()

    def close(self) -> None:
        """End the generation here. Harmless when it has ended."""
        self._pieces.close()
        self._run.end("cancelled")

    def finish(self) -> Result:
        """Read to the end and return the result."""
        for _ in self:
            pass
        assert self._run.result is not None
        return self._run.result


class Run:
    """The state of one generation, and the loop that advances it."""

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        request: Request,
        splitter: ReasoningSplitter | None,
        finished: Callable[[Result], None],
    ) -> None:
        self._session = session
        self._prompt = prompt
        self._request = request
        self._splitter = splitter
        self._finished = finished
        self._tokens: list[int] = []
        self._parts: dict[Kind, list[str]] = {"text": [], "reasoning": []}
        self._cached = 0
        self._began = self._first = self._last = 0.0
        self._prefill = 0.0
        self.stopped = threading.Event()
        self.result: Result | None = None

    def pieces(self) -> Generator[Piece, None, None]:
        """Generate; ``result`` is set when this ends, however it ends."""
        finish: Finish = "error"
        try:
            finish = yield from self._generate()
        except GeneratorExit:
            finish = "cancelled"
            raise
        finally:
            self.end(finish)

    def end(self, finish: Finish) -> None:
        """Sum up, and hand the session back. Only the first call counts."""
        if self.result is None:
            self.result = self._summary(finish)
            self._finished(self.result)

    def _generate(self) -> Generator[Piece, None, Finish]:
        session, request = self._session, self._request
        engine = session.engine
        self._began = time.perf_counter()
        choose = self._chooser()
        first = self._read_prompt(choose)
        if first is None:
            return "cancelled"
        token = first
        detokenizer = engine.tokenizer.stream(engine.tag_ids)
        stops = StopFilter(request.stop)
        while True:
            self._last = time.perf_counter()
            if not self._tokens:
                self._first = self._last
            if token in engine.generation.eos_ids:
                yield from self._flush(detokenizer.flush(), stops, token)
                return "stop"
            self._tokens.append(token)
            yield from self._show(detokenizer.push(token), stops, token)
            if stops.hit is not None:
                return "stop"
            if len(self._tokens) >= request.max_tokens or session.length >= session.capacity:
                yield from self._flush(detokenizer.flush(), stops, token)
                return "stop" if stops.hit is not None else "length"
            if self.stopped.is_set():
                yield from self._flush(detokenizer.flush(), stops, token)
                return "cancelled"
            token = choose([token])

    def _chooser(self) -> Callable[[list[int]], int]:
        """Return what appends tokens and chooses the next one: the executor itself where it can, else a Sampler."""
        session, sampling = self._session, self._request.sampling
        if session.engine.executor.draws and sampling.plain:
            first = len(self._prompt)
            draw = drawing(sampling, first, min(self._request.max_tokens, session.capacity - first + 1))
            return lambda tokens: session.sample(tokens, draw)
        sampler = Sampler(sampling, session.engine.vocab_size, self._prompt)
        return lambda tokens: sampler(session.append(tokens, "last")[0])

    def _read_prompt(self, choose: Callable[[list[int]], int]) -> int | None:
        """Bring the session to the prompt's end and return the token that ``choose`` finds there; None if cancelled."""
        session, total = self._session, len(self._prompt)
        self._cached = session.rewind(self._prompt)
        token: int | None = None
        for start in range(self._cached, total, CHUNK):
            if self.stopped.is_set():
                return None
            chunk = list(self._prompt[start : start + CHUNK])
            done = start + len(chunk)
            if done == total:
                token = choose(chunk)
            else:
                session.append(chunk, "none")
            if self._request.progress is not None:
                self._request.progress(done, total)
        self._prefill = time.perf_counter() - self._began
        return None if self.stopped.is_set() else token

    def _show(self, text: str, stops: StopFilter, token: int) -> Generator[Piece, None, None]:
        parts: list[tuple[Kind, str]] = [("text", text)] if self._splitter is None else self._splitter.push(text)
        for kind, part in parts:
            yield from self._emit(kind, stops.push(part) if kind == "text" else part, token)

    def _flush(self, text: str, stops: StopFilter, token: int) -> Generator[Piece, None, None]:
        yield from self._show(text, stops, token)
        for kind, part in self._splitter.flush() if self._splitter is not None else ():
            yield from self._emit(kind, stops.push(part) if kind == "text" else part, token)
        yield from self._emit("text", stops.flush(), token)

    def _emit(self, kind: Kind, text: str, token: int) -> Generator[Piece, None, None]:
        if text:
            self._parts[kind].append(text)
            yield Piece(text, kind, token)

    def _summary(self, finish: Finish) -> Result:
        started = self._first > 0
        return Result(
            text="".join(self._parts["text"]),
            reasoning="".join(self._parts["reasoning"]),
            tokens=tuple(self._tokens),
            usage=Usage(len(self._prompt), self._cached, len(self._tokens)),
            timing=Timing(
                prefill=self._prefill,
                first_token=self._first - self._began if started else 0.0,
                decode=self._last - self._first if started else 0.0,
            ),
            finish_reason=finish,
        )
