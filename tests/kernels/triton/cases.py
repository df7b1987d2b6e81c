"""Launches of every CUDA kernel over odd sizes, small enough for Triton's interpreter."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from arkinfer.exporters.kernels.triton.sampling import PART
from tests.kernels.triton import draws
from tests.kernels.triton.samples import Case

NAN, INF = float("nan"), float("inf")


def _linear() -> Iterator[Case]:
    formats: list[dict[str, Any]] = [
        {"format": "dense"},
        {"format": "dense", "dtype": "bfloat16", "bias": True},
        {"format": "int8"},
        {"format": "int8", "group": 32, "zeros": True},
        {"format": "int4", "group": 32},
        {"format": "int4", "group": 48, "zeros": True, "width": 144, "bias": True},
        {"format": "int4", "group": 128, "width": 384, "order": True},
        {"format": "int2", "group": 64, "zeros": True, "width": 320},
        {"format": "ternary", "scales": "bfloat16"},
        {"format": "ternary", "group": 128, "width": 640},
        {"format": "int4", "zeros": True, "scales": "float32"},
    ]
    for place, options in enumerate(formats):
        # The row length is no whole number of chunks, and the outputs no whole number of tiles.
        shape = {"rows": 37, "width": 160, "out": "float32" if place % 2 else "float16"}
        yield Case("linear_gemv", {**shape, **options})
        yield Case("linear_gemm", {**shape, **options}, n=(3, 18, 70)[place % 3])
    gated = {"rows": 2 * 37, "gated": True, "factor": 0.5}
    for options in ({"format": "dense", "width": 264}, {"format": "ternary", "width": 256}):
        yield Case("linear_gemv", {**gated, **options})
        yield Case("linear_gemm", {**gated, **options}, n=33)
    yield Case("linear_gemm", {"format": "int4", "rows": 70, "width": 128, "count": "r", "out": "float32"}, n=9, r=5)
    yield Case("linear_gemm", {"format": "ternary", "rows": 70, "width": 256, "count": "8"}, n=8)
    # One of several that fill one buffer side by side.
    yield Case("linear_gemm", {"format": "int4", "rows": 40, "width": 96, "group": 32, "out_stride": 104}, n=7)


def _attention() -> Iterator[Case]:
    shapes = [
        {"heads": 4, "kv_heads": 2, "head_dim": 64},
        {"heads": 6, "kv_heads": 2, "head_dim": 16, "kv": "int8"},
        {"heads": 32, "kv_heads": 2, "head_dim": 32},
        {"heads": 3, "kv_heads": 3, "head_dim": 80},
    ]
    for place, shape in enumerate(shapes):
        options = {**shape, "context": 320, "scale": 0.2}
        for splits, position in ((1, 0), (3, 63), (4, 64 + 37 * place)):
            yield Case("attention_decode", {**options, "splits": splits}, position=position)
        for n, position in ((1, 0), (23, 0), (70, 130 + place)):
            yield Case("attention_prefill", {**options}, n=n, position=position)
    for splits in (1, 5):
        lse = [[[-0.5, 2.0]] + [[float("-inf"), 1.0]] * (splits - 1)]
        options = {"heads": 2, "kv_heads": 1, "head_dim": 48, "context": 64, "scale": 1.0, "splits": splits}
        yield Case("attention_combine", options, values={"lse": lse})
    sparse = {"heads": 4, "kv_heads": 2, "head_dim": 32, "context": 320, "scale": 0.2, "budget": 3}
    # One head chose two blocks, the other reads all; no row of the second step is dense, some of the third are.
    chosen = {"blocks": [[[0, 4, -1], [-1, -1, -1]]], "counts": [[2, -1]]}
    yield Case("attention_decode", {**sparse, "splits": 2}, position=290, dense_len=256, values=chosen)
    yield Case("attention_prefill", sparse, n=20, position=260, dense_len=256)
    yield Case("attention_prefill", sparse, n=50, position=240, dense_len=271)


def _chosen(options: dict[str, Any], n: int, position: int, dense_len: int) -> dict[str, list[Any]]:
    """Return blocks and counts of a step: each sparse row takes its own block and some that were before it."""
    blocks, counts = [], []
    generator = random.Random(n)
    for row in range(position, position + n):
        lists, lengths = [], []
        for _ in range(options["kv_heads"]):
            own = row // options["block"]
            earlier = generator.sample(range(own), min(own, generator.randrange(options["budget"])))
            ids = sorted([own, *earlier])
            lists.append(ids + [-1] * (options["budget"] - len(ids)))
            lengths.append(len(ids) if row + 1 >= dense_len else -1)
        blocks.append(lists)
        counts.append(lengths)
    return {"blocks": blocks, "counts": counts}


def _sparse() -> Iterator[Case]:
    fields = {"heads": 6, "kv_heads": 2, "head_dim": 24, "context": 448, "scale": 0.3}
    sizes = {"block_size": 16, "kernel_size": 8, "kernel_stride": 4}
    keys = {"kv_heads": 2, "head_dim": 24, "context": 448, "kernel_size": 8, "kernel_stride": 4}
    for n, position in ((1, 6), (1, 7), (1, 31), (50, 0), (33, 100)):
        yield Case("compress", {**keys, "kv": "int8" if n > 1 else "float16"}, n=n, position=position)
    rules = {"init_blocks": 1, "local_blocks": 2, "budget": 5}
    for rule, lse, splits in (("inclusive", "coarse", 1), ("exclusive", "exact", 3)):
        options = {**fields, **sizes, **rules, "local_rule": rule, "lse": lse, "splits": splits}
        # The first rows see no kernel, and no coarse one; in the last step some rows are dense.
        for n, position, dense_len in ((40, 0, 0), (1, 400, 0), (21, 300, 311), (7, 100, 300)):
            step = {"n": n, "position": position, "dense_len": dense_len}
            yield Case("select_lse", options, **step)
            yield Case("select_scores", options, **step)
            yield Case("select_blocks", options, **step)
    wide = {**fields, **sizes, "init_blocks": 3, "local_blocks": 9, "budget": 4, "heads": 32}
    yield Case("select_scores", wide, n=3, position=401)
    yield Case("select_blocks", wide, n=3, position=401)  # more forced blocks than the budget holds
    many = {**fields, **sizes, **rules, "block_size": 64}  # 16 kernels in a block: tiles of fewer blocks
    yield Case("select_scores", many, n=5, position=396)
    for kv, n, position in (("float16", 9, 200), ("int8", 3, 430)):
        options = {**fields, "budget": 6, "block": 16, "kv": kv}
        values = _chosen(options, n, position, 203)
        yield Case("attention_sparse", options, n=n, position=position, dense_len=203, values=values)


def _draws() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4096 * 2 + 100, generator=generator) * 3
    logits[50:70] = logits.topk(12).values[-1]  # equals at the bound of top-k
    for temperature, top_k, top_p, number in (
        (0.8, 12, 0.9, 0.7),
        (1.3, 0, 0.5, 0.99),
        (1.0, 0, 1.0, 0.4),
        (0, 5, 1, 0),
    ):
        known = draws.start(logits, temperature, top_k, top_p, number)
        for name, options, arguments in draws.launches(known):
            if options.get("step", 0) not in (0, 1, 6, 7, 11) or name == "argmax_partial":
                continue
            given = {name: value.tolist() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
            yield Case(name, options, values=given, note=f"T={temperature} k={top_k} p={top_p}")
    known = draws.start(logits.index_fill(0, torch.tensor([5000]), NAN), 0.8, 12, 0.9, 0.7)
    for name, options, arguments in draws.launches(known):
        if name == "sample":
            given = {name: value.tolist() for name, value in arguments.items()}
            yield Case(name, options, values=given, note="NaN among the logits")


def borders() -> list[Case]:
    """Return a draw that falls between two parts, where the interpreter's sums of the parts before it disagree.

    Each part has one token of weight, not its first. Elsewhere sums round in other ways, so it is not for a device.
    """
    generator, parts = np.random.default_rng(3), 32
    while True:
        logits = -generator.random(parts, np.float32) * 2
        logits[0] = 0
        masses = np.exp(logits)
        running, exact = np.cumsum(masses), np.cumsum(np.exp(logits.astype(np.float64)))
        for part in range(8, parts - 1):  # sums of fewer than eight are those of a loop
            whole = np.sum(np.where(np.arange(parts) <= part, masses, np.float32(0)))
            number = running[part] / np.sum(masses)
            target = number * np.sum(masses)
            if running[part] <= target < whole and exact[part] <= float(number) * exact[-1]:
                return [_border(logits, masses, number)]


def _border(logits: np.ndarray, masses: np.ndarray, number: np.float32) -> Case:
    parts = len(logits)
    whole = np.full((parts, PART), -1000, np.float32)
    whole[:, 7] = logits
    state = np.zeros(16, np.int32)
    state[12:15] = 0, masses.sum().view(np.int32), -1
    known = draws.start(torch.from_numpy(whole.reshape(-1)), 1.0, 0, 1.0, float(number))
    given = {name: known[name] for name in ("logits", "control", "random", "tokens")}
    ids = np.arange(parts, dtype=np.int32) * PART + 7
    given |= {"values": logits, "ids": ids, "state": state, "above": masses, "equal": np.zeros(parts, np.float32)}
    return Case("sample", {"vocab": parts * PART, "context": 4}, values=given, note="between two parts")


def cases() -> list[Case]:
    """Return every case."""
    found = [
        *(Case("swiglu", {"width": width, "count": count}, n=3, r=2) for width, count in ((37, "n"), (1100, "r"))),
        Case("take_rows", {"width": 1030}, n=7, r=4),
        Case("take_rows", {"width": 30, "dtype": "float32"}, n=7, r=1),
        Case("scale", {"width": 1029, "factor": 0.37, "count": "r"}, r=3),
        Case("rms_norm", {"width": 100, "eps": 1e-5}, n=3),
        Case("rms_norm", {"width": 2304, "eps": 1e-6, "count": "r"}, r=2),
        Case("add_rms_norm", {"width": 100, "eps": 1e-5, "scale": 0.3}, n=5),
        Case("embedding", {"format": "dense", "rows": 9, "width": 50, "dtype": "bfloat16", "scale": 12.0}, n=4),
        Case("embedding", {"format": "dense", "rows": 9, "width": 1100, "dtype": "float32"}, n=4),
        Case("embedding", {"format": "int8", "rows": 9, "width": 96, "group": 32, "zeros": True}, n=4),
        Case("embedding", {"format": "int4", "rows": 9, "width": 160, "group": 32, "scale": 0.1}, n=4),
        Case("embedding", {"format": "ternary", "rows": 9, "width": 160, "scales": "bfloat16"}, n=4),
        Case("argmax_partial", {"vocab": 9001}),
        Case("argmax_partial", {"vocab": 5000}, values={"logits": [[1.0] * 4999 + [2.0]]}),
        Case("argmax_partial", {"vocab": 100}, values={"logits": [[0.0] * 30 + [5.0, 1.0, 5.0] + [0.0] * 67]}),
        Case("argmax", {"vocab": 9001}, position=4, values={"values": [1.0, 3.0, 3.0], "ids": [5, 4500, 8999]}),
        *(
            Case("argmax", {"vocab": 9001}, values={"values": values, "ids": [5, 4500, 8999]}, note=f"largest {values}")
            for values in ([1.0, NAN, 2.0], [1.0, INF, 2.0], [-INF, -INF, -INF], [-INF, -3.0, -INF])
        ),
        Case("argmax_partial", {"vocab": 5000}, values={"logits": [[1.0, NAN, 3.0] + [-INF] * 4997]}, note="NaN"),
    ]
    shape = {"heads": 3, "kv_heads": 1, "head_dim": 24, "context": 64}
    found += [
        Case("rope_append", shape, n=5, position=0),
        Case("rope_append", {**shape, "kv": "int8", "norm_eps": 1e-6}, n=3, position=30),
        Case("rope_append", {**shape, "nope": True, "head_dim": 64}, n=1, position=63),
    ]
    return [*found, *_linear(), *_attention(), *_sparse(), *_draws()]
