"""A tokenizer.json made from a vocabulary of SentencePiece, or of a GGUF file. Nothing of the checkpoint is run.

The forms are those that transformers' converters write (convert_slow_tokenizer.py): the same library reads them. What
cannot be converted with equal results is refused.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arkinfer.errors import UserError

# The type of a piece, as sentencepiece_model.proto numbers them and GGUF does too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
MAX_PIECES = 1 << 20
MAX_LETTERS = 1 << 24  # of all pieces together: bounds the search for merges
MAX_PIECE = 1 << 10
_NEVER = -1e6

# How byte-level vocabularies split text before merging, by GGUF's tokenizer.ggml.pre.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS: Mapping[str, str | None] = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
    "gpt-2": None,  # the pattern that the library's ByteLevel itself has
}


@dataclass(frozen=True)
class Piece:
    """One entry of a vocabulary; its index is its token id."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Added:
    """A token that is found in text before anything else; ``special`` ones are no part of the answer's text."""

    index: int
    text: str
    special: bool
    strip_left: bool = False
    strip_right: bool = False
    single_word: bool = False
    normalized: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.index, "content": self.text, "single_word": self.single_word, "lstrip": self.strip_left,
            "rstrip": self.strip_right, "normalized": self.normalized, "special": self.special,
        }  # fmt: skip


@dataclass(frozen=True)
class Spelling:
    """How SentencePiece treats text before it looks for pieces.

    ``prefix``: a space is put in front: "" never, "always" of each stretch of text between added tokens, "first" of the
    whole text. ``charsmap`` is SentencePiece's compiled normalisation.
    """

    prefix: str = "always"
    collapse: bool = False  # runs of spaces become one, those at the ends none
    charsmap: bytes = b""


def refuse(what: str, reason: str) -> UserError:
    return UserError(
        f"{what} cannot be made into a tokenizer.json",
        facts={"reason": reason},
        hint="put the tokenizer.json that the model's author published beside it\n"
        "or in Python: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)",
        code="ARK-E167",
    )


