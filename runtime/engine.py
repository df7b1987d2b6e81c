"""The Engine: an opened artifact that any number of threads may generate from."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Unpack, cast

import numpy as np

from arkinfer import backends
from arkinfer.artifact import Artifact
from arkinfer.backends.base import Executor
from arkinfer.errors import UnsupportedError, UserError
from arkinfer.runtime.options import Generation, Message, Options, Prompt, Request, resolve
from arkinfer.runtime.reasoning import ReasoningSplitter, switch, with_switch, without_switches
from arkinfer.runtime.result import Result
from arkinfer.runtime.session import Session
from arkinfer.runtime.stream import Stream
from arkinfer.runtime.template import ChatTemplate
from arkinfer.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Metrics:
    """Totals since the engine was opened; seconds are wall time summed over requests."""

    requests: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def plus(self, result: Result) -> Metrics:
        """Return the totals with one more request."""
        return Metrics(
            self.requests + 1,
            self.cancelled + (result.finish_reason == "cancelled"),
            self.failed + (result.finish_reason == "error"),
            self.prompt_tokens + result.usage.prompt_tokens,
            self.cached_tokens + result.usage.cached_tokens,
            self.completion_tokens + result.usage.completion_tokens,
            self.prefill_seconds + result.timing.prefill,
            self.decode_seconds + result.timing.decode,
        )


class Prepared(NamedTuple):
    """A checked request: the prompt's ids, the options, and what separates reasoning from the answer, if anything."""

    ids: list[int]
    request: Request
    splitter: ReasoningSplitter | None


