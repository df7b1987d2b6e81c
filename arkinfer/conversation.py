"""A model's chat template as MLC's conversation template: prefixes and separators, no logic.

MLC writes ``system_template``, then for each message its role, its content and a separator, and the assistant's role
at the end (mlc_llm.protocol.conversation_protocol). What a Jinja template does beyond that has no place there: it is
either proved not to matter, by rendering conversations both ways, or refused, or noted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arkinfer.errors import ArkError, UnsupportedError
from arkinfer.runtime.template import ChatTemplate

SYSTEM = "{system_message}"
_DEFAULT = "You are a helpful assistant."
_WORDS = ("Saffron", "Quince", "Walnut", "Turnip", "Radish", "Fennel", "Orache")  # one for each message
_LINES = "Two lines\n\nof text,  with  spaces."

Message = Mapping[str, str]


@dataclass(frozen=True)
class Conversation:
    """``fields`` are those of MLC's conv_template; ``notes`` say what they cannot express, for people."""

    fields: Mapping[str, Any]
    notes: tuple[str, ...]

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text that MLC makes of ``messages``, ended by the assistant's role, as its engine does."""
        fields, rest = self.fields, list(messages)
        system = fields["system_message"]
        if rest and rest[0]["role"] == "system":
            system = rest.pop(0)["content"]
        last = max((index for index, message in enumerate(rest) if message["role"] == "user"), default=-1)
        pieces = [fields["system_template"].replace(SYSTEM, system)]
        for index, message in enumerate(rest):
            role, content = message["role"], message["content"]
            if fields["strip_reasoning_in_history"] and role == "assistant" and index < last:
                content = content.split("</think>")[-1].lstrip("\n") if "</think>" in content else content
            pieces.append(fields["roles"][role] + fields["role_content_sep"] + content)
            pieces.append(fields["seps"][role == "assistant"])
        return "".join([*pieces, fields["roles"]["assistant"], fields["role_empty_sep"]])


def express(name: str, template: ChatTemplate | None, generation: Mapping[str, Any]) -> Conversation:
    """Return the conversation template called ``name``; ``generation`` is what generation.json holds.

    Raises UnsupportedError (ARK-E336) where ``template`` gives other prompts than MLC's fields can.
    """
    fields: dict[str, Any] = {
        "name": name,
        "add_role_after_system_message": True,
        "role_templates": {role: f"{{{role}_message}}" for role in ("user", "assistant", "tool")},
        "messages": [],
        "role_content_sep": "",
        "stop_str": [],
        "stop_token_ids": list(generation["eos_ids"]),
        "function_string": "",
        "use_function_calling": False,
        "strip_reasoning_in_history": False,
    }
    if template is None:
        fields |= {"system_template": SYSTEM, "system_message": "", "role_empty_sep": "", "seps": ["", ""]}
        fields["roles"] = dict.fromkeys(("user", "assistant", "tool"), "")
        if generation["add_bos"]:
            fields["system_prefix_token_ids"] = [generation["bos_id"]]
        return Conversation(fields, ("the model has no chat template: MLC joins messages as they are",))
    parts, notes = _parts(template)
    found = Conversation({**fields, **parts}, tuple(notes))
    _prove(found, template)
    first = str(generation["tokens"].get("bos_token", ""))
    if generation["add_bos"] and not (first and found.prompt(_talk(_WORDS[:1])).startswith(first)):
        found = Conversation({**found.fields, "system_prefix_token_ids": [generation["bos_id"]]}, found.notes)
    return found


def _talk(words: Sequence[str], system: str | None = None) -> list[Message]:
    """Return a conversation of ``words``, said in turn by the user and the assistant."""
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]


