"""Time the CPU attention kernels at depth against what the machine could do at best.

    python -m tests.benchmarks.kernels_attention [--depth 32768] [--threads 2] [--kv float16] [--shape 0.5B]

Every kernel is run round-robin with the two yardsticks, a float32 matrix product and a read of memory, and the best of
all rounds counts: other work on the machine then hits all alike. With one thread its own CPU time is taken. The last
column is the yardsticks' time for the same work (the larger of arithmetic and memory) over the kernel's.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

SHAPES = {"0.5B": (16, 2, 64, 24), "8B": (32, 2, 128, 32)}  # heads, kv heads, head size, layers
BUDGET, LOCAL = 96, 32
STRIDES = {"fine": 16, "coarse": 64}


@dataclass(frozen=True)
class Job:
    """One thing to time: what it does per call, in floating-point operations and bytes read."""

    name: str
    run: Callable[[], Any]
    flops: float
    bytes: float


def jobs(shape: str, kv: str, depth: int, isa: str) -> list[Job]:
    """Return the kernels of one layer for one token and for a chunk of 64 at ``depth``."""
    import tvm

    from arkinfer.exporters.kernels import tir
    from arkinfer.exporters.kernels.tir.isa import ISAS

    heads, kv_heads, dim, _ = SHAPES[shape]
    layers, capacity = 4, depth + 64
    generator = np.random.default_rng(0)

    def tensor(extents: tuple[int, ...], dtype: str, size: float = 1) -> Any:
        made = tvm.runtime.empty(extents, dtype)
        values = np.resize(generator.standard_normal(1 << 20, np.float32) * size, extents)
        made.copyfrom(values.astype(dtype))
        return made

    def compile_kernel(name: str, tokens: str, options: dict[str, Any]) -> Any:
        function = tir.build(name, ISAS[isa], tokens, options).with_attr("global_symbol", "main")
        return tvm.compile(tvm.IRModule({"main": function}), target=tvm.target.Target(dict(ISAS[isa].target)))["main"]

    real = "float16" if kv == "int8" else kv
    caches = [
        tensor((layers, kv_heads, capacity // 16, dim, 16), kv, 30 if kv == "int8" else 1),
        tensor((layers, kv_heads, capacity, dim), kv, 30 if kv == "int8" else 1),
    ]
    if kv == "int8":
        caches += [tensor((layers, kv_heads, capacity), "float32", 0.03) for _ in range(2)]
    compressed = [
        tensor((layers, kv_heads, capacity // stride // 16 + 1, dim, 16), real, 0.3) for stride in STRIDES.values()
    ]
    common = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "kv": kv, "scale": dim**-0.5}
    attend = {**common, "block_size": 64, "budget": BUDGET}
    choose = {**attend, "kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "local_blocks": LOCAL}
    select = compile_kernel("select", "many", {**choose, "local_rule": "inclusive", "lse": "coarse"})
    item, real_item = np.dtype(kv).itemsize, np.dtype(real).itemsize
    turn = iter(range(1 << 60))  # another layer each time: nothing stays in the caches from the call before
    found = []
    for form, count in (("one", 1), ("many", 64)):
        attention = compile_kernel("attention", form, attend)
        start = depth - count
        q, out = tensor((count, heads, dim), "float32"), tensor((count, heads, dim), "float32")
        blocks = tvm.runtime.empty((count, kv_heads, BUDGET), "int32")

        def selecting(q: Any = q, start: int = start, blocks: Any = blocks) -> None:
            select(q, next(turn) % layers, start, 0, *compressed, blocks)

        def attending(
            gear: int, run: Any = attention, q: Any = q, start: int = start, more: Any = (blocks, out)
        ) -> None:
            run(q, more[0], next(turn) % layers, start, gear, *caches, more[1])

        selecting()
        kernels = sum(depth // stride for stride in STRIDES.values())
        row = kv_heads * dim
        chosen = min(depth, BUDGET * 64)
        rows = {
            "dense": (lambda run=attending: run(2**62), 4 * depth, 2 * depth * row * item),
            "sparse": (lambda run=attending: run(0), 4 * chosen, 2 * chosen * row * item),
            "select": (selecting, 2 * kernels, kernels * row * real_item),
        }
        for name, (run, flops, size) in rows.items():
            found.append(Job(f"{name} x{count}", run, float(flops * heads * dim * count), float(size)))
    return found


def yardsticks(threads: int) -> list[Job]:
    """Return a matrix product and a read of more memory than any cache holds."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    memory = torch.ones(1 << 26)
    return [
        Job("arithmetic", lambda: torch.mm(a, b), 2.0 * 768**3, 0.0),
        Job("memory", lambda: memory.sum(), 0.0, memory.numel() * 4.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv", default="float16", choices=["float32", "float16", "int8"])
    parser.add_argument("--shape", default="0.5B", choices=list(SHAPES))
    parser.add_argument("--isa", default="")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(arguments.threads)
    os.environ["TVM_BIND_THREADS"] = "0"
    from arkinfer.targets.probe import isa_levels

    isa = arguments.isa or isa_levels()[0]
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    timed = yardsticks(arguments.threads) + jobs(arguments.shape, arguments.kv, arguments.depth // 64 * 64, isa)
    best = {job.name: float("inf") for job in timed}
    for _ in range(arguments.rounds):
        for job in timed:
            for _ in range(3 if job.name.endswith("x1") else 1):
                begin = clock()
                job.run()
                best[job.name] = min(best[job.name], clock() - begin)
    peak, bandwidth = timed[0].flops / best["arithmetic"], timed[1].bytes / best["memory"]
    rows = []
    for job in timed[2:]:
        limit = max(job.flops / peak, job.bytes / bandwidth)
        rows.append(
            {"kernel": job.name, "ms": 1e3 * best[job.name], "limit_ms": 1e3 * limit, "ratio": limit / best[job.name]}
        )
    machine = {"isa": isa, "threads": arguments.threads, "gflops": peak / 1e9, "gb_s": bandwidth / 1e9}
    if arguments.json:
        print(json.dumps({"machine": machine, "shape": arguments.shape, "kv": arguments.kv, "rows": rows}))
        return
    print(f"{arguments.shape} {arguments.kv} depth {arguments.depth} {isa}, {arguments.threads} threads")
    print(f"yardsticks: {peak / 1e9:.0f} GFLOPS, {bandwidth / 1e9:.1f} GB/s")
    for entry in rows:
        print(
            f"{entry['kernel']:>12} {entry['ms']:9.3f} ms, at best {entry['limit_ms']:8.3f} ms, {entry['ratio']:5.0%}"
        )


if __name__ == "__main__":
    main()
