"""Text as it streams: never half a character, never a lost space, the same text in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from arkinfer.errors import ArtifactError
from arkinfer.runtime.tokenizer import Tokenizer
from tests.runtime.scripted import byte_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Hello,  world!  \n\tIndented",
    "你好,世界。敏捷的狐狸",
    "naïve café",
] * 3
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def sentencepiece_like(strip: bool) -> tokenizers.Tokenizer:
    """As Llama 2 and MiniCPM ship it: words with a leading mark, byte tokens for what the vocabulary lacks."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *BYTES,
        "▁",
        "▁the",
        "▁fox",
        "fox",
        "▁你好",
        "你好",
        "世",
        "界",
        "▁▁",
        "!",
        "x",
        "▁x",
    ]
    letters = [chr(code) for code in range(33, 127)]
    vocab = {word: index for index, word in enumerate(dict.fromkeys([*words, *letters]))}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


def trained_byte_level() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def metaspace() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(
        models.Unigram(
            [("<unk>", 0.0), ("▁", -1.0), *((chr(code), -2.0) for code in range(97, 123)), ("▁fox", -0.5)], 0
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return inner


INNER = {
    "bytes": byte_tokenizer(),
    "byte-level": trained_byte_level(),
    "sentencepiece": sentencepiece_like(True),
    "sentencepiece-nostrip": sentencepiece_like(False),
    "metaspace": metaspace(),
}
TEXTS = [
    "",
    "hello",
    " leading",
    "two  spaces ",
    "北京欢迎你",
    "🦊🦊 fox 👨‍👩‍👧",
    "naïve\n\ncafé",
    "the fox",
    "ends with é",
    "a\ufffdb\ufffd",
]


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(index) for index in ids), stream.flush()]


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(name: str, text: str) -> None:
    tokenizer = Tokenizer(INNER[name])
    ids = tokenizer.encode(text)
    whole = INNER[name].decode(ids, skip_special_tokens=True)
    assert "".join(pieces(tokenizer, ids)) == whole == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["bytes", "byte-level", "metaspace"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_stream_to_what_they_decode_to(name: str, data: st.DataObject) -> None:
    """Ids as a model may really produce them, ill-formed UTF-8 included."""
    tokenizer = Tokenizer(INNER[name])
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(pieces(tokenizer, ids)) == INNER[name].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece-nostrip", "byte-level"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_streams_to_what_it_decodes_to(name: str, text: str) -> None:
    tokenizer = Tokenizer(INNER[name])
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids)) == INNER[name].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_no_piece_shows_half_a_character(name: str) -> None:
    tokenizer = Tokenizer(INNER[name])
    ids = tokenizer.encode("狐狸🦊 jumps")
    shown = pieces(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in shown)
    assert len([piece for piece in shown if piece]) >= 3  # it does stream


def test_ill_formed_bytes_do_not_hold_up_the_text() -> None:
    inner = INNER["sentencepiece"]
    tokenizer = Tokenizer(inner)
    bad, fox = inner.token_to_id("<0xFF>"), inner.token_to_id("▁fox")
    shown = pieces(tokenizer, [fox, bad, fox, *[bad] * 50, fox])
    assert "".join(shown) == "fox\ufffd fox" + "\ufffd" * 50 + " fox"
    assert any(shown[3:40])


def test_special_tokens_are_silent_unless_kept() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    ids = [1, *tokenizer.encode("hi"), 0]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, keep={0}) == "hi<|end|>"


def test_ids_that_the_tokenizer_lacks_decode_to_nothing() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size + 5, *tokenizer.encode("c")]) == "abc"


@pytest.mark.parametrize("content", [None, "", "{}", "not json"])
def test_a_broken_tokenizer_file_is_an_artifact_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtifactError, match="tokenizer"):
        Tokenizer.from_file(path)