class Engine:
    """Generates text from one artifact. Thread-safe; steps of concurrent requests take turns. Close it when done."""

    def __init__(
        self, executor: Executor, tokenizer: Tokenizer, generation: Generation, template: ChatTemplate | None
    ) -> None:
        self.executor = executor
        self.tokenizer = tokenizer
        self.generation = generation
        self.template = template
        self.vocab_size = executor.vocab_size
        self.max_context = executor.max_context
        tags = generation.thinking
        ids = (tokenizer.token_id(tag) for tag in (tags.opening, tags.closing)) if tags is not None else ()
        self.tag_ids = frozenset(index for index in ids if index is not None)
        self._lock = threading.Lock()
        self._record = threading.RLock()  # a stream that the collector frees records itself, wherever that happens
        self._metrics = Metrics()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._process = os.getpid()
        self._closed = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is running and release the artifact. Closing twice is harmless."""
        self.cancel()
        with self._lock:
            if not self._closed:
                self._closed = True
                self.executor.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Result:
        """Generate an answer.

        ``prompt`` is either messages (``[{"role": "user", "content": ...}, ...]``), rendered by the model's chat
        template, or text, or token ids, which the model continues as they are (text gets the model's BOS token).
        Raises UserError for an empty prompt, an unknown option, a value out of range, or a prompt beyond the context.
        """
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Generate an answer piece by piece; ``stream.result`` holds all of it at the end."""
        prepared = self.prepare(prompt, options)
        needed = len(prepared.ids) + prepared.request.max_tokens
        return self.session(capacity=min(needed, self.max_context)).start(prepared)

    def session(self, system: str | None = None, capacity: int | None = None) -> Session:
        """Start a conversation, with an optional system message and a context of ``capacity`` tokens (default: all)."""
        if capacity is not None and not 1 <= capacity <= self.max_context:
            raise UserError(
                f"a session of {capacity} tokens is not possible",
                facts={"context of the artifact": self.max_context},
                code="ARK-E217",
            )
        with self.computing() as executor:
            session = Session(self, executor.new_state(capacity), system)
        with self._record:
            self._sessions.add(session)
        return session

    def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return next-token logits (n, vocab) float32 for ``token_ids`` (n) as they stand: no BOS is added."""
        ids = self.check(token_ids)
        if len(ids) > self.max_context:
            raise UserError(
                "the tokens do not fit into the context",
                facts={"tokens": len(ids), "context": self.max_context},
                hint="score shorter windows, or build again with a larger --context",
                code="ARK-E216",
            )
        return self.session(capacity=len(ids)).step(ids)

    def cancel(self) -> None:
        """End every running generation within one step. Safe from any thread; later requests are not affected."""
        with self._record:
            sessions = list(self._sessions)
        for session in sessions:
            session.cancel()

    @property
    def metrics(self) -> Metrics:
        """Totals since the engine was opened."""
        return self._metrics

    def prepare(self, prompt: Prompt, options: Options) -> Prepared:
        """Check ``options`` and turn ``prompt`` into ids. Raises UserError for whatever is wrong with them."""
        request = resolve(cast(Mapping[str, object], options), self.generation)
        if len(prompt) == 0:
            raise UserError("the prompt is empty", hint="give some text, messages or token ids", code="ARK-E222")
        if isinstance(prompt, str):
            self._reject_thinking(request)
            return Prepared(self._encode(prompt), request, None)
        if not isinstance(prompt[0], Mapping):
            self._reject_thinking(request)
            return Prepared(self.check(cast(Sequence[int], prompt)), request, None)
        text = self._render(cast(Sequence[Message], prompt), request.thinking)
        tags = self.generation.thinking
        splitter = None
        if tags is not None:
            splitter = ReasoningSplitter(tags.opening, tags.closing, text.rstrip().endswith(tags.opening))
        return Prepared(self._encode(text), request, splitter)

    def check(self, tokens: Sequence[int]) -> list[int]:
        """Return ``tokens`` as ints. Raises UserError if there is none or one lies outside the vocabulary."""
        try:
            ids = [int(token) for token in tokens]
        except (TypeError, ValueError) as error:
            raise UserError(f"token ids must be whole numbers: {error}", code="ARK-E215") from error
        if not ids:
            raise UserError("there are no tokens", hint="give at least one token id", code="ARK-E214")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise UserError(
                "a token id lies outside the vocabulary",
                facts={"ids": f"{min(ids)}..{max(ids)}", "vocabulary": self.vocab_size},
                code="ARK-E215",
            )
        return ids

    def record(self, result: Result) -> None:
        """Add a finished request to the metrics."""
        with self._record:
            self._metrics = self._metrics.plus(result)

    @contextmanager
    def computing(self) -> Iterator[Executor]:
        """Hold the executor for one step. Raises UserError once closed, UnsupportedError in a forked child."""
        if os.getpid() != self._process:
            raise UnsupportedError(
                "this engine was opened by the parent process; its threads do not exist here",
                hint="open the artifact after the fork, or use the `spawn` start method",
                code="ARK-E330",
            )
        with self._lock:
            if self._closed:
                raise UserError("the engine is closed", hint="open it again: arkinfer.load(path)", code="ARK-E224")
            yield self.executor

    def _encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, with BOS in front when the model wants it and the text does not spell it."""
        ids = self.tokenizer.encode(text)
        bos = self.generation.bos_id
        if self.generation.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def _reject_thinking(self, request: Request) -> None:
        if request.thinking is not None:
            raise UserError(
                "thinking needs messages: text and ids are continued as they stand",
                hint='prompt=[{"role": "user", "content": ...}]',
                code="ARK-E225",
            )

    def _render(self, messages: Sequence[Message], thinking: bool | None) -> str:
        if self.template is None:
            raise UserError(
                "this model has no chat template",
                hint="give the prompt as text (`arkinfer run --raw`), or add chat_template.jinja to the checkpoint",
                code="ARK-E226",
            )
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise UserError(
                    f"not a message: {message!r}", hint='{"role": "user", "content": "..."}', code="ARK-E227"
                )
        if self.generation.thinking is None:
            if thinking:
                raise UserError(
                    "this model has no thinking mode",
                    hint="leave `thinking` (--think) out",
                    code="ARK-E225",
                )
            return self.template.render(messages)
        asked = switch(messages)
        wanted = asked if thinking is None else thinking
        if self.template.switchable:
            # The template has a switch of its own: the words have done their work and the model need not see them.
            return self.template.render(without_switches(messages), thinking=wanted)
        if wanted is None:
            return self.template.render(messages)
        return self.template.render(with_switch(messages, "/think" if wanted else "/no_think"))


def load(path: str | Path, threads: int | None = None, attention: str | None = None) -> Engine:
    """Open the artifact at ``path``.

    ``threads``: worker threads (default ``ARKINFER_THREADS``, else every core). ``attention``: auto, dense or sparse
    (default: what the artifact was built for). Raises ArtifactError for a corrupt or foreign artifact and
    UnsupportedError when its backend cannot run on this machine.
    """
    return open_engine(Artifact.open(path), threads, attention)


def open_engine(artifact: Artifact, threads: int | None = None, attention: str | None = None) -> Engine:
    """Return an Engine on an artifact that is already open."""
    generation = Generation.from_file(artifact.file("generation.json"))
    tokenizer = Tokenizer.from_file(artifact.file("tokenizer.json"))
    template = None
    if "template.jinja" in artifact.manifest.files:
        eos = min(generation.eos_ids, default=None)
        named = {"bos_token": generation.bos_id, "eos_token": eos, "pad_token": generation.pad_id}
        spelled = {name: tokenizer.token(index) for name, index in named.items()}
        tokens = {name: text for name, text in spelled.items() if text is not None} | dict(generation.tokens)
        template = ChatTemplate(artifact.file("template.jinja").read_text(encoding="utf-8"), tokens)
    return Engine(backends.open(artifact, threads, attention), tokenizer, generation, template)
