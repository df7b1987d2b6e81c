"""Measure an artifact against the torch reference, and judge the result.

Only the lowering is judged here: both sides use the same packed weights, the same cache type and the same activation
quantisation, so that any difference beyond rounding is a fault of the artifact.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from arkinfer.backends.base import Rows
from arkinfer.errors import ParityError, UnsupportedError
from arkinfer.reference import Reference

Progress = Callable[[str, int, int], None]

TEXTS = Path(__file__).parent / "texts"
_FEWEST = 64  # tokens that a tokenizer of real text tells apart in the texts
_SEED = 20250606
SUITES: Mapping[str, int] = {"fast": 2048, "full": 20480}  # positions compared
WINDOW = 512
TRACED = 8  # tokens run layer by layer: few, so that rounding noise has not spread yet
CHUNK = 192  # not a divisor of WINDOW: chunk borders fall at odd places


@dataclass(frozen=True)
class Gate:
    """What a numeric path must reach: mean and worst KL divergence (nats) and the share of equal top tokens.

    A lower share passes only if every differing row's two best reference logits lie within ``margin``.
    """

    mean_kl: float
    max_kl: float
    top1: float
    margin: float


# Float paths differ from the reference only in the order of float32 sums.
GATES: Mapping[str, Gate] = {
    "float": Gate(mean_kl=1e-6, max_kl=1e-4, top1=1.0, margin=1e-3),
    "fp16": Gate(mean_kl=2e-4, max_kl=2e-2, top1=0.995, margin=0.05),
}


def int8_gate(floor: np.ndarray, agreed: float) -> Gate:
    """Return the gate of paths that round activations or caches to int8.

    There the order of a sum can push a value over a rounding border: one step of 1/127 of its group, which moves other
    values over theirs, until two correct programs are as far apart as the rounding noise of the model itself. That
    distance is measured: ``floor`` (KL per row) and ``agreed`` (share of equal top tokens) compare the reference with
    itself, its norm weights changed in the last bits. The artifact may be three times as far, not more; where flips are
    so rare that the sample holds hardly any, a mean of 1e-5 and a single row of 1e-3 pass. The worst row is an extreme
    of a distribution with a long tail, drawn from more rows than the floor: it may be twelve times the
    floor's own worst.
    """
    mean = max(3 * float(floor.mean()), 1e-5)
    return Gate(mean_kl=mean, max_kl=max(10 * mean, 12 * float(floor.max()), 1e-3), top1=agreed - 0.02, margin=1e-3)


@dataclass(frozen=True)
class Report:
    """The outcome of a verification; ``positions`` next-token distributions were compared.

    ``evidence`` says what computed them: "ran" (the device), or what the exporter's ``StandIn`` says where that is
    absent.
    """

    suite: str
    path: str
    positions: int
    mean_kl: float
    p999_kl: float
    max_kl: float
    top1: float
    max_logit_difference: float
    gate: Gate
    data: str
    faults: tuple[str, ...]
    first_bad_layer: str | None = None
    evidence: str = "ran"

    @property
    def passed(self) -> bool:
        return not self.faults

    def summary(self) -> str:
        """Return one sentence for people."""
        verdict = "verified" if self.passed else "NOT verified"
        figures = f"mean KL {self.mean_kl:.1e}, top-1 {self.top1:.2%}"
        where = "" if self.evidence == "ran" else f"; {self.evidence}"
        return f"{verdict} over {self.positions} positions: {figures} ({self.path} path{where})"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as the manifest seals it."""
        return {**asdict(self), "faults": list(self.faults), "passed": self.passed}


class Stepper(Protocol):
    """The part of an Executor that verification needs."""

    def new_state(self, capacity: int | None = None) -> Any: ...
    def step(self, tokens: Sequence[int], state: Any, logits: Rows = "last") -> np.ndarray: ...
    def trace(self, tokens: Sequence[int], state: Any) -> Mapping[str, np.ndarray]: ...


