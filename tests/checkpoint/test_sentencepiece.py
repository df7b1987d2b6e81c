"""Vocabularies that exist as `tokenizer.model` only: the converted tokenizer against sentencepiece itself."""

from __future__ import annotations

import io
import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from arkinfer.checkpoint import open_checkpoint
from arkinfer.checkpoint.sentencepiece import convert
from arkinfer.errors import UserError
from arkinfer.runtime.tokenizer import Tokenizer as Runtime
from tests.checkpoints import CONFIGS, write_checkpoint

LINES = [
    "The ferry left the harbour when the light on the water was still more grey than gold.",
    "def forward(self, x):\n    return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))",
    "今天天气很好，我们去公园散步。模型在端侧设备上运行得很快。",
    "for (int i = 0; i < n; ++i) { sum += values[i]; }  // a loop",
    "Il était une fois, naïve façade, übergroß 12345 67890",
] * 20
TEXTS = [
    "The ferry left the harbour.", " leading", "  two  spaces   three", "trailing  ", "", " ", "   ",
    "今天天气很好。端侧模型", "混合 English 和 中文", "🙂🚀 emoji 👩‍👩‍👧",
    "def f(x):\n\treturn x  # tab\n\n\n", "a\r\nb", "\u2581odd\u2581",
    "1234567890", "über naïve ﬁ ½ Ⅳ", "\x00\x7f", "ﷺ", "fünf  ", "<0x41>", "x" * 50,
]  # fmt: skip


