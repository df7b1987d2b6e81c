"""Measure what quantising costs: a model with the artifact's weights beside the same model with the checkpoint's own.

Activations are floats and caches exact on both sides, so that only the weights differ. What an artifact computes from
its weights is judged in parity.py; here a difference is a trade that the user chose, so it is stated and not refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from arkinfer.checkpoint import Checkpoint
from arkinfer.checkpoint.stored import Layout
from arkinfer.errors import UserError, nearest
from arkinfer.graph import ModelGraph, Weight
from arkinfer.layerwise import Layerwise, fetch_from
from arkinfer.parity import TEXTS, agreement, divergence, log_softmax, whole_texts
from arkinfer.quant.packed import DTYPES, Packed, read
from arkinfer.recipe import HEADS, Recipe
from arkinfer.reference import RowSource

Progress = Callable[[str, int, int], None]

MODES = ("auto", "on", "off")
POSITIONS = 2048  # at most, of all texts together
# `auto` measures models whose parameters times POSITIONS are at most this: about 0.6 billion parameters. Two models at
# two operations a parameter and position are what the reference of the fast verification computes, twice.
AUTO_WORK = 1.2e12
LOSSLESS: Mapping[str, Any] = {"lossless": True}


def wanted(mode: str, verify: str, parameters: int) -> bool:
    """Tell whether to measure: ``mode`` is one of MODES, ``verify`` that of the build. Raises UserError for others."""
    if mode not in MODES:
        raise UserError(f"quality is auto, on or off, not {mode!r}", hint=nearest(mode, MODES), code="ARK-E144")
    return mode == "on" or (mode == "auto" and verify != "none" and parameters * POSITIONS <= AUTO_WORK)


def coarsest(graph: ModelGraph, recipe: Recipe) -> str | None:
    """Return the coarsest format, one of GATES, that the build rounds weights to, or None where nothing is lost.

    Floats that are rounded to float16 count as int8.
    """
    found = {
        weight.format if weight.format in HEADS else "int8"
        for weight in graph.weights.values()
        for source in weight.sources
        if weight.part == "weight" and _loses(weight, recipe.layouts[source])
    }
    return min(found, default=None)


def _loses(weight: Weight, layout: Layout) -> bool:
    if weight.format != "dense" or len(weight.shape) == 1:
        return weight.format != layout.format and len(weight.shape) > 1
    kept = layout.dtype if not layout.quantised else "F32"
    return weight.dtype is not None and weight.dtype not in (DTYPES[kept], torch.float32)


def examine(
    checkpoint: Checkpoint,
    graph: ModelGraph,
    recipe: Recipe,
    weights: RowSource,
    encode: Callable[[str], Sequence[int]],
    measured: bool,
    progress: Progress,
) -> Mapping[str, Any] | None:
    """Return what a manifest says of the quality of ``weights``: see Report, LOSSLESS, or None if not ``measured``.

    Beside the weights as they are stored, memory for one layer in float32 is taken, then for the output head of both
    models in float32.
    """
    format = coarsest(graph, recipe)
    if format is None:
        return LOSSLESS
    if not measured:
        return None
    config = checkpoint.config

    def fetch(name: str) -> Packed:
        stored = checkpoint.weight(name)
        return read(stored, 0, stored.layout.shape[0])

    texts = whole_texts(encode, config.vocab_size, TEXTS, config.max_context, POSITIONS)
    original, packed = Layerwise(config, fetch), Layerwise(config, fetch_from(graph, recipe.layouts, weights))
    return measure(original, packed, texts, format, progress).to_dict()


@dataclass(frozen=True)
class Gate:
    """What a format should keep: mean KL divergence (nats), share of equal top tokens, ratio of perplexities."""

    mean_kl: float
    top1: float
    ratio: float


GATES: Mapping[str, Gate] = {
    "int8": Gate(mean_kl=0.002, top1=0.98, ratio=1.05),
    "int4": Gate(mean_kl=0.05, top1=0.90, ratio=1.05),
}


@dataclass(frozen=True)
class Figures:
    """The distance between the two models over some text; perplexities are those of the text's own next tokens."""

    positions: int
    mean_kl: float
    top1: float
    perplexity: float
    original_perplexity: float

    @property
    def ratio(self) -> float:
        return self.perplexity / self.original_perplexity

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Report:
    """The cost of quantising: over all texts and for each of them, judged by the gate of ``format``."""

    format: str
    overall: Figures
    texts: Mapping[str, Figures]
    gate: Gate
    data: str
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """Return the report as the manifest seals it."""
        return {
            "lossless": False,
            "format": self.format,
            **self.overall.to_dict(),
            "texts": {name: figures.to_dict() for name, figures in self.texts.items()},
            "gate": asdict(self.gate),
            "data": self.data,
            "faults": list(self.faults),
            "passed": self.passed,
        }