def windows(
    encode: Callable[[str], Sequence[int]], vocabulary: int, suite: str, limit: int
) -> tuple[list[list[int]], str]:
    """Return token windows of at most ``limit`` tokens that together hold the suite's positions, and their digest.

    The texts are English, Chinese and code; later windows join their paragraphs in other orders. A tokenizer that maps
    most of them to one token (a word list of a constructed model) gets seeded random tokens instead.
    """
    paragraphs = [part for text in read_texts(TEXTS).values() for part in re.split(r"\n\s*\n", text)]
    wanted, size = SUITES[suite], min(WINDOW, limit)
    random_tokens = _is_word_list(encode("\n\n".join(paragraphs)))
    generator = random.Random(_SEED)
    found: list[list[int]] = []
    positions = 0
    while positions < wanted:
        if random_tokens:
            stream = [generator.randrange(vocabulary) for _ in range(wanted)]
        else:
            stream = list(encode("\n\n".join(paragraphs)))
            generator.shuffle(paragraphs)
        for start in range(0, len(stream), size):
            window = stream[start : start + size][: wanted - positions]
            if len(window) > 1:
                found.append(window)
                positions += len(window)
            if positions >= wanted - 1:
                digest = hashlib.sha256(repr(found).encode()).hexdigest()
                return found, digest
    return found, hashlib.sha256(repr(found).encode()).hexdigest()


def read_texts(folder: Path) -> dict[str, str]:
    """Return the texts in ``folder`` by their files' names, sorted."""
    return {file.stem: file.read_text("utf-8") for file in sorted(folder.glob("*.txt"))}


def whole_texts(
    encode: Callable[[str], Sequence[int]], vocabulary: int, folder: Path, limit: int, most: int
) -> dict[str, list[list[int]]]:
    """Return each text of ``folder`` once, from its start, in windows of at most ``limit`` tokens.

    All texts get equal parts of ``most`` tokens. For a tokenizer of few words there is one text, "random", as in
    `windows`.
    """
    texts = {name: list(encode(text)) for name, text in read_texts(folder).items()}
    if _is_word_list([token for tokens in texts.values() for token in tokens]):
        generator = random.Random(_SEED)
        texts = {"random": [generator.randrange(vocabulary) for _ in range(most)]}
    share, size = most // len(texts), min(WINDOW, limit)
    cut = {
        name: [tokens[:share][start : start + size] for start in range(0, min(share, len(tokens)), size)]
        for name, tokens in texts.items()
    }
    return {name: [window for window in found if len(window) > 1] for name, found in cut.items()}


def _is_word_list(tokens: Sequence[int]) -> bool:
    return len(set(tokens)) < _FEWEST


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities (rows, vocab) float64 of logits (rows, vocab)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return KL(reference || other) in nats for each row of two logit arrays (rows, vocab)."""

    ours, theirs = log_softmax(reference), log_softmax(other)
    result: np.ndarray = np.maximum((np.exp(ours) * (ours - theirs)).sum(axis=1), 0)
    return result


def agreement(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return for each row of two logit arrays (rows, vocab) whether the largest is at the same token."""
    result: np.ndarray = reference.argmax(axis=1) == other.argmax(axis=1)
    return result


@dataclass(frozen=True)
class _Rows:
    """Row by row: KL divergence, largest logit difference, equal top tokens, the reference's top-2 margin."""

    kl: np.ndarray
    difference: np.ndarray
    agreed: np.ndarray
    margin: np.ndarray
    finite: bool