def from_pieces(
    pieces: Sequence[Piece], added: Sequence[Added], spelling: Spelling, unigram: bool, bos: str | None, what: str
) -> bytes:
    """Return the tokenizer.json of a SentencePiece vocabulary, BPE or unigram; ``bos``: the token put first, if any."""
    if not 0 < len(pieces) <= MAX_PIECES:
        raise refuse(what, f"it has {len(pieces)} pieces")
    if max(len(piece.text) for piece in pieces) > MAX_PIECE or sum(len(piece.text) for piece in pieces) > MAX_LETTERS:
        raise refuse(what, "its pieces are too long")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise refuse(what, "two pieces are spelled alike")
    unknown = next((index for index, piece in enumerate(pieces) if piece.kind == UNKNOWN), None)
    if unknown is None:
        raise refuse(what, "it has no piece for unknown text")
    have = sum(piece.kind == BYTE for piece in pieces)
    if have not in (0, 256):
        raise refuse(what, f"it has {have} of 256 bytes")
    found = {item.index: item for item in added}
    for index, piece in enumerate(pieces):
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED) and index not in found and piece.text:
            text = piece.text.replace(SPACE, " ") if piece.kind == USER_DEFINED else piece.text
            found[index] = Added(index, text, piece.kind != USER_DEFINED)
    model = _unigram(pieces, unknown, found, what) if unigram else _bpe(pieces, unknown, found)
    model["byte_fallback"] = have == 256
    prepend = [{"type": "Prepend", "prepend": SPACE}] if spelling.prefix == "always" else []
    clean: list[dict[str, Any]] = []
    if spelling.charsmap:
        clean.append(
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spelling.charsmap).decode("ascii")}
        )
    if spelling.collapse:
        clean += [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    first = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    spaces = [] if spelling.prefix == "first" else [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    normalizers = [*clean, *prepend, *spaces]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spelling.prefix else []
    return _document(
        model,
        sorted(found.values(), key=lambda item: item.index),
        {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        first if spelling.prefix == "first" else None,
        {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        bos,
    )


def _bpe(pieces: Sequence[Piece], unknown: int, added: Mapping[int, Added]) -> dict[str, Any]:
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    plain = {piece.text: index for index, piece in enumerate(pieces) if piece.kind == NORMAL}
    merges = []
    for text, index in plain.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in plain and right in plain:
                merges.append((-pieces[index].score, len(left), len(right), left, right))
    merges.sort(key=lambda item: (item[0], -item[1], -item[2]))
    for index, item in added.items():
        vocabulary.setdefault(item.text, index)
    return {
        "type": "BPE", "dropout": None, "unk_token": pieces[unknown].text, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "ignore_merges": False, "vocab": vocabulary,
        "merges": [[left, right] for *_, left, right in merges],
    }  # fmt: skip


def _unigram(pieces: Sequence[Piece], unknown: int, added: Mapping[int, Added], what: str) -> dict[str, Any]:
    beyond = sorted(index for index in added if index >= len(pieces))
    if beyond != list(range(len(pieces), len(pieces) + len(beyond))):
        raise refuse(what, "the ids of its added tokens leave a gap")
    # The library would take "<0x41>" in a text for the byte: such pieces lose against every other way to read it, which
    # there is if its letters are pieces.
    plain = {piece.text for piece in pieces if piece.kind == NORMAL}
    if any(piece.kind == BYTE for piece in pieces) and not plain.issuperset("<0x123456789ABCDEF>"):
        raise refuse(what, "the letters of <0x00> are not all pieces, and such text would be taken for a byte")
    scores = [piece.score if piece.kind in (NORMAL, USER_DEFINED) else _NEVER for piece in pieces]
    vocabulary = [[piece.text, score] for piece, score in zip(pieces, scores, strict=True)]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary}


def _document(
    model: dict[str, Any], added: Sequence[Added], normalizer: Any, pre_tokenizer: Any, decoder: Any, bos: str | None
) -> bytes:
    processor = None
    index = next((item.index for item in added if item.text == bos), None)
    if bos is not None and index is not None:
        start = {"SpecialToken": {"id": bos, "type_id": 0}}
        text = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
        processor = {
            "type": "TemplateProcessing", "single": [start, text[0]], "pair": [start, text[0], start, text[1]],
            "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
        }  # fmt: skip
    values = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [item.to_json() for item in added],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": processor, "decoder": decoder,
        "model": model,
    }  # fmt: skip
    return json.dumps(values, ensure_ascii=False).encode("utf-8")


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Tell whether text starts with BOS where a GGUF file does not say, as llama.cpp decides."""
    return metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"


def from_gguf(metadata: Mapping[str, Any], file: Path) -> bytes:
    """Return the tokenizer.json of the vocabulary in a GGUF file's ``metadata``."""
    what = f"the vocabulary of {file.name}"
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise refuse(what, "it has no tokens")
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens) or kinds.dtype.kind not in "iu":
        raise refuse(what, "its token types do not fit its tokens")
    if len(tokens) > MAX_PIECES:
        raise refuse(what, f"it has {len(tokens)} tokens")
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    wanted = stated if isinstance(stated, bool) else adds_bos(metadata)
    index = metadata.get("tokenizer.ggml.bos_token_id")
    bos = tokens[index] if wanted and isinstance(index, int) and 0 <= index < len(tokens) else None
    if kind == "llama":
        scores = metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, np.ndarray) or len(scores) != len(tokens) or not bool(np.isfinite(scores).all()):
            raise refuse(what, "its scores do not fit its tokens")
        values = zip(tokens, scores.tolist(), kinds.tolist(), strict=True)
        pieces = [Piece(text, float(score), int(sort)) for text, score, sort in values]
        prefix = "" if metadata.get("tokenizer.ggml.add_space_prefix") is False else "always"
        collapse = metadata.get("tokenizer.ggml.remove_extra_whitespaces") is True
        return from_pieces(pieces, (), Spelling(prefix, collapse), False, bos, what)
    if kind == "gpt2":
        return _byte_level(metadata, tokens, kinds.tolist(), bos, what)
    raise refuse(what, f"its kind is {kind!r}; llama and gpt2 are known"[:200])


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], bos: str | None, what: str
) -> bytes:
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in PATTERNS:
        raise refuse(what, f"text is split by the rules {name!r}; known: {', '.join(PATTERNS)}"[:200])
    if len(set(tokens)) != len(tokens):
        raise refuse(what, "two tokens are spelled alike")
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges):
        raise refuse(what, "its merges are not pairs of tokens")
    pairs = [merge.split(" ") for merge in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if not all(left in vocabulary and right in vocabulary and left + right in vocabulary for left, right in pairs):
        raise refuse(what, "its merges name tokens that it does not have")
    added = [
        Added(index, token, kinds[index] != USER_DEFINED)
        for index, token in enumerate(tokens)
        if kinds[index] in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": name == "llama-bpe",
        "vocab": vocabulary, "merges": pairs,
    }  # fmt: skip
    pattern = PATTERNS[name]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _document(
        model,
        added,
        {"type": "NFC"} if name == "qwen2" else None,
        level if pattern is None else {"type": "Sequence", "pretokenizers": [split, level]},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        bos,
    )