def _parts(template: ChatTemplate) -> tuple[dict[str, Any], list[str]]:
    """Read the fields off a few prompts; ``_prove`` tells whether they say all."""
    first, answer, second, system = _WORDS[:4]
    notes = []
    plain = _cut(template.render(_talk([first, answer, second])), (first, answer, second))
    before, between, after, opening = plain
    # A role that began within BOS would give equal text, in pieces that nobody could read.
    user = _ending(before.removeprefix(str(template.tokens.get("bos_token", ""))), after)
    start, default = before.removesuffix(user), ""
    system_template = start
    try:
        asked = template.render(_talk([first, answer, second], system))
        head, tail = _cut(asked, (system, first, answer, second))[:2]
    except ArkError:
        notes.append("the chat template takes no system message: MLC leaves one out")
    else:
        user = _ending(user, tail)
        tail, start = tail.removesuffix(user), before.removesuffix(user)
        system_template = head + SYSTEM + tail
        if start.startswith(head) and start.endswith(tail) and len(start) > len(head) + len(tail):
            default = start[len(head) : len(start) - len(tail)]
        elif start != head + tail:
            default = _DEFAULT
            notes.append(f"MLC always writes a system message; where the app gives none it is {_DEFAULT!r}")
    shared = between.removeprefix(opening) if between.startswith(opening) else ""  # before any content
    if not user.endswith(shared) or not (shared or opening.startswith(between)):
        raise _refusal("it opens an answer otherwise than it writes answers that were given")
    user, between = user.removesuffix(shared), between.removesuffix(shared)
    assistant = user.replace("user", "assistant")
    if not user or not between.endswith(assistant):
        assistant = between
    if "strftime_now" in template.source:
        notes.append("the chat template writes the date: MLC writes that of the build")
    if template.switchable:
        notes.append("MLC has no switch for thinking: prompts are those of the template's own default")
    parts: dict[str, Any] = {
        "system_template": system_template,
        "system_message": default,
        "roles": {"user": user, "assistant": assistant, "tool": user.replace("user", "tool")},
        "seps": [between.removesuffix(assistant), after.removesuffix(user + shared)],
        "role_content_sep": shared,
        "role_empty_sep": opening.removeprefix(between),
    }
    thought = f"<think>\nhm\n</think>\n\n{answer}"
    parts["strip_reasoning_in_history"] = template.render(_talk([first, thought, second])) == template.render(
        _talk([first, answer, second])
    )
    return parts, notes


def _ending(one: str, other: str) -> str:
    """Return the longest text that both end with."""
    size = next((i for i, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), None)
    return one[-min(len(one), len(other)) :] if size is None and one and other else one[len(one) - (size or 0) :]


def _cut(text: str, words: Sequence[str]) -> list[str]:
    """Return what stands before, between and after ``words``, each of which is to occur once and in order."""
    pieces = []
    for word in words:
        if text.count(word) != 1:
            raise _refusal("it does not write each message once, in order")
        piece, text = text.split(word)
        pieces.append(piece)
    return [*pieces, text]


def _prove(found: Conversation, template: ChatTemplate) -> None:
    """Compare MLC's prompts with the template's, over conversations that differ in length and in what is said."""
    system = found.fields["system_message"] or None
    systems = [system, _WORDS[3], _LINES] if SYSTEM in found.fields["system_template"] else [None]
    for words in (_WORDS[:1], [_LINES], _WORDS[:3], (_WORDS[0], _LINES, _WORDS[2]), _WORDS[:5], _WORDS[:7]):
        for said in systems:
            messages = _talk(words, said)
            if found.prompt(messages) != template.render(messages):
                raise _refusal(f"a conversation of {len(messages)} messages comes out otherwise")


def _refusal(reason: str) -> UnsupportedError:
    return UnsupportedError(
        "MLC's conversation template cannot express this model's chat template",
        facts={"reason": reason},
        hint="build for android or iphone, whose artifacts carry the template itself, or simplify the template",
        code="ARK-E336",
    )


def read(path: Callable[[str], Path], name: str) -> tuple[Conversation, dict[str, Any]]:
    """Return the conversation template of an artifact in the making, and what its generation.json holds."""
    generation = json.loads(path("generation.json").read_text(encoding="utf-8"))
    file = path("template.jinja")
    source = file.read_text(encoding="utf-8") if file.exists() else None
    template = None if source is None else ChatTemplate(source, generation["tokens"])
    return express(name, template, generation), generation
