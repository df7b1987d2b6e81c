"""What a caller may ask of a generation, and how it is checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeAlias, TypedDict

from arkinfer.errors import ArtifactError, UserError, nearest
from arkinfer.runtime.sampling import Sampling

Message: TypeAlias = Mapping[str, object]
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]


class Options(TypedDict, total=False):
    """The keyword options of ``generate``, ``stream`` and ``chat``; what is left out or None is the artifact's default.

    ``max_tokens``: most tokens of the answer, reasoning included (default 512). ``temperature``, ``top_k``, ``top_p``,
    ``min_p``, the penalties and ``seed``: see ``Sampling``. ``stop``: strings that end the answer; they are not shown
    and are not looked for in the reasoning. ``thinking``: turn reasoning on or off (messages only). ``progress``:
    called as ``progress(done, total)`` while the prompt is read.
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    thinking: bool | None
    progress: Callable[[int, int], None] | None


MAX_TOKENS = 512
_SAMPLING = tuple(item.name for item in fields(Sampling))


@dataclass(frozen=True)
class Thinking:
    """The tags around a model's reasoning."""

    opening: str
    closing: str


@dataclass(frozen=True)
class Generation:
    """An artifact's ``generation.json``: special ids and the sampling that its makers recommend.

    ``tokens`` are spellings for the template (``eos_token``: ...); what it lacks is spelled from the ids.
    """

    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    pad_id: int | None = None
    add_bos: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    thinking: Thinking | None = None
    tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_file(cls, path: Path) -> Generation:
        """Read ``path``. Raises ArtifactError for anything but the fields above."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            tags = values.pop("thinking", None)
            eos = frozenset(int(index) for index in values.pop("eos_ids", []))
            thinking = Thinking(str(tags["open"]), str(tags["close"])) if tags else None
            return cls(eos_ids=eos, thinking=thinking, **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(
                "the artifact's generation.json cannot be read",
                facts={"file": path, "reason": error},
                hint="build the artifact again",
                code="ARK-E522",
            ) from error


@dataclass(frozen=True)
class Request:
    """Checked options with the defaults filled in."""

    sampling: Sampling
    max_tokens: int = MAX_TOKENS
    stop: tuple[str, ...] = ()
    thinking: bool | None = None
    progress: Callable[[int, int], None] | None = field(default=None, compare=False)


def resolve(options: Mapping[str, object], defaults: Generation) -> Request:
    """Return the request that ``options`` describe. Raises UserError for an unknown name or a bad value."""
    known = list(Options.__annotations__)
    for name in options:
        if name not in known:
            raise UserError(f"unknown option `{name}`", hint=nearest(name, known), code="ARK-E220")
    given = {name: value for name, value in options.items() if value is not None}
    base: dict[str, object] = {"temperature": defaults.temperature, "top_p": defaults.top_p, "top_k": defaults.top_k}
    base.update({name: value for name, value in given.items() if name in _SAMPLING})
    limit = given.get("max_tokens", MAX_TOKENS)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise UserError(f"max_tokens must be a whole number from 1 up, not {limit!r}", code="ARK-E221")
    thinking = given.get("thinking")
    if thinking is not None and not isinstance(thinking, bool):
        raise UserError(f"thinking is True, False or None, not {thinking!r}", code="ARK-E221")
    progress = given.get("progress")
    if progress is not None and not callable(progress):
        raise UserError("progress must be callable: progress(done, total)", code="ARK-E221")
    return Request(Sampling(**base), limit, _stops(given.get("stop", ())), thinking, progress)  # type: ignore[arg-type]


def _stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) and stop for stop in stops):
        raise UserError(f"stop is a non-empty string or a list of them, not {value!r}", code="ARK-E221")
    return tuple(stops)
