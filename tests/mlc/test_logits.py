"""What the engine does to logits before it draws, against numpy, in the library that it is called in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from arkinfer.backends.mlc import MlcExecutor
from arkinfer.backends.tvm import aligned

LOWEST = np.finfo(np.float32).min


def tensor(executor: MlcExecutor, values: Any, dtype: Any) -> tuple[Any, np.ndarray]:
    array = np.asarray(values, dtype)
    place = aligned(array.shape, dtype)
    place[...] = array
    return executor.ffi.from_dlpack(place), place


def _function(executor: MlcExecutor, name: str) -> Any:
    """Return a kernel as the engine finds it: by a search of the library's parts too."""
    return executor.machine.get_function(name, query_imports=True)


def logits(rows: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(vocabulary).normal(0, 4, (rows, vocabulary)).astype(np.float32)


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 33, 2048])
@pytest.mark.parametrize("temperatures", [(1.0,), (0.0, 0.7, 2.5)])
def test_softmax(executor: MlcExecutor, vocabulary: int, temperatures: tuple[float, ...]) -> None:
    values = logits(len(temperatures), vocabulary)
    if vocabulary > 4:
        values[0, [1, 4]] = values[0].max() + 1  # two that are the largest
    x, _ = tensor(executor, values[:, None], np.float32)
    by, _ = tensor(executor, temperatures, np.float32)
    got = np.from_dlpack(executor.machine["softmax_with_temperature"](x, by))
    assert got.shape == (len(temperatures), 1, vocabulary)
    for row, temperature in enumerate(temperatures):
        exact = values[row].astype(np.float64)
        want = exact == exact.max() if temperature == 0 else np.exp((exact - exact.max()) / temperature)
        np.testing.assert_allclose(got[row, 0], want / want.sum(), rtol=2e-6, atol=1e-9)


def test_biases_add_up(executor: MlcExecutor) -> None:
    want = logits(3, 37)
    x, got = tensor(executor, want, np.float32)
    rows, tokens, biases = [0, 2, 2, 2], [36, 0, 5, 5], [1.5, -2.0, 0.25, 0.25]
    _function(executor, "apply_logit_bias_inplace")(
        x, tensor(executor, rows, np.int32)[0], tensor(executor, tokens, np.int32)[0],
        tensor(executor, biases, np.float32)[0],
    )  # fmt: skip
    np.add.at(want, (rows, tokens), np.float32(biases))
    np.testing.assert_array_equal(got, want)


def test_penalties(executor: MlcExecutor) -> None:
    """Presence and frequency are subtracted; repetition then divides what is positive and multiplies the rest."""
    want = logits(4, 21)
    x, got = tensor(executor, want, np.float32)
    rows, owners, tokens, counts = [3, 1], [0, 0, 1, 1, 1], [20, 3, 0, 7, 8], [1, 4, 2, 1, 9]
    penalties = np.float32([[0.5, 0.25, 1.3], [0.0, -0.125, 2.0]])
    arguments = [rows, owners, tokens, counts]
    _function(executor, "apply_penalty_inplace")(
        x, *(tensor(executor, values, np.int32)[0] for values in arguments), tensor(executor, penalties, np.float32)[0]
    )
    for owner, token, count in zip(owners, tokens, counts, strict=True):
        presence, frequency, repetition = penalties[owner]
        value = want[rows[owner], token] - (presence + count * frequency)
        want[rows[owner], token] = value * repetition if value < 0 else value / repetition
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 65, 2048])
def test_masks(executor: MlcExecutor, vocabulary: int) -> None:
    """A row is masked by its own bits, the highest bit of a word included; rows that are not named stay as they are."""
    want, generator = logits(3, vocabulary), np.random.default_rng(vocabulary)
    allowed = generator.random((3, vocabulary)) < 0.5
    bits = np.zeros((3, -(-vocabulary // 32) * 32), np.uint8)
    bits[:, :vocabulary] = allowed
    words = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    x, got = tensor(executor, want, np.float32)
    _function(executor, "apply_bitmask_inplace")(
        x, tensor(executor, [2, 0], np.int32)[0], tensor(executor, words, np.int32)[0]
    )
    for row in (0, 2):
        want[row, ~allowed[row]] = LOWEST
    np.testing.assert_array_equal(got, want)