@dataclass(frozen=True)
class _Rows:
    """KL divergence and equal top tokens of each position, -log p of each next token on both sides."""

    kl: np.ndarray
    agreed: np.ndarray
    loss: np.ndarray
    original_loss: np.ndarray

    @staticmethod
    def join(parts: Sequence[_Rows]) -> _Rows:
        return _Rows(*(np.concatenate(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))

    def figures(self) -> Figures:
        return Figures(
            positions=int(self.kl.size),
            mean_kl=float(self.kl.mean()),
            top1=float(self.agreed.mean()),
            perplexity=_perplexity(self.loss),
            original_perplexity=_perplexity(self.original_loss),
        )


def _perplexity(loss: np.ndarray) -> float:
    return float(np.exp(min(float(loss.mean()), 700.0)))  # the largest that a float holds


def measure(
    original: Layerwise,
    packed: Layerwise,
    texts: Mapping[str, Sequence[Sequence[int]]],
    format: str,
    progress: Progress | None = None,
) -> Report:
    """Compare the two models on ``texts`` (windows of token ids by name) and judge by the gate of ``format``."""
    windows = [window for found in texts.values() for window in found]
    done, total = 0, 2 * original.depth

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("quality", done, total)

    hidden = [model.run(windows, advance) for model in (original, packed)]
    rows, finite = [], True
    for window, ours, theirs in zip(
        windows, *(m.logits(h) for m, h in zip((original, packed), hidden, strict=True)), strict=True
    ):
        right, got = ours.numpy(), theirs.numpy()
        finite = finite and bool(np.isfinite(right).all() and np.isfinite(got).all())
        rows.append(_compare(window, np.nan_to_num(right), np.nan_to_num(got)))
    figures, start = {}, 0
    for name, found in texts.items():
        if found:
            figures[name] = _Rows.join(rows[start : start + len(found)]).figures()
        start += len(found)
    overall, gate = _Rows.join(rows).figures(), GATES[format]
    faults = [] if finite else ["some logits are not finite numbers"]
    if overall.mean_kl > gate.mean_kl:
        faults.append(f"mean KL {overall.mean_kl:.4f} exceeds {gate.mean_kl}")
    if overall.top1 < gate.top1:
        faults.append(f"top token equal in {overall.top1:.2%}, below {gate.top1:.0%}")
    if overall.ratio > gate.ratio:
        faults.append(f"perplexity times {overall.ratio:.3f}, above {gate.ratio}")
    return Report(format, overall, figures, gate, hashlib.sha256(repr(windows).encode()).hexdigest(), tuple(faults))


def _compare(window: Sequence[int], right: np.ndarray, got: np.ndarray) -> _Rows:
    following = np.asarray(window[1:])
    rows = np.arange(len(following))
    loss, original_loss = (-log_softmax(side[:-1])[rows, following] for side in (got, right))
    return _Rows(divergence(right, got), agreement(right, got), loss, original_loss)
