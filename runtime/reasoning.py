"""Thinking: the block that a model writes before its answer, and the switches that turn it on and off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["text", "reasoning"]
SWITCHES = {"/think": True, "/no_think": False}


class ReasoningSplitter:
    """Separates a leading ``<think>...</think>`` block from the answer as the text arrives.

    Only a block at the very beginning is reasoning: a tag that the answer quotes stays in the answer. White space
    around the tags belongs to neither part. ``inside`` says that the prompt has already opened the block.
    """

    def __init__(self, opening: str, closing: str, inside: bool = False) -> None:
        self._opening = opening
        self._closing = closing
        self._state: Literal["start", "opened", "reasoning", "closed", "text"] = "opened" if inside else "start"
        self._held = ""

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside the block."""
        return self._state in ("opened", "reasoning")

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """Return the parts that are certain; what could be the beginning of a tag is held back."""
        parts: list[tuple[Kind, str]] = []
        self._held += text
        while self._advance(parts):
            pass
        return parts

    def flush(self) -> list[tuple[Kind, str]]:
        """Return the held text at the end."""
        text, self._held = self._held, ""
        if self.thinking:
            text = text.rstrip()
            return [("reasoning", text)] if text else []
        return [("text", text)] if text and self._state != "closed" else []

    def _advance(self, parts: list[tuple[Kind, str]]) -> bool:
        """Do one step of the automaton; False when it needs more text."""
        if self._state == "start":
            body = self._held.lstrip()
            if body.startswith(self._opening):
                self._state, self._held = "opened", body[len(self._opening) :]
                return True
            if self._opening.startswith(body):
                return False
            self._state = "text"
            return True
        if self._state in ("opened", "closed"):
            self._held = self._held.lstrip()
            if self._held:
                self._state = "reasoning" if self._state == "opened" else "text"
            return bool(self._held)
        if self._state == "reasoning":
            return self._reason(parts)
        if self._held:
            parts.append(("text", self._held))
            self._held = ""
        return False

    def _reason(self, parts: list[tuple[Kind, str]]) -> bool:
        thought, tag, rest = self._held.partition(self._closing)
        if tag:
            if thought.rstrip():
                parts.append(("reasoning", thought.rstrip()))
            self._state, self._held = "closed", rest
            return True
        sizes = range(min(len(self._closing) - 1, len(self._held)), 0, -1)
        partial = next((size for size in sizes if self._closing.startswith(self._held[-size:])), 0)
        body = self._held[: len(self._held) - partial].rstrip()
        if body:
            parts.append(("reasoning", body))
            self._held = self._held[len(body) :]
        return False


def _switch_of(message: Mapping[str, object]) -> tuple[str, str]:
    """Return a user message's text without the switch that ends it, and the switch; "" where there is none."""
    content = message.get("content")
    if message.get("role") != "user" or not isinstance(content, str):
        return "", ""
    word = (content.split() or [""])[-1]
    return (content.rstrip()[: -len(word)].rstrip(), word) if word in SWITCHES else (content, "")


def switch(messages: Sequence[Mapping[str, object]]) -> bool | None:
    """Return what a ``/think`` or ``/no_think`` at the end of the last user message asks for, or None."""
    last = next((message for message in reversed(messages) if message.get("role") == "user"), {})
    return SWITCHES.get(_switch_of(last)[1])


def without_switches(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return ``messages`` without the switches at the ends of user messages."""
    return [
        {**message, "content": text} if word else message
        for message in messages
        for text, word in [_switch_of(message)]
    ]


def with_switch(messages: Sequence[Mapping[str, object]], word: str) -> list[Mapping[str, object]]:
    """Return ``messages`` with the last user message's switch, present or not, set to ``word``."""
    result = list(messages)
    users = [index for index, message in enumerate(messages) if message.get("role") == "user"]
    if users and isinstance(messages[users[-1]].get("content"), str):
        message = messages[users[-1]]
        result[users[-1]] = {**message, "content": f"{_switch_of(message)[0]} {word}".strip()}
    return result
