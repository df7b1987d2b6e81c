"""Chat templates: messages to prompt text, as ``transformers`` renders them, in an engine that templates cannot leave.

minijinja has no access to Python attributes or to files; loops are bounded by fuel and the result by ``OUTPUT_LIMIT``.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import minijinja

from arkinfer.errors import UserError

FUEL = 2_000_000  # template instructions; a conversation of 1000 messages takes about a tenth
OUTPUT_LIMIT = 8_000_000  # characters


class _WholeFloat:
    """A float without a fraction, such as 3.0: the engine would hand it to a filter as the integer 3."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __str__(self) -> str:
        return repr(self.value)

    __repr__ = __str__


def _guarded(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return _WholeFloat(value)
    if isinstance(value, Mapping):
        return {key: _guarded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_guarded(item) for item in value]
    return value


def _plain(value: object) -> object:
    if isinstance(value, _WholeFloat):
        return value.value
    raise TypeError(f"{type(value).__name__} has no JSON form")


class _Refusal(Exception):
    """A template called ``raise_exception``."""


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter as transformers defines it; the engine's own escapes ``<``, ``>``, ``&`` and quotes for HTML."""
    pair = (separators[0], separators[1]) if separators else None
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys, default=_plain
    )


def _raise_exception(message: str) -> str:
    raise _Refusal(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _environment() -> minijinja.Environment:
    # Made anew for each rendering: an Environment holds its globals, and renderings may run in several threads.
    return minijinja.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        pycompat=True,
        fuel=FUEL,
        auto_escape_callback=lambda name: False,
        filters={"tojson": _tojson},
        globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
    )


def render(source: str, variables: Mapping[str, object]) -> str:
    """Return template ``source`` rendered with ``variables``: the only place in arkinfer where a template runs.

    Raises UserError when the template is malformed, refuses the messages, or runs too long.
    """
    try:
        text = str(_environment().render_str(source, **{name: _guarded(value) for name, value in variables.items()}))
    except minijinja.TemplateError as error:
        reason = getattr(error, "message", None) or str(error).splitlines()[0]
        raise _failure(error.__cause__ or error, reason) from error
    except _Refusal as error:
        raise _failure(error, str(error)) from error
    if len(text) > OUTPUT_LIMIT:
        raise UserError(
            "the chat template produced too much text",
            facts={"characters": len(text), "limit": OUTPUT_LIMIT},
            code="ARK-E233",
        )
    return text


def _failure(error: BaseException, reason: str) -> UserError:
    if isinstance(error, _Refusal):
        return UserError(
            f"the chat template refuses these messages: {error}",
            hint="check the order and the roles of the messages",
            code="ARK-E231",
        )
    return UserError(
        "the chat template cannot be rendered",
        facts={"reason": reason},
        hint="give the prompt as plain text (`arkinfer run --raw`), or repair template.jinja and build again",
        code="ARK-E232",
    )


@functools.cache
def _variables(source: str) -> frozenset[str]:
    try:
        return frozenset(_environment().undeclared_variables_in_str(source))
    except minijinja.TemplateError:
        return frozenset()


@dataclass(frozen=True)
class ChatTemplate:
    """The template of one model, with the spellings of its special tokens (``bos_token`` and so on)."""

    source: str
    tokens: Mapping[str, str]

    @property
    def switchable(self) -> bool:
        """Whether the template takes ``enable_thinking``."""
        return "enable_thinking" in _variables(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        open_answer: bool = True,
    ) -> str:
        """Return the prompt for ``messages``; with ``open_answer`` it ends where the assistant begins to speak."""
        variables: dict[str, object] = {
            "messages": [dict(message) for message in messages],
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": open_answer,
            **self.tokens,
        }
        if thinking is not None:
            variables["enable_thinking"] = thinking
        return render(self.source, variables)
