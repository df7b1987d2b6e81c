"""Chat templates: the same bytes as transformers renders, and nothing that a hostile template could use."""

from __future__ import annotations

import datetime
import os
from typing import Any

import pytest

from arkinfer.errors import UserError
from arkinfer.runtime import template as templates
from arkinfer.runtime.template import ChatTemplate, render

TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}

CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{% endif %}
"""

THINKING = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
    {{- "# Tools\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if loop.index0 > ns.last and thought %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{ '<|im_end|>\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none and tools %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception("one tool call at a time") }}{% endif %}
        {{- '{"name": ' + (message.tool_calls[0].function.name | tojson) + '}' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

INSTRUCT = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{{ ' ' + message['content'] + eos_token }}
{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}
{% endif %}
{% endfor %}
"""

# ruff: noqa: E501
PARTS = """{% macro show(content) %}
{% if content is string %}{{ content }}{% else %}
{% for part in content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<{{ part['type'] | upper }}>{% endif %}{% endfor %}
{% endif %}
{% endmacro %}
{% for message in messages %}
{%- if loop.index > 9 %}{% break %}{% endif %}
{%- if message.role == 'developer' %}{% continue %}{% endif %}
<{{ message.role }}{% for key, value in message.items() if key not in ('role', 'content') %} {{ key }}={{ value }}{% endfor %}>
{{ show(message.content) }}
{% endfor %}
{{ (messages | selectattr('role', 'equalto', 'user') | list | length) }} {{ messages | map(attribute='role') | join(', ') }}
{{ ['b', 'a'] | sort | first }} {{ 'x,y'.split(',')[-1] }} {{ "Title case".title() }} {{ 7 // 2 }} {{ 2 ** 3 }} {{ none is none }} {{ true }}
"""

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather <now> & "soon" in it\'s place, 天气',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string"},
                "days": {"type": "integer", "default": 1},
                "a": {"minimum": 0.5},
            },
            "required": ["place"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "北京 <x>", "days": 2}}}

USER = {"role": "user", "content": 'What\'s 2 < 3 & "so"? 你好 🦊'}
SYSTEM = {"role": "system", "content": "  Be brief.\n"}
ANSWER = {"role": "assistant", "content": "Yes."}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
KEPT = {"role": "assistant", "content": "Yes.", "reasoning_content": "hm\n"}

TALKS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": " and again \n"}],
    "thoughts": [USER, THOUGHT, USER, KEPT, USER],
    "open-thought": [USER, KEPT],
    "tools": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        USER,
    ],
}


def transformers_renders(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **TOKENS)
    return str(tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options))


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize(
    ("name", "tools"),
    [("CHATML", None), ("THINKING", None), ("THINKING", [TOOL]), ("HEADERS", None), ("HEADERS", [TOOL])],
)
def test_the_same_bytes_as_transformers(
    name: str, tools: list[dict[str, Any]] | None, talk: str, thinking: bool | None
) -> None:
    source, messages = globals()[name], TALKS[talk]
    options = {} if thinking is None else {"enable_thinking": thinking}
    for open_answer in (True, False):
        expected = transformers_renders(source, messages, tools=tools, add_generation_prompt=open_answer, **options)
        actual = ChatTemplate(source, TOKENS).render(messages, thinking=thinking, tools=tools, open_answer=open_answer)
        assert actual == expected


def test_alternating_roles_and_their_refusal() -> None:
    messages = TALKS["turns"]
    assert ChatTemplate(INSTRUCT, TOKENS).render(messages) == transformers_renders(INSTRUCT, messages)
    with pytest.raises(UserError, match="refuses these messages: Conversation roles must alternate"):
        ChatTemplate(INSTRUCT, TOKENS).render([USER, USER])


def test_content_parts_macros_and_loop_control() -> None:
    messages = [
        {"role": "developer", "content": "hidden"},
        {"role": "user", "content": [{"type": "text", "text": "look: "}, {"type": "image"}], "name": "ann"},
        {"role": "assistant", "content": "I see."},
    ]
    assert ChatTemplate(PARTS, TOKENS).render(messages) == transformers_renders(PARTS, messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ value | tojson }}",
        "{{ value }}",
        "{{ value | tojson(indent=2) }}",
        "{{ value | tojson(ensure_ascii=true, sort_keys=true) }}",
        "{{ value | tojson(separators=(',', ':')) }}",
    ],
)
@pytest.mark.parametrize(
    "value", [{"b": "<&'\">", "a": [1, 2.5, True, None, {}]}, "天气 🦊 \u2028", [], 10**18, 3.0, -0.0, 1e22, {"n": 3.0}]
)
def test_json_is_pythons(source: str, value: Any) -> None:
    assert render(source, {"value": value}) == transformers_renders(source, [USER], value=value)


def test_the_date_can_be_asked_for() -> None:
    before = datetime.date.today()
    shown = render("{{ strftime_now('%Y-%m-%d') }}", {})
    assert shown in {before.isoformat(), datetime.date.today().isoformat()}


def test_a_template_knows_whether_it_can_switch_thinking() -> None:
    assert ChatTemplate(THINKING, TOKENS).switchable
    assert not ChatTemplate(CHATML, TOKENS).switchable


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ range(10**9) | list }}",
        "{{ 'a' * 10**9 }}",
        "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages.append }}{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ 1 +",
        "{% for %}",
    ],
)
def test_a_hostile_or_broken_template_fails_cleanly(source: str) -> None:
    try:
        text = render(source, {"messages": []})
    except UserError as error:
        assert error.code in ("ARK-E232", "ARK-E233")
        assert os.sep + "home" not in error.render()
    else:
        assert "class" not in text and "module" not in text


def test_too_much_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "OUTPUT_LIMIT", 100)
    with pytest.raises(UserError, match="too much text"):
        render("{{ 'a' * 101 }}", {})


def test_a_long_conversation_is_within_the_fuel() -> None:
    messages = [{"role": role, "content": "word " * 20} for _ in range(1000) for role in ("user", "assistant")]
    assert len(ChatTemplate(THINKING, TOKENS).render(messages)) > 200_000
