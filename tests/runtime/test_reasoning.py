"""Thinking: shown apart from the answer, turned on and off by option or by word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkinfer.errors import UserError
from arkinfer.runtime.reasoning import ReasoningSplitter, switch, with_switch, without_switches
from tests.runtime.scripted import TEMPLATE, engine_that_says, user


def split(parts: list[str], inside: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter("<think>", "</think>", inside)
    found = [pair for part in parts for pair in splitter.push(part)] + splitter.flush()
    assert all(text for _, text in found)
    texts = {kind: "".join(text for one, text in found if one == kind) for kind in ("reasoning", "text")}
    return texts["reasoning"], texts["text"]


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "answer"),
    [
        ("<think>\nHm, 2+2.\n</think>\n\nFour.", False, "Hm, 2+2.", "Four."),
        ("<think></think>Four.", False, "", "Four."),
        ("<think>\n\n</think>\n\nFour.", False, "", "Four."),
        ("Four.", False, "", "Four."),
        ("\n<think>x</think>y", False, "x", "y"),
        ("Use <think> and </think> tags.", False, "", "Use <think> and </think> tags."),
        ("<think>x</think>A literal <think>tag</think>.", False, "x", "A literal <think>tag</think>."),
        ("<thinking>is not the tag", False, "", "<thinking>is not the tag"),
        ("still going\n</think>\ndone", True, "still going", "done"),
        ("<think>cut off in the mid", False, "cut off in the mid", ""),
        ("<think>cut off </thi", False, "cut off </thi", ""),
        ("<thi", False, "", "<thi"),
        ("<think>a < b and </b></think>c", False, "a < b and </b>", "c"),
        ("  indented", False, "", "  indented"),
    ],
)
def test_the_block_is_separated_however_it_is_cut(text: str, inside: bool, reasoning: str, answer: str) -> None:
    for size in (1, 2, 3, 5, 7, 100):
        parts = [text[start : start + size] for start in range(0, len(text), size)]
        assert split(parts, inside) == (reasoning, answer)


@given(st.lists(st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", "a", " ", "\n", "<"]), max_size=12))
def test_any_cut_gives_the_same(parts: list[str]) -> None:
    text = "".join(parts)
    assert split(parts) == split([text]) == split(list(text))


def test_a_thinking_model_streams_reasoning_and_answer_apart() -> None:
    engine = engine_that_says("<think>\nLet me see.\n</think>\n\nIt is 4.")
    kinds = [(piece.kind, piece.text) for piece in engine.stream(user("2+2?"))]
    assert "".join(text for kind, text in kinds if kind == "reasoning") == "Let me see."
    assert "".join(text for kind, text in kinds if kind == "text") == "It is 4."
    result = engine.generate(user("2+2?"))
    assert (result.reasoning, result.text) == ("Let me see.", "It is 4.")


def test_a_stop_string_in_the_reasoning_does_not_stop() -> None:
    result = engine_that_says("<think>a. b.</think>c. d.").generate(user("?"), stop=".")
    assert (result.reasoning, result.text, result.finish_reason) == ("a. b.", "c", "stop")


def test_text_prompts_are_not_split() -> None:
    assert engine_that_says("<think>x</think>y").generate("go:").text == "<think>x</think>y"


def seen(question: str, thinking: bool | None = None, template: str = TEMPLATE) -> str:
    """The prompt that the model gets for ``question``."""
    engine = engine_that_says("-", template=template)
    session = engine.session()
    session.generate(user(question), thinking=thinking, max_tokens=1)
    return engine.tokenizer.decode(session.tokens, keep=engine.tokenizer.special_ids)


def test_thinking_is_switched_off_by_option_or_by_word() -> None:
    plain, off = "<|user|>Why?<|assistant|>", "<|user|>Why?<|assistant|><think></think>"
    assert seen("Why?") == seen("Why?", True) == seen("Why? /think") == plain
    assert seen("Why?", False) == seen("Why? /no_think") == off
    assert seen("Why? /no_think", True) == plain  # the option outranks the word
    assert seen("Why? /think", False) == off


def test_a_template_without_a_switch_leaves_the_word_to_the_model() -> None:
    bare = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert seen("Why? /no_think", None, bare) == seen("Why?", False, bare) == "Why? /no_think"
    assert seen("Why? /no_think", True, bare) == "Why? /think"
    assert seen("Why?", None, bare) == "Why?"


def test_a_template_that_opens_the_block_itself() -> None:
    engine = engine_that_says("<think>\nso</think>yes", template=TEMPLATE + "<think>{{ '\\n' }}")
    result = engine.generate(user("?"))
    assert (result.reasoning, result.text) == ("so", "yes")


@pytest.mark.parametrize(
    ("content", "expected", "body"),
    [
        ("x /think", True, "x"),
        ("x\n/no_think ", False, "x"),
        ("/no_think", False, ""),
        ("x ", None, "x "),
        ("do/think", None, "do/think"),
        ("", None, ""),
    ],
)
def test_switch_words(content: str, expected: bool | None, body: str) -> None:
    assert switch(user(content)) is expected
    assert without_switches(user(content)) == user(body)


def test_only_the_last_user_message_counts() -> None:
    messages = [*user("a /no_think"), {"role": "assistant", "content": "b /think"}, *user("c")]
    assert switch(messages) is None
    assert [message["content"] for message in without_switches(messages)] == ["a", "b /think", "c"]
    assert [message["content"] for message in with_switch(messages, "/think")] == [
        "a /no_think",
        "b /think",
        "c /think",
    ]
    assert messages[-1]["content"] == "c"


def test_a_switch_in_an_earlier_turn_does_not_cost_the_context() -> None:
    engine = engine_that_says("yes")
    session = engine.session()
    session.chat("A question of some length? /think")
    assert session.chat("And?").usage.cached_tokens >= len("A question of some length?")


def test_a_model_without_thinking_says_so() -> None:
    engine = engine_that_says("x", thinking=False)
    with pytest.raises(UserError, match="no thinking mode"):
        engine.generate(user("?"), thinking=True)
    assert engine.generate(user("?"), thinking=False).text == "x"
    with pytest.raises(UserError, match="needs messages"):
        engine.generate("?", thinking=False)
