"""The kernels that TVM's paged cache calls, against numpy, at sizes that leave pages and blocks of keys part full."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm

from arkinfer.exporters.kernels.tir import paged
from arkinfer.exporters.kernels.tir.isa import ISAS

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 48, 0.2
CASES = [("float32", 2e-6), ("float16", 2e-3)]
LENGTHS = [0, 1, 15, 16, 17, 40]  # keys of each sequence


@cache
def kernel(name: str, dtype: str) -> Any:
    shapes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": dtype}
    wanted = {
        "merge": {"heads", "head_dim", "dtype"},
        "append": {"kv_heads", "head_dim", "dtype"},
        "from_heads": {"heads", "head_dim", "dtype"},
    }.get(name, set(shapes))
    options: dict[str, Any] = {key: value for key, value in shapes.items() if key in wanted}
    options |= {"magnitude": 1.25} if name == "split_rotary" else {}
    options |= {"norm_eps": 1e-5} if name == "to_heads" else {}
    isa = ISAS["x86-64-v3"]
    function = getattr(paged, name)(isa, "many", **options).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": function}), target=tvm.target.Target({**isa.target}))["main"]


def run(name: str, dtype: str, *arguments: Any) -> list[np.ndarray]:
    """Call a kernel; return what its arrays hold then."""
    tensors = [tvm.runtime.tensor(item) if isinstance(item, np.ndarray) else item for item in arguments]
    kernel(name, dtype)(*tensors)
    return [item.numpy() for item in tensors if not isinstance(item, (int, float))]


def numbers(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def index(values: Any) -> np.ndarray:
    return np.asarray(values, np.int32)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the attention (heads, dim) of one query over keys (n, kv_heads, dim), and its log-sum-exp to base 2."""
    if not len(k):
        return np.zeros((HEADS, DIM)), np.full(HEADS, -5e4)
    k, v = (np.repeat(x.astype(np.float64), HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = np.einsum("hd,nhd->hn", q.astype(np.float64), k) * SCALE
    weights = np.exp(scores - scores.max(1, keepdims=True))
    total = weights.sum(1, keepdims=True)
    return np.einsum("hn,nhd->hd", weights / total, v), (scores.max(1) + np.log(total[:, 0])) / math.log(2)


class Pool:
    """Sequences of LENGTHS keys on pages in no order."""

    def __init__(self, dtype: str) -> None:
        counts = [-(-length // paged.PAGE) for length in LENGTHS]
        self.numbers = np.random.default_rng(0).permutation(sum(counts) + 2)[: sum(counts)]
        self.starts = np.cumsum([0, *counts])
        self.last = [(length - 1) % paged.PAGE + 1 if length else 0 for length in LENGTHS]
        self.pages = np.full((sum(counts) + 2, 2, KV_HEADS, paged.PAGE, DIM), np.nan, dtype)
        self.keys, self.values = ([numbers(s + i, n, KV_HEADS, DIM, dtype=dtype) for i, n in enumerate(LENGTHS)]
                                  for s in (10, 20))  # fmt: skip
        for sequence, length in enumerate(LENGTHS):
            for place in range(length):
                page = self.numbers[self.starts[sequence] + place // paged.PAGE]
                self.pages[page, 0, :, place % paged.PAGE] = self.keys[sequence][place]
                self.pages[page, 1, :, place % paged.PAGE] = self.values[sequence][place]

    def arguments(self) -> list[np.ndarray]:
        return [self.pages, index(self.starts), index(self.numbers), index(self.last)]


def outputs(rows: int, dtype: str) -> list[np.ndarray]:
    return [np.zeros((rows, HEADS, DIM), dtype), np.zeros((rows, HEADS), np.float32)]


NUMBERS = (0, 1.0, 10000.0, SCALE)  # rotary_mode, rope_scale, rope_theta, sm_scale


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
def test_decode(dtype: str, tolerance: float) -> None:
    pool, count = Pool(dtype), len(LENGTHS)
    q, unread = numbers(1, count, HEADS, DIM, dtype=dtype), np.zeros(count, np.int32)
    found = run("decode", dtype, q, *pool.arguments(), unread, unread, *outputs(count, dtype), *NUMBERS)
    for i in range(count):
        out, lse = attention(q[i], pool.keys[i], pool.values[i])
        np.testing.assert_allclose(found[-2][i], out, atol=tolerance)
        np.testing.assert_allclose(found[-1][i], lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
@pytest.mark.parametrize("causal", [0, 1])
def test_prefill(dtype: str, tolerance: float, causal: int) -> None:
    pool, queries = Pool(dtype), [2, 0, 3, 1, 17, 5]
    starts = np.cumsum([0, *queries])
    q = numbers(2, starts[-1], HEADS, DIM, dtype=dtype)
    rest = [np.zeros(len(queries), np.int32), np.zeros(len(q), np.int32), *outputs(len(q), dtype), causal, *NUMBERS]
    found = run("prefill", dtype, q, index(starts), *pool.arguments(), *rest)
    for i, count in enumerate(queries):
        for own in range(count):
            keys = max(0, LENGTHS[i] - count + own + 1) if causal else LENGTHS[i]
            out, lse = attention(q[starts[i] + own], pool.keys[i][:keys], pool.values[i][:keys])
            np.testing.assert_allclose(found[-2][starts[i] + own], out, atol=tolerance)
            np.testing.assert_allclose(found[-1][starts[i] + own], lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
def test_two_parts_merge_into_one(dtype: str, tolerance: float) -> None:
    q, k, v = numbers(3, 3, HEADS, DIM), numbers(4, 9, KV_HEADS, DIM), numbers(5, 9, KV_HEADS, DIM)
    cuts = [0, 4, 9]  # the first and the last have a part without keys
    parts = [[attention(q[i], x[0], x[1]) for i, x in enumerate(side)] for side in (
        [(k[:cut], v[:cut]) for cut in cuts], [(k[cut:], v[cut:]) for cut in cuts])]  # fmt: skip
    flat = [
        np.stack([row[j] for row in side]).astype(kind) for side in parts for j, kind in ((0, dtype), (1, "float32"))
    ]
    merged, lse = run("merge", dtype, *flat)[:2]
    for i in range(3):
        out, total = attention(q[i], k, v)
        np.testing.assert_allclose(merged[i], out, atol=2 * tolerance)
        np.testing.assert_allclose(lse[i], total, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
def test_rotation_and_pages(dtype: str, tolerance: float) -> None:
    """Positions anywhere up to 128K turn by the given frequencies; a place of -1 is nowhere."""
    positions, frequencies = [0, 7, 131071], np.float32(10000.0) ** (-np.arange(DIM // 2, dtype=np.float32) * 2 / DIM)
    qkv = numbers(6, 3, HEADS + 2 * KV_HEADS, DIM, dtype=dtype)
    empty = [np.zeros((3, count, DIM), dtype) for count in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = run("split_rotary", dtype, qkv, index(positions), *empty, frequencies)[2:5]
    angle = (np.float32(positions)[:, None] * frequencies).astype(np.float64)[:, None]
    cosine, sine = 1.25 * np.cos(angle), 1.25 * np.sin(angle)
    low, high = np.split(qkv[:, : HEADS + KV_HEADS].astype(np.float64), 2, axis=2)
    want = np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=2)
    np.testing.assert_allclose(np.concatenate([q, k], axis=1), want, atol=3 * tolerance)
    np.testing.assert_array_equal(v, qkv[:, HEADS + KV_HEADS :])
    pages = np.full((3, 2, KV_HEADS, paged.PAGE, DIM), 9, dtype)
    after = run("append", dtype, pages, k, v, index([33, -1, 15]))[0]
    pages[2, 0, :, 1], pages[2, 1, :, 1], pages[0, 0, :, 15], pages[0, 1, :, 15] = k[0], v[0], k[2], v[2]
    np.testing.assert_array_equal(after, pages)


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
def test_heads_are_normed_and_cut(dtype: str, tolerance: float) -> None:
    fused = HEADS + 2 * KV_HEADS
    qkv, weights = numbers(7, 3, fused * DIM), [numbers(8, DIM), numbers(9, DIM)]
    y = run("to_heads", dtype, qkv, *weights, np.zeros((3, fused, DIM), dtype))[-1]
    want = qkv.reshape(3, fused, DIM).astype(np.float64)
    for part, weight in ((slice(0, HEADS), weights[0]), (slice(HEADS, HEADS + KV_HEADS), weights[1])):
        want[:, part] *= weight / np.sqrt((want[:, part] ** 2).mean(2, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, want, atol=3 * tolerance, rtol=2 * tolerance)
    x = numbers(10, 3, HEADS, DIM, dtype=dtype)
    flat = run("from_heads", dtype, x, np.zeros((3, HEADS * DIM), np.float32))[-1]
    np.testing.assert_array_equal(flat, x.reshape(3, -1).astype(np.float32))
