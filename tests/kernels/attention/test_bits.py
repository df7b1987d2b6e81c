"""Results must not depend on chunks, threads, gears or the form of the kernel: not by one bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.attention.layer import NEVER, RUNNABLE, TINY, WIDE, Layer, Shape, projections, set_threads

SHAPES = (
    Shape(16, 2, 64, "float16", TINY),
    Shape(3, 1, 32, "int8", replace(TINY, lse="exact")),
    Shape(2, 2, 48, "float32", replace(TINY, use_nope=True)),
    Shape(16, 1, 128, "float16", None),
)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    set_threads(2)
    yield
    set_threads(2)


def feed(layer: Layer, qkv: np.ndarray, chunks: list[int], start: int = 0, tokens: str | None = None) -> np.ndarray:
    pieces = []
    for count in chunks:
        pieces.append(layer.step(qkv[start : start + count], start, tokens=tokens).copy())
        start += count
    return np.concatenate(pieces)


@pytest.mark.parametrize(
    ("isa", "shape"),
    [(isa, shape) for isa in RUNNABLE for shape in (SHAPES if isa == RUNNABLE[0] else SHAPES[:2])],
    ids=str,
)
def test_chunks_threads_and_forms_give_the_same_bits(isa: str, shape: Shape) -> None:
    length = 150
    qkv = projections(shape, length)
    layers = {name: Layer(shape, isa) for name in ("whole", "single", "odd", "decode")}
    want = feed(layers["whole"], qkv, [length])
    assert np.isfinite(want).all()
    set_threads(1)
    assert np.array_equal(feed(layers["single"], qkv, [1] * length), want)
    assert np.array_equal(feed(layers["decode"], qkv, [length], tokens="one"), want)
    set_threads(2)
    assert np.array_equal(feed(layers["odd"], qkv, [1, 2, 3, 17, 65, 31, 31]), want)
    for name, layer in layers.items():
        for cache, array in layer.caches.items():
            assert np.array_equal(array, layers["whole"].caches[cache]), (name, cache)
            assert not array[0].any(), f"{name} wrote to the other layer's {cache}"


@pytest.mark.parametrize("kv", ["float16", "int8"])
def test_long_contexts_fold_their_splits_alike(kv: str) -> None:
    shape = Shape(4, 2, 32, kv, replace(WIDE, dense_len=900))
    qkv = projections(shape, 1200)
    whole, parts = Layer(shape, RUNNABLE[0]), Layer(shape, RUNNABLE[0])
    want = feed(whole, qkv, [1200])
    chunks = [510, 1, 1, 1, 383, 1, 1, 1, 1, 123, 1, 1, 1, 1, 1, 17, 1]
    assert np.array_equal(feed(parts, qkv, chunks), want[: sum(chunks)])


@pytest.mark.parametrize("tokens", ["one", "many"])
def test_a_sparse_row_that_takes_every_block_is_the_dense_row(tokens: str) -> None:
    shape = Shape(8, 2, 64, "float16", replace(WIDE, topk=20))
    qkv = projections(shape, 1100)
    sparse, dense = Layer(shape, RUNNABLE[0]), Layer(shape, RUNNABLE[0])
    for start, count in ((0, 600), (600, 1), (601, 499)):
        rows = qkv[start : start + count]
        ours = sparse.step(rows, start, dense_len=0, tokens=tokens)
        assert np.array_equal(ours, dense.step(rows, start, dense_len=NEVER, tokens=tokens))
        assert (sparse.blocks[..., -1] == -1).all()


def test_a_truncated_cache_computes_like_a_fresh_one() -> None:
    shape = Shape(4, 1, 32, "float16", TINY)
    old, new = projections(shape, 150, seed=1), projections(shape, 150, seed=2)
    used, fresh = Layer(shape, RUNNABLE[0]), Layer(shape, RUNNABLE[0])
    used.step(old, 0)
    # What lies behind the truncation must not be read, whatever it is.
    for array in (used.caches["k"], used.caches["v"]):
        array[array == 0] = np.nan
    for length in (1, 61, 64, 67):
        mixed = np.concatenate((old[:length], new[length:]))
        fresh.step(mixed[:length], 0)
        want = [fresh.step(mixed[length:90], length), fresh.step(mixed[90:150], 90)]
        have = [used.step(mixed[length:90], length), used.step(mixed[90:150], 90)]
        assert np.array_equal(np.concatenate(have), np.concatenate(want))
        used.step(old[length:], length)


def test_equal_scores_choose_the_lower_blocks() -> None:
    shape = Shape(2, 1, 16, "float32", replace(TINY, topk=4, window_size=0))
    qkv = projections(shape, 200)
    qkv[:, :32] = 0  # all-zero queries: every visible kernel has the same score
    layer = Layer(shape, RUNNABLE[0])
    layer.step(qkv, 0)
    # Blocks whose kernels are all visible tie; block 0 is forced, and so is the row's own.
    assert layer.blocks[180:192, 0].tolist() == [[0, 1, 2, 11]] * 12
