"""Logits to token: penalties, temperature, top-k, top-p and min-p, in the order in which transformers applies them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.random import default_rng

from arkinfer.backends.base import Draw
from arkinfer.errors import InternalError, UserError

COLDEST = 1e-30  # temperatures below it are 0: float32 holds no inverse of the smallest
_BLOCK = 64  # logits per block when looking for the k largest


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token. ``temperature`` 0 or ``top_k`` 1 is greedy; the defaults change nothing.

    ``repetition_penalty`` (> 1 discourages) divides positive and multiplies negative logits of every token in the
    prompt or the answer; ``presence_penalty`` and ``frequency_penalty`` are subtracted once, or once per occurrence,
    for tokens of the answer. The same ``seed`` and logits give the same tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0, 100)
        _whole("top_k", self.top_k, 0)
        _within("top_p", self.top_p, 0, 1, open_low=True)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        _within("presence_penalty", self.presence_penalty, -100, 100)
        _within("frequency_penalty", self.frequency_penalty, -100, 100)
        if self.seed is not None:
            _whole("seed", self.seed, 0)

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST or self.top_k == 1

    @property
    def plain(self) -> bool:
        """Whether the logits alone decide, by temperature, top-k and top-p: what executors can do by themselves."""
        return not self.penalised and self.min_p == 0

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _within(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_low and value == low):
        bounds = f"above {low} and at most {high}" if open_low else f"from {low} to {high}"
        raise UserError(f"{name} must be a number {bounds}, not {value!r}", code="ARK-E221")


def _whole(name: str, value: int, low: int) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low:
        raise UserError(f"{name} must be a whole number from {low} up, not {value!r}", code="ARK-E221")


def penalise(logits: np.ndarray, options: Sampling, seen: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return ``logits`` (vocab,) with penalties; ``seen`` (vocab,) bool marks tokens of prompt and answer, ``counts``
    (vocab,) int how often each stands in the answer."""
    result: np.ndarray = logits.astype(np.float32)  # a copy
    if options.repetition_penalty != 1:
        marked = result[seen]
        factor = np.float32(options.repetition_penalty)
        result[seen] = np.where(marked > 0, marked / factor, marked * factor)
    result -= np.float32(options.presence_penalty) * (counts > 0)
    result -= np.float32(options.frequency_penalty) * counts
    return result


def _largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Return the ids, ascending, of the ``count`` largest logits and of those equal to the last of them."""
    blocks = logits.size // _BLOCK
    if count >= logits.size:
        return np.arange(logits.size)
    candidates = np.arange(logits.size)
    if count * 4 <= blocks:
        # The k-th largest block maximum is no larger than the k-th largest logit: what lies below it is out, and one
        # pass over the logits leaves a few hundred candidates.
        maxima = logits[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        candidates = np.flatnonzero(logits >= np.partition(maxima, blocks - count)[blocks - count])
    values = logits[candidates]
    chosen: np.ndarray = candidates[values >= np.partition(values, values.size - count)[values.size - count]]
    return chosen


def distribution(logits: np.ndarray, options: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return the candidate ids, ascending, and their probabilities (float64, sum 1) for ``logits`` (vocab,).

    Raises InternalError if the logits hold no largest value (NaN, or nothing but -inf).
    """
    best = float(logits.max())
    if not math.isfinite(best):
        raise InternalError("the model returned logits that are not numbers", facts={"largest": best}, code="ARK-E710")
    if options.greedy:
        return np.array([int(logits.argmax())]), np.ones(1)
    ids = _largest(logits, options.top_k) if options.top_k else np.arange(logits.size)
    # exp in float32: over a whole vocabulary it takes a tenth of the time, and sampling resolves no more.
    chosen = logits[ids] if options.top_k else logits
    weights = np.exp((chosen - np.float32(best)) * np.float32(1 / options.temperature))
    total = float(weights.sum(dtype=np.float64))
    if options.top_p < 1:
        # All tokens below this bound together weigh less than what top-p cuts off: they need not be sorted.
        kept = np.flatnonzero(weights >= (1 - options.top_p) * total / weights.size)
        order = kept[np.argsort(-weights[kept], kind="stable")]
        sizes = weights[order].astype(np.float64)
        nucleus = np.sort(order[np.cumsum(sizes) - sizes < options.top_p * total])
        ids, weights = ids[nucleus], weights[nucleus]
    if options.min_p > 0:
        likely = weights >= options.min_p * weights.max()
        ids, weights = ids[likely], weights[likely]
    shares = weights.astype(np.float64)
    return ids, shares / shares.sum()


def _pick(weights: np.ndarray, fraction: float) -> int:
    """Return the index at which the running sum of ``weights`` passes ``fraction`` of their total.

    By blocks: a running sum cannot be vectorised, and over a whole vocabulary it would cost more than all the rest.
    """
    starts = np.arange(0, weights.size, _BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts))
    target = min(fraction * float(sums[-1]), float(np.nextafter(sums[-1], 0)))
    block = int(np.searchsorted(sums, target, side="right"))
    inner = weights[starts[block] : starts[block] + _BLOCK]
    rest = target - (float(sums[block - 1]) if block else 0.0)
    place = int(np.searchsorted(np.cumsum(inner), rest, side="right"))
    return int(starts[block]) + min(place, int(np.flatnonzero(inner)[-1]))


def drawing(options: Sampling, first: int, count: int) -> Draw:
    """Return ``options`` for an executor that chooses ``count`` tokens from position ``first`` on by itself.

    Its numbers are those that a ``Sampler`` of the same seed takes, token by token. ``options`` must be ``plain``.
    """
    if options.greedy:
        return Draw()
    numbers = default_rng(options.seed).random(count, np.float32)
    return Draw(options.temperature, options.top_k, options.top_p, numbers, first)


class Sampler:
    """Chooses the tokens of one answer; knows the tokens seen so far and owns the random state: one number a token."""

    def __init__(self, options: Sampling, vocab_size: int, prompt: Iterable[int]) -> None:
        self._options = options
        self._random = default_rng(options.seed)
        if options.penalised:
            self._counts = np.zeros(vocab_size, np.int32)
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[list(prompt)] = True

    def __call__(self, logits: np.ndarray) -> int:
        """Return the next token for ``logits`` (vocab,) and remember it."""
        options = self._options
        if options.penalised:
            logits = penalise(logits, options, self._seen, self._counts)
        ids, weights = distribution(logits, options)
        # A number is taken even where it decides nothing, so that the i-th token always has the i-th number.
        number = 0.0 if options.greedy else float(self._random.random(dtype=np.float32))
        token = int(ids[_pick(weights, number)])
        if options.penalised:
            self._counts[token] += 1
            self._seen[token] = True
        return token