def train(kind: str, rules: str = "identity", extra: bool = False, fallback: bool = True, **more: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=520, model_type=kind, byte_fallback=fallback,
        normalization_rule_name=rules, remove_extra_whitespaces=extra, character_coverage=0.98, minloglevel=2,
        hard_vocab_limit=False, **{"required_chars": "<0x123456789ABCDEF>", **more},
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def bpe() -> bytes:
    return train("bpe")


def beside(**files: dict[str, Any]) -> Any:
    return lambda name: files.get(name.removesuffix(".json"), {})


def pair(model: bytes, **files: dict[str, Any]) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    ours = Tokenizer.from_str(convert(model, beside(**files)).decode())
    return ours, sentencepiece.SentencePieceProcessor(model_proto=model)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def mixtures(count: int) -> list[str]:
    """Return texts of random fragments, seeded."""
    source, pieces = random.Random(5), [*TEXTS, *LINES[:5], "the", "light", "  ", "\n", "é", "运行", "_", "0x", "🙂"]
    return ["".join(source.choices(pieces, k=source.randint(1, 6))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("dummy", [True, False])
def test_ids_and_text_are_sentencepieces(kind: str, dummy: bool) -> None:
    ours, theirs = pair(train(kind, add_dummy_prefix=dummy))
    for text in [*TEXTS, *mixtures(300)]:
        if "\x00" in text and kind == "unigram":
            continue  # sentencepiece itself ends the text there
        assert ids(ours, text) == theirs.encode(text), repr(text)
        found = theirs.encode(text)
        assert ours.decode(found, skip_special_tokens=True) == theirs.decode(found), repr(text)


def test_unigram_that_would_read_text_as_bytes() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.model") as caught:
        pair(train("unigram", required_chars=""))
    assert "<0x00>" in str(caught.value.facts)


def test_normalisation_and_collapsed_spaces() -> None:
    ours, theirs = pair(train("unigram", "nmt_nfkc", True))
    for text in ["  two  spaces ", "ﬁ ½ Ⅳ ﷺ", "ｆｕｌｌ　ｗｉｄｔｈ", *LINES[:5]]:
        assert ids(ours, text) == theirs.encode(text), repr(text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_without_bytes_unknown_text_is_one_piece(kind: str) -> None:
    ours, theirs = pair(train(kind, fallback=False))
    for text in ["🙂🚀 a", "x 龘龘 y", *LINES[:5]]:
        assert ids(ours, text) == theirs.encode(text), repr(text)


@pytest.fixture(scope="module")
def both(bpe: bytes) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    return pair(bpe)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\x00\u2581", exclude_categories=["Cs"]), max_size=40))
def test_any_text(both: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], text: str) -> None:
    ours, theirs = both
    assert ids(ours, text) == theirs.encode(text)


def test_added_tokens_as_transformers_writes_them(bpe: bytes) -> None:
    size = sentencepiece.SentencePieceProcessor(model_proto=bpe).vocab_size()
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    decoder = {
        str(size + index): {"content": text, "special": special, **flags}
        for index, (text, special) in enumerate([("<|im_end|>", True), ("<|im_start|>", True), ("<tool>", False)])
    }
    ours, theirs = pair(bpe, tokenizer_config={"added_tokens_decoder": decoder, "legacy": True})
    text = "<|im_start|>user\nhello<tool><|im_end|>"
    middle = theirs.encode("user\nhello")
    assert ids(ours, text) == [size + 1, *middle, size + 2, size]
    assert ours.decode([size + 1, *middle, size]) == "user\nhello"
    older, _ = pair(
        bpe,
        added_tokens={"<|im_end|>": size, "<|im_start|>": size + 1, "<tool>": size + 2},
        special_tokens_map={"additional_special_tokens": ["<|im_start|>"], "eos_token": {"content": "<|im_end|>"}},
    )
    assert ids(older, text) == ids(ours, text)
    assert older.decode(ids(older, text)) == ours.decode(ids(ours, text))


def test_a_space_behind_added_tokens_only_where_transformers_puts_one(bpe: bytes) -> None:
    legacy, theirs = pair(bpe, tokenizer_config={"legacy": True})
    first, _ = pair(bpe, tokenizer_config={"legacy": False})
    none, _ = pair(bpe, tokenizer_config={"add_prefix_space": False})
    text = "</s>the light"
    assert ids(legacy, text) == [2, *theirs.encode("the light")]
    assert ids(first, text) == ids(none, text) != ids(legacy, text)
    assert ids(first, "the light") == theirs.encode("the light") != ids(none, "the light")


def test_bos(bpe: bytes) -> None:
    assert pair(bpe)[0].encode("the").ids[0] == 1
    assert pair(bpe, tokenizer_config={"add_bos_token": False})[0].encode("the").ids[0] != 1


def test_a_folder_with_tokenizer_model_alone(bpe: bytes, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {**CONFIGS["llama"], "vocab_size": 520})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(bpe)
    data = open_checkpoint(folder).asset("tokenizer.json")
    assert data is not None
    assert data == open_checkpoint(folder).asset("tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(data)
    runtime = Runtime.from_file(tmp_path / "tokenizer.json")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=bpe)
    assert runtime.encode(LINES[2]) == theirs.encode(LINES[2])
    assert runtime.puts_first(1)


def test_transformers_converts_alike(bpe: bytes, tmp_path: Path) -> None:
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    (tmp_path / "tokenizer.model").write_bytes(bpe)
    extracted = SentencePieceExtractor(str(tmp_path / "tokenizer.model")).extract(None)
    model = json.loads(convert(bpe, beside()))["model"]
    assert [tuple(pair) for pair in model["merges"]] == extracted[2]


REFUSED = {
    "empty": b"",
    "a text": b"this is not a protocol buffer at all, is it?",
    "ends early": b"\x0a\xff\xff\xff\x7f",
    "a number without end": b"\xff" * 12,
    "unknown wire type": b"\x0b",
    "piece not UTF-8": b"\x0a\x04\x0a\x02\xff\xfe",
    "piece with a score of the wrong type": b"\x0a\x02\x10\x01",
    "score that is not a number": b"\x0a\x05\x15\x00\x00\xc0\x7f",
    "piece of an unknown type": b"\x0a\x02\x18\x63",
    "no unknown piece": b"\x0a\x03\x0a\x01a",
    "two alike": b"\x0a\x05\x0a\x01a\x18\x02" * 2,
    "some bytes": b"\x0a\x05\x0a\x01a\x18\x02\x0a\x0a\x0a\x06<0x41>\x18\x06",
    "words": b"\x0a\x05\x0a\x01a\x18\x02\x12\x02\x18\x03",
    "trainer not a message": b"\x10\x01",
    "normalisation a number": b"\x0a\x05\x0a\x01a\x18\x02\x1a\x02\x10\x01",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    with pytest.raises(UserError) as caught:
        convert(REFUSED[case], beside())
    assert caught.value.code == "ARK-E167"
    assert "tokenizer.json" in caught.value.hint


@pytest.mark.parametrize(
    "decoder", [{"x": {"content": "a"}}, {"1": "a"}, {"1": {"content": 3}}, {"600": {"content": "<s>"}}]
)
def test_added_tokens_that_are_malformed(decoder: dict[str, Any], bpe: bytes) -> None:
    with pytest.raises(UserError):
        convert(bpe, beside(tokenizer_config={"added_tokens_decoder": decoder}))


def test_mutations_give_one_error_or_a_tokenizer(bpe: bytes) -> None:
    source = random.Random(3)
    for _ in range(200):
        data = bytearray(bpe[: source.choice([len(bpe), source.randint(0, len(bpe))])])
        for _ in range(source.randint(1, 8)):
            if data:
                data[source.randrange(len(data))] = source.randrange(256)
        with suppress(UserError):
            convert(bytes(data), beside())
