"""Sampling against tables that can be checked by hand, and against transformers' own processors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkinfer.errors import InternalError
from arkinfer.runtime.sampling import Sampler, Sampling, _pick, distribution, penalise

# Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625 as logits.
HALVES = np.log(np.array([0.125, 0.5, 0.0625, 0.25, 0.0625], np.float32))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Sampling(temperature=0), {1: 1.0}),
        (Sampling(top_k=1), {1: 1.0}),
        (Sampling(), {0: 0.125, 1: 0.5, 2: 0.0625, 3: 0.25, 4: 0.0625}),
        (Sampling(temperature=0.5), {0: 4 / 86, 1: 64 / 86, 2: 1 / 86, 3: 16 / 86, 4: 1 / 86}),
        (Sampling(top_k=2), {1: 2 / 3, 3: 1 / 3}),
        (Sampling(top_k=4), {0: 0.125, 1: 0.5, 2: 0.0625, 3: 0.25, 4: 0.0625}),  # equal to the fourth: kept
        (Sampling(top_p=0.5), {1: 1.0}),
        (Sampling(top_p=0.6), {1: 2 / 3, 3: 1 / 3}),
        (Sampling(top_p=0.8), {0: 1 / 7, 1: 4 / 7, 3: 2 / 7}),
        (Sampling(min_p=0.2), {0: 1 / 7, 1: 4 / 7, 3: 2 / 7}),
        (Sampling(min_p=1.0), {1: 1.0}),
        (Sampling(top_k=3, top_p=0.7), {1: 2 / 3, 3: 1 / 3}),  # top-p sees 4/7, 2/7, 1/7
    ],
)
def test_each_option_keeps_what_the_table_says(options: Sampling, expected: dict[int, float]) -> None:
    ids, weights = distribution(HALVES, options)
    assert dict(zip(ids.tolist(), weights.tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)


def test_penalties() -> None:
    logits = np.array([2.0, -2.0, 2.0, 1.0], np.float32)
    seen, counts = np.array([True, True, False, False]), np.array([3, 0, 0, 1])
    options = Sampling(repetition_penalty=2.0)
    assert penalise(logits, options, seen, counts).tolist() == [1.0, -4.0, 2.0, 1.0]
    options = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    assert penalise(logits, options, seen, counts).tolist() == [0.75, -2.0, 2.0, 0.25]
    assert logits.tolist() == [2.0, -2.0, 2.0, 1.0]


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    assert Sampler(Sampling(temperature=0), 4, [])(np.array([1, 5, 5, 0], np.float32)) == 1


def test_a_frequency_penalty_breaks_a_loop() -> None:
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=1.5), 3, [])
    logits = np.array([3.0, 2.0, 1.0], np.float32)
    assert [sampler(logits) for _ in range(4)] == [0, 1, 0, 2]


def test_the_prompt_counts_for_the_repetition_penalty_only() -> None:
    logits = np.array([1.5, 1.0], np.float32)
    assert Sampler(Sampling(temperature=0, repetition_penalty=2.0), 2, [0])(logits) == 1
    assert Sampler(Sampling(temperature=0, presence_penalty=2.0), 2, [0])(logits) == 0


@pytest.mark.parametrize("spread", [1, 40, 200])
def test_draws_follow_the_distribution(spread: int) -> None:
    """Five tokens, alone or ``spread`` apart among impossible ones."""
    logits = np.full(5 * spread, -np.inf, np.float32)
    logits[::spread] = HALVES
    sampler = Sampler(Sampling(seed=5), logits.size, [])
    draws = np.bincount([sampler(logits) for _ in range(5000)], minlength=logits.size) / 5000
    assert draws[::spread].sum() == pytest.approx(1)
    assert np.abs(draws[::spread] - np.exp(HALVES)).max() < 0.025


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(0, 1)), min_size=1, max_size=300).filter(any),
    st.one_of(st.floats(0, 1, exclude_max=True), st.just(float(np.nextafter(1, 0)))),
)
def test_a_pick_is_where_the_running_sum_passes_and_never_impossible(weights: list[float], fraction: float) -> None:
    values = np.array(weights)
    index = _pick(values, fraction)
    sums = np.cumsum(values)
    assert values[index] > 0
    assert sums[index] >= fraction * sums[-1] * (1 - 1e-12)
    assert index == 0 or sums[index] - values[index] <= fraction * sums[-1] * (1 + 1e-12)


def test_seeds_repeat_and_differ() -> None:
    logits = np.random.default_rng(0).standard_normal(1000, np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), 1000, [])
        return [sampler(logits) for _ in range(20)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_logits_that_are_no_numbers_are_reported(bad: float) -> None:
    with pytest.raises(InternalError, match="not numbers"):
        distribution(np.full(8, bad, np.float32), Sampling())


def test_never_chosen_tokens_of_minus_infinity() -> None:
    logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    sampler = Sampler(Sampling(seed=1), 4, [])
    assert {sampler(logits) for _ in range(100)} == {1, 3}


@pytest.mark.parametrize(
    "options",
    [
        Sampling(temperature=0.7, top_k=50),
        Sampling(temperature=1.3, top_p=0.9),
        Sampling(top_k=40, top_p=0.95, temperature=0.8),
        Sampling(min_p=0.05),
        Sampling(temperature=0.9, top_k=200, top_p=0.99, min_p=0.01),
        Sampling(top_k=10_000),
    ],
)
@pytest.mark.parametrize("vocab", [151, 5003])
def test_distribution_equals_that_of_transformers(options: Sampling, vocab: int) -> None:
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation")
    logits = (np.random.default_rng(vocab).standard_normal(vocab) * 3).astype(np.float32)
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    chain = [generation.TemperatureLogitsWarper(options.temperature)] if options.temperature != 1 else []
    if options.top_k:
        chain.append(generation.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chain.append(generation.TopPLogitsWarper(options.top_p))
    if options.min_p:
        chain.append(generation.MinPLogitsWarper(options.min_p))
    for warper in chain:
        scores = warper(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    ids, weights = distribution(logits, options)
    actual = np.zeros(vocab)
    actual[ids] = weights
    assert np.array_equal(actual > 0, expected > 0)
    assert np.allclose(actual, expected, rtol=1e-5, atol=1e-12)


def test_repetition_penalty_equals_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation")
    logits = np.random.default_rng(1).standard_normal(50).astype(np.float32)
    seen = np.zeros(50, np.bool_)
    seen[[3, 7, 9]] = True
    expected = generation.RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor([[3, 7, 9]]), torch.from_numpy(logits)[None].clone()
    )
    actual = penalise(logits, Sampling(repetition_penalty=1.3), seen, np.zeros(50, np.int32))
    assert np.allclose(actual, expected[0].numpy(), atol=1e-7)
