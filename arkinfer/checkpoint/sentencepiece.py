"""A SentencePiece `tokenizer.model` as a tokenizer.json: its protocol buffer is read here, nothing of it is run.

Fields: sentencepiece_model.proto of google/sentencepiece. Added tokens come from tokenizer_config.json, or, as older
transformers wrote them, from added_tokens.json and special_tokens_map.json.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

from arkinfer.checkpoint.vocabulary import MAX_PIECES, Added, Piece, Spelling, from_pieces, refuse
from arkinfer.errors import UserError

WHAT = "tokenizer.model"
_UNIGRAM, _BPE = 1, 2
_MAX_BYTES = 64 << 20
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def convert(model: bytes, json_asset: Callable[[str], dict[str, Any]]) -> bytes:
    """Return the tokenizer.json of a `tokenizer.model`; ``json_asset`` gives the JSON files beside it, {} if absent.

    Raises UserError for what is malformed, or cannot be converted with equal results.
    """
    if len(model) > _MAX_BYTES:
        raise refuse(WHAT, f"it has {len(model)} bytes")
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(model):
        if field == 1:
            pieces.append(_piece(_message(value)))
            if len(pieces) > MAX_PIECES:
                raise refuse(WHAT, f"it has more than {MAX_PIECES} pieces")
        elif field == 2:
            trainer |= dict(_fields(_message(value)))
        elif field == 3:
            normalizer |= dict(_fields(_message(value)))
    kind = trainer.get(3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise refuse(WHAT, f"its model type {kind!r} is neither unigram nor BPE"[:80])
    if trainer.get(24, 0):
        raise refuse(WHAT, "it writes spaces behind words")
    if not normalizer.get(5, 1):
        raise refuse(WHAT, "it does not escape spaces")
    settings = json_asset("tokenizer_config.json")
    charsmap = normalizer.get(2, b"")
    if not isinstance(charsmap, bytes):
        raise refuse(WHAT, "its normalisation is malformed")
    spelling = Spelling(_prefix(bool(normalizer.get(3, 1)), settings), bool(normalizer.get(4, 1)), charsmap)
    added = _added(settings, json_asset, pieces)
    bos = _text(settings.get("bos_token")) or "<s>"
    starts = settings.get("add_bos_token") is not False
    return from_pieces(pieces, added, spelling, kind == _UNIGRAM, bos if starts else None, WHAT)


def _prefix(dummy: bool, settings: dict[str, Any]) -> str:
    """Return where a space is put in front: transformers' ``legacy`` puts it behind added tokens too."""
    stated = settings.get("add_prefix_space")
    if not (dummy if stated is None else stated):
        return ""
    return "first" if settings.get("legacy") is False else "always"


def _added(settings: dict[str, Any], json_asset: Callable[[str], dict[str, Any]], pieces: list[Piece]) -> list[Added]:
    decoder = settings.get("added_tokens_decoder")
    found: dict[int, Added] = {}
    if isinstance(decoder, dict):
        for key, fields in decoder.items():
            text = _text(fields)
            if not str(key).isdecimal() or len(str(key)) > 9 or not text or not isinstance(fields, dict):
                raise refuse("tokenizer_config.json", f"its added token {str(key)[:40]!r} is malformed")
            found[int(key)] = Added(
                int(key), text, bool(fields.get("special")), bool(fields.get("lstrip")), bool(fields.get("rstrip")),
                bool(fields.get("single_word")), bool(fields.get("normalized")),
            )  # fmt: skip
    else:
        names = json_asset("special_tokens_map.json")
        more = names.get("additional_special_tokens")
        special = {_text(names.get(name)) or _text(settings.get(name)) for name in _SPECIAL}
        special |= {_text(item) for item in (more if isinstance(more, list) else [])}
        for text, index in json_asset("added_tokens.json").items():
            if type(index) is not int or not 0 <= index < 1 << 30 or not text:
                raise refuse("added_tokens.json", f"its token {text[:40]!r} is malformed")
            found[index] = Added(index, text, text in special)
    spelled = {piece.text: index for index, piece in enumerate(pieces)}
    for index, item in found.items():
        inside = index < len(pieces)
        if (inside and pieces[index].text != item.text) or (not inside and item.text in spelled):
            raise refuse(WHAT, f"the added token {item.text[:40]!r} contradicts the vocabulary")
    if len({item.text for item in found.values()}) != len(found):
        raise refuse(WHAT, "two added tokens are spelled alike")
    return list(found.values())


def _text(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(1, b""), fields.get(2, 0.0), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, float) or not isinstance(kind, int):
        raise _malformed("a piece has fields of the wrong types")
    if not math.isfinite(score) or not 1 <= kind <= 6:
        raise _malformed(f"a piece has score {score} and type {kind}")
    try:
        return Piece(text.decode("utf-8"), score, kind)
    except UnicodeDecodeError as error:
        raise _malformed("a piece is not UTF-8") from error


def _malformed(reason: str) -> UserError:
    return refuse(WHAT, reason)


def _message(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise _malformed("a field has the wrong type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield (number, value) of a protocol buffer message: varints int, 32 bits float, length-delimited bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _malformed(f"it has the wire type {wire}")
        if size > len(data) - place:
            raise _malformed("it ends in the middle of a field")
        piece = data[place : place + size]
        place += size
        if wire == 2:
            yield number, piece
        else:
            yield number, struct.unpack("<d" if wire == 1 else "<f", piece)[0]


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise _malformed("it ends in the middle of a number")
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise _malformed("a number is too long")
