"""Chat templates as MLC's fields: equal prompts for every conversation, or a refusal that says why."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkinfer import conversation
from arkinfer.artifact import Artifact
from arkinfer.errors import UnsupportedError
from arkinfer.exporters.mlc_config import tokenizer_info
from arkinfer.runtime.template import ChatTemplate

GENERATION = {"eos_ids": [2], "bos_id": 1, "add_bos": True, "tokens": {"bos_token": "<s>"}}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}" + CHATML
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def express(source: str | None) -> conversation.Conversation:
    return conversation.express("test", None if source is None else ChatTemplate(source, TOKENS), GENERATION)


def test_the_packages_prompts_are_the_models(package: Artifact) -> None:
    config = json.loads(package.file("payload/mlc/mlc-chat-config.json").read_text(encoding="utf-8"))
    fields = config["conv_template"]
    assert fields["roles"]["user"] == "<|im_start|>user\n" and fields["seps"] == ["<|im_end|>\n"] * 2
    assert fields["stop_token_ids"] == [1, 3] and fields["strip_reasoning_in_history"]
    template = ChatTemplate(package.file("template.jinja").read_text(encoding="utf-8"), {})
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\nTwo"},
        {"role": "user", "content": "Three"},
    ]
    assert conversation.Conversation(fields, ()).prompt(messages) == template.render(messages)
    notes = package.manifest.provenance["notes"]
    assert any("system message" in note for note in notes) and any("thinking" in note for note in notes)


WORDS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="{}"), min_size=1), min_size=1, max_size=7)


@pytest.mark.parametrize("source", [CHATML, QWEN, LLAMA, INST])
def test_prompts_are_equal(source: str) -> None:
    found, template = express(source), ChatTemplate(source, TOKENS)

    @given(WORDS.filter(lambda words: len(words) % 2), st.none() | st.text("ab \n", min_size=1))
    def compare(words: list[str], system: str | None) -> None:
        takes = system is not None and conversation.SYSTEM in found.fields["system_template"]
        start = [{"role": "system", "content": system}] if takes else []
        messages = start + [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]
        spoken = messages
        if not start and found.fields["system_message"]:
            spoken = [{"role": "system", "content": found.fields["system_message"]}, *messages]
        assert found.prompt(messages) == template.render(spoken)

    compare()


def test_what_a_template_says_by_itself_is_kept() -> None:
    assert express(QWEN).fields["system_message"] == "You are Qwen." and not express(QWEN).notes
    assert any("system message" in note for note in express(CHATML).notes)
    assert express(CHATML).fields["system_prefix_token_ids"] == [1]
    llama = express(LLAMA).fields
    assert llama["system_template"].startswith("<s>") and "system_prefix_token_ids" not in llama  # BOS is not doubled
    bare = express(INST)
    assert bare.fields["roles"] == {"user": "[INST]", "assistant": " [/INST]", "tool": "[INST]"}
    assert bare.fields["role_content_sep"] == " " and conversation.SYSTEM not in bare.fields["system_template"]
    assert any("no system message" in note for note in bare.notes)
    raw = express(None)
    assert raw.prompt([{"role": "user", "content": "as it is"}]) == "as it is" and raw.notes


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages | map(attribute='content') | join(' ') }}", "opens an answer otherwise"),
        ("{{ messages[-1].content }}", "each message once"),
        (CHATML.replace("m.content +", "m.content.strip() +"), "comes out otherwise"),
        (CHATML.replace("m.role +", "m.role + loop.index | string +"), "opens an answer otherwise"),
        (CHATML + "{% if messages | length > 5 %}!{% endif %}", "comes out otherwise"),
    ],
)
def test_what_prefixes_cannot_say_is_refused(source: str, reason: str) -> None:
    if "strip" in source:  # the probes hold no space at their ends, so this one is as good as equal
        source = source.replace("m.content.strip()", "(m.content | replace('  ', ' '))")
    with pytest.raises(UnsupportedError) as caught:
        express(source)
    assert caught.value.code == "ARK-E336" and reason in str(caught.value.facts)
    assert "android" in caught.value.hint


def test_tokenizers_are_told_apart_as_mlc_does() -> None:
    steps = [{"type": "Replace"}, {"type": "ByteFallback"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]}
    assert tokenizer_info({"decoder": {"type": "Sequence", "decoders": steps}, "normalizer": normalizer}) == {
        "token_postproc_method": "byte_fallback",
        "prepend_space_in_encode": True,
        "strip_space_in_decode": True,
    }
    assert tokenizer_info({"decoder": {"type": "ByteLevel"}})["token_postproc_method"] == "byte_level"
    assert tokenizer_info({"decoder": {"type": "WordPiece"}})["token_postproc_method"] == "raw"