def _rows(
    reference: Reference,
    other: Any,
    found: Sequence[Sequence[int]],
    progress: Progress | None = None,
    size: int = CHUNK,
) -> _Rows:
    """Compare every next-token distribution of ``found``: the reference reads whole windows, the other ``size`` tokens
    at a time.

    The reference of a large model fetches all its weights anew at each step.
    """
    total, done = sum(len(window) for window in found), 0
    columns: list[list[np.ndarray]] = [[], [], [], []]
    finite = True
    for window in found:
        ours, theirs = reference.new_state(len(window)), other.new_state(len(window))
        whole = reference.step(window, ours, "all")
        for start in range(0, len(window), size):
            chunk = window[start : start + size]
            right, got = whole[start : start + size], other.step(chunk, theirs, "all")
            finite = finite and bool(np.isfinite(got).all())
            got = np.nan_to_num(got)
            two = np.partition(right, -2, axis=1)[:, -2:]
            row = (
                divergence(right, got),
                np.abs(right - got).max(axis=1),
                agreement(right, got),
                two[:, 1] - two[:, 0],
            )
            for column, values in zip(columns, row, strict=True):
                column.append(values)
            done += len(chunk)
            if progress is not None:
                progress("verify", done, total)
    kl, difference, agreed, margin = (np.concatenate(column) for column in columns)
    return _Rows(kl, difference, agreed, margin, finite)


def compare(
    executor: Stepper,
    reference: Reference,
    texts: tuple[list[list[int]], str],
    suite: str,
    path: str,
    progress: Progress | None = None,
) -> Report:
    """Compare ``executor`` with ``reference`` on ``texts`` and judge by the gate of ``path`` (float, fp16 or int8)."""
    found, digest = texts
    rows = _rows(reference, executor, found, progress)
    if path == "int8":
        # The first window and the last: how far apart two correct programs are differs up to sevenfold between windows.
        sample = found if len(found) < 2 else [found[0], found[-1]]
        floor = _rows(reference, reference.perturbed(), sample, size=WINDOW)
        gate = int8_gate(floor.kl, float(floor.agreed.mean()))
    else:
        gate = GATES[path]
    faults = [] if rows.finite else ["some logits are not finite numbers"]
    if rows.kl.mean() > gate.mean_kl:
        faults.append(f"mean KL {rows.kl.mean():.2e} exceeds {gate.mean_kl:.1e}")
    if rows.kl.max() > gate.max_kl:
        faults.append(f"largest KL {rows.kl.max():.2e} exceeds {gate.max_kl:.1e}")
    if rows.agreed.mean() < gate.top1 and not bool((rows.agreed | (rows.margin < gate.margin)).all()):
        faults.append(f"top token equal in {rows.agreed.mean():.2%}, below {gate.top1:.1%}")
    return Report(
        suite=suite,
        path=path,
        positions=int(rows.kl.size),
        mean_kl=float(rows.kl.mean()),
        p999_kl=float(np.quantile(rows.kl, 0.999)),
        max_kl=float(rows.kl.max()),
        top1=float(rows.agreed.mean()),
        max_logit_difference=float(rows.difference.max()),
        gate=gate,
        data=digest,
        faults=tuple(faults),
        first_bad_layer=locate(executor, reference, found[0][:TRACED]) if faults else None,
    )


def locate(executor: Stepper, reference: Reference, tokens: Sequence[int]) -> str | None:
    """Return the first layer whose residual stream is wrong, judged by the jump of its relative error.

    None also where ``executor`` shows no inner values.
    """
    theirs, ours = executor.new_state(len(tokens)), reference.new_state(len(tokens))
    try:
        got = executor.trace(tokens, theirs)
    except UnsupportedError:
        return None
    right = reference.trace(tokens, ours, reference.residuals())
    previous = 1e-6
    for name, value in right.items():
        error = float(np.abs(value - got[name]).max() / (np.abs(value).max() + 1e-30))
        if not np.isfinite(error) or error > max(1e-3, 30 * previous):
            return name
        previous = max(previous, error)
    return None


def require(report: Report) -> None:
    """Raise ParityError if ``report`` did not pass."""
    if report.passed:
        return
    facts = {"path": report.path, "positions": report.positions, "faults": "; ".join(report.faults)}
    if report.first_bad_layer is not None:
        facts["first bad layer"] = report.first_bad_layer
    raise ParityError(
        "the artifact does not compute what the reference computes",
        facts=facts,
        hint="report this with the model's config.json; --verify none builds an artifact that says it is unverified",
        code="ARK-E401",
    )
