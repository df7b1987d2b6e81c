"""Text to token ids and back, including back one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import tokenizers

from arkinfer.errors import ArtifactError

REPLACEMENT = "\ufffd"
_LONGEST_HOLD = 16  # tokens; the longest character has four bytes, so text held beyond this is not UTF-8 at all


class Tokenizer:
    """A ``tokenizer.json``. Ids that the vocabulary lacks decode to nothing: models pad their vocabularies."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        inner.no_truncation()
        inner.no_padding()
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read ``path``. Raises ArtifactError if it is missing or is not a tokenizer."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(
                "the tokenizer cannot be read", facts={"file": path, "reason": error}, code="ARK-E521"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``. Special tokens written in it are recognised; none is added."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def puts_first(self, index: int) -> bool:
        """Tell whether the tokenizer, left to itself, starts every text with the token ``index``."""
        ids = self._inner.encode("a", add_special_tokens=True).ids
        return bool(ids) and ids[0] == index

    def decode(self, ids: Sequence[int], keep: Collection[int] = ()) -> str:
        """Return the text of ``ids`` without special tokens, except those in ``keep``."""
        stream = self.stream(keep)
        return "".join([*(stream.push(index) for index in ids), stream.flush()])

    def stream(self, keep: Collection[int] = ()) -> Detokenizer:
        """Return a decoder that takes one id at a time."""
        return Detokenizer(
            lambda ids: str(self._inner.decode(ids, skip_special_tokens=False)), self.special_ids - frozenset(keep)
        )

    def token_id(self, text: str) -> int | None:
        """Return the id of the token spelled exactly ``text``, or None."""
        index = self._inner.token_to_id(text)
        return None if index is None else int(index)

    def token(self, index: int | None) -> str | None:
        """Return the spelling of token ``index``, or None."""
        return None if index is None else self._inner.id_to_token(index)


class Detokenizer:
    """Turns ids into text as they come; a character split over tokens appears whole, with its last token.

    The pieces of a sequence, with ``flush`` at its end, join to what decoding it at once gives. (One exception: where a
    byte-fallback decoder voids a whole run of bytes for one bad byte, characters already shown stay.)
    """

    def __init__(self, decode: Callable[[list[int]], str], skipped: frozenset[int]) -> None:
        self._decode = decode
        self._skipped = skipped
        # The ids of the last text shown, then the ids not shown yet. Decoders strip the space in front of a text, so
        # the new ids are decoded together with some that stand before them.
        self._window: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """Add ``token`` and return the text that is now certain, often one word, possibly nothing."""
        if token in self._skipped:
            return ""
        self._window.append(token)
        text = self._pending()
        unfinished = text.endswith(REPLACEMENT) and len(self._window) - self._shown < _LONGEST_HOLD
        if unfinished or not text:
            return ""
        del self._window[: self._shown]
        self._shown = len(self._window)
        return text

    def flush(self) -> str:
        """Return what is still held; incomplete characters become U+FFFD."""
        text = self._pending()
        self._shown = len(self._window)
        return text

    def _pending(self) -> str:
        before = self._decode(self._window[: self._shown]) if self._shown else ""
        text = self._decode(self._window)
        if text.startswith(before):
            return text[len(before) :]
        # Bytes that do not continue what stands before them have changed its decoding: they are read on their own.
        del self._window[: self._shown]
        self._shown = 0
        return self._decode(self._window)
