"""Vocabularies in GGUF metadata against the tokenizers that they came from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from arkinfer.checkpoint.vocabulary import from_gguf
from arkinfer.errors import UserError
from tests.checkpoint.test_sentencepiece import LINES, TEXTS, mixtures, train

FILE = Path("model.gguf")
CORPUS = [*TEXTS, *mixtures(200), "it's IT'S 1234567 e\u0301 \u212b", "a\u3000b\n\n  c\t\t", "don't!!  ...\r\n\r\nx"]


def pattern_of_llama3() -> str:
    """Return the pattern that transformers' own converter gives tiktoken vocabularies by default."""
    import inspect

    pattern: str = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    return pattern


def trained(pre: str) -> Tokenizer:
    """Return a byte-level tokenizer that splits as the family of that name does, by transformers' definition."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "gpt-2")
    tokenizer.pre_tokenizer = level
    if pre == "llama-bpe":
        split = pre_tokenizers.Split(Regex(pattern_of_llama3()), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    elif pre == "qwen2":
        backend = Qwen2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer
        tokenizer.pre_tokenizer, tokenizer.normalizer = backend.pre_tokenizer, normalizers.NFC()
        assert str(backend.normalizer) == str(tokenizer.normalizer)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def byte_level(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [text for text, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3 if index < 2 else 1 for index in range(len(tokens))], np.int32),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]], "tokenizer.ggml.bos_token_id": 0,
    }  # fmt: skip


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level(pre: str) -> None:
    theirs = trained(pre)
    ours = Tokenizer.from_str(from_gguf(byte_level(theirs, pre), FILE).decode())
    for text in [*CORPUS, "<|begin|>hello<|end|>"]:
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(found) == theirs.decode(found), repr(text)
    assert (ours.encode("a").ids[0] == 0) == (pre == "llama-bpe"), "BOS where llama.cpp puts it by default"


def pieces(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    ids = range(model.vocab_size())
    kinds = [
        2 if model.is_unknown(index) else 3 if model.is_control(index) else 6 if model.is_byte(index) else 1
        for index in ids
    ]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in ids],
        "tokenizer.ggml.scores": np.array([model.get_score(index) for index in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32), "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=train("bpe", add_dummy_prefix=prefix))
    metadata = {**pieces(theirs), "tokenizer.ggml.add_space_prefix": prefix}
    ours = Tokenizer.from_str(from_gguf(metadata, FILE).decode())
    for text in [*TEXTS, *mixtures(200)]:
        found = ours.encode(text, add_special_tokens=False).ids
        assert found == theirs.encode(text), repr(text)
        assert ours.decode(found) == theirs.decode(found), repr(text)
    assert ours.encode("the").ids[0] == 1


def test_user_defined_tokens_are_text_and_control_tokens_are_not() -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=train("bpe"))
    metadata = pieces(theirs)
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["<|im_end|>", "<tool>"]
    metadata["tokenizer.ggml.scores"] = np.append(metadata["tokenizer.ggml.scores"], [-1000, -1000])
    metadata["tokenizer.ggml.token_type"] = np.append(metadata["tokenizer.ggml.token_type"], [3, 4])
    ours = Tokenizer.from_str(from_gguf(metadata, FILE).decode())
    found = ours.encode("the<tool><|im_end|>", add_special_tokens=False).ids
    assert found == [*theirs.encode("the"), size + 1, size]
    assert ours.decode(found) == "the<tool>"


CHANGES: dict[str, dict[str, Any]] = {
    "unknown kind": {"tokenizer.ggml.model": "bert"},
    "kind a list": {"tokenizer.ggml.model": ["gpt2"]},
    "unknown rules": {"tokenizer.ggml.pre": "magic"},
    "rules a list": {"tokenizer.ggml.pre": ["gpt-2"]},
    "no tokens": {"tokenizer.ggml.tokens": None},
    "tokens are numbers": {"tokenizer.ggml.tokens": np.zeros(3)},
    "types too few": {"tokenizer.ggml.token_type": np.zeros(3, np.int32)},
    "types are fractions": {"tokenizer.ggml.token_type": np.ones(600, np.float32)},
    "no merges": {"tokenizer.ggml.merges": None},
    "a merge of three": {"tokenizer.ggml.merges": ["a b c"]},
    "a merge of unknown tokens": {"tokenizer.ggml.merges": ["qqqq zzzz"]},
}


@pytest.mark.parametrize("case", CHANGES)
def test_refused(case: str) -> None:
    metadata = {**byte_level(trained("gpt-2"), "gpt-2"), **CHANGES[case]}
    with pytest.raises(UserError) as caught:
        from_gguf(metadata, FILE)
    assert (caught.value.code, "model.gguf" in caught.value.message) == ("ARK-E167", True)
    assert "tokenizer.json" in caught.value.hint


def test_scores_that_are_no_numbers() -> None:
    metadata = pieces(sentencepiece.SentencePieceProcessor(model_proto=train("bpe")))
    metadata["tokenizer.ggml.scores"] = metadata["tokenizer.ggml.scores"] * np.float32("nan")
    with pytest.raises(UserError) as caught:
        from_gguf(metadata, FILE)
    assert "scores" in str(caught.value.facts)


def test_damaged_tokens_give_one_error_or_a_tokenizer() -> None:
    source, metadata = random.Random(4), byte_level(trained("gpt-2"), "gpt-2")
    for _ in range(100):
        changed = dict(metadata)
        name = source.choice(["tokenizer.ggml.tokens", "tokenizer.ggml.merges"])
        values = list(changed[name])
        values[source.randrange(len(values))] = source.choice(["", " ", "a", "<0x-1>", "\x00", "Ġ Ġ", "a" * 5000])
        changed[name] = values
        try:
            data = from_gguf(changed, FILE)
        except UserError:
            continue
        Tokenizer.from_str(data.decode())
