"""What a generation gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from arkinfer.runtime.reasoning import Kind

Finish: TypeAlias = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has just become certain; ``token`` is the id that completed it."""

    text: str
    kind: Kind
    token: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. ``cached_tokens`` of the prompt were in the session already and cost nothing."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of wall time: reading the prompt, to the first token, and from the first token to the last."""

    prefill: float
    first_token: float
    decode: float


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation: the answer, the reasoning before it (or ""), and the ids of both as generated.

    ``finish_reason``: ``stop`` (end of answer or stop string), ``length`` (``max_tokens`` or the context is full),
    ``cancelled``, ``error``.
    """

    text: str
    reasoning: str
    tokens: tuple[int, ...]
    usage: Usage
    timing: Timing
    finish_reason: Finish

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed after the first token; None for answers shorter than two tokens."""
        steps = self.usage.completion_tokens - 1
        return steps / self.timing.decode if steps > 0 and self.timing.decode > 0 else None

    def to_dict(self) -> dict[str, object]:
        """Return the result as ``--json`` prints it."""
        return {**asdict(self), "tokens": list(self.tokens), "tokens_per_second": self.tokens_per_second}
