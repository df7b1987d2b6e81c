"""Measure the linear kernels against the machine's limits: ``python -m tests.benchmarks.kernels_linear --threads 2``.

Products with one token stream weights that no cache holds: figures are percent of the speed of a kernel that only reads
as many bytes. Products with many tokens are compared with the fastest loop of the same instruction on registers. Every
figure is the best of several rounds, interleaved, because other work only slows a machine down; with one thread its
processor time counts, not the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import tvm

from arkinfer.exporters.kernels.tir.isa import ISAS, Isa
from arkinfer.exporters.kernels.tir.linear_float import linear_float
from arkinfer.exporters.kernels.tir.linear_int8 import linear_int8
from arkinfer.exporters.kernels.tir.source import Source, fma, ramp, real
from arkinfer.targets.probe import isa_levels
from tests.kernels.linear.kernel_runner import aligned, compiled
from tests.kernels.linear.samples import Case, activations, sample

STREAMED = 160 << 20  # bytes of weights in rotation: several times the last-level cache


def best(run: Callable[[], object], threads: int) -> float:
    """Return the seconds of the fastest of a few calls."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = []
    for _ in range(3):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


def reading(isa: Isa, threads: int) -> Callable[[], float]:
    """Return a measurement of the bytes a second that all threads together can read from memory."""
    parts, chains = 256, 8
    source = Source("reading")
    source.buffer("data", ("parts", "lines", chains * 64), "uint8")
    source.buffer("out", ("parts", 64), "uint8")
    at = ramp("0", 64)
    with source.loop("part", "parts", "parallel"):
        sums = [source.local("sum", 64, "uint8") for _ in range(chains)]
        for name in sums:
            source.line(f"{name}[{at}] = T.Broadcast(T.uint8(0), 64)")
        with source.loop("line", "lines"):
            for index, name in enumerate(sums):
                line = f"data[part, line, {ramp(str(64 * index), 64)}]"
                source.line(f"{name}[{at}] = T.bitwise_xor({name}[{at}], {line})")
        total = sums[0] + f"[{at}]"
        for name in sums[1:]:
            total = f"T.bitwise_xor({total}, {name}[{at}])"
        source.line(f"out[part, {at}] = {total}")
    module = tvm.compile(tvm.IRModule({"reading": source.build()}), target=tvm.target.Target(dict(isa.target)))
    data = aligned(np.ones((parts, STREAMED // parts // (64 * chains), 64 * chains), np.uint8))
    out = aligned(np.zeros((parts, 64), np.uint8))
    return lambda: STREAMED / best(lambda: module["reading"](data, out), threads)


def peak(isa: Isa, integer: bool, threads: int) -> Callable[[], float]:
    """Return a measurement of the operations a second of one instruction, all threads together."""
    chains, rounds, lanes = 12, 20000, isa.lanes
    source = Source("peak")
    source.buffer("out", ("threads", chains * lanes), "int32" if integer else "float32")
    source.buffer("operand", (8 * lanes,), "uint8" if integer else "float32")
    at = ramp("0", lanes)
    with source.loop("thread", "threads", "parallel"):
        sums = [source.local("sum", lanes, "int32" if integer else "float32") for _ in range(chains)]
        size = 4 * lanes if integer else lanes
        a = source.let("a", f"operand[{ramp('0', size)}]")
        b = source.let("b", f"operand[{ramp(str(size), size)}]")
        if integer:
            b = source.let("b", f'T.reinterpret("int8x{size}", {b})')
        for name in sums:
            source.line(f"{name}[{at}] = " + (f"T.Broadcast(T.int32(0), {lanes})" if integer else real(0.0, lanes)))
        with source.loop("round", rounds):
            for name in sums:
                value = f"{name}[{at}]"
                source.line(f"{value} = " + (isa.dot(value, [(a, b)], 15) if integer else fma(a, b, value, lanes)))
        for index, name in enumerate(sums):
            source.line(f"out[thread, {ramp(str(index * lanes), lanes)}] = {name}[{at}]")
    module = tvm.compile(tvm.IRModule({"peak": source.build()}), target=tvm.target.Target(dict(isa.target)))
    kind = "int32" if integer else "float32"
    out = aligned(np.zeros((threads, chains * lanes), kind))
    operand = aligned(np.ones(8 * lanes, "uint8" if integer else "float32"))
    work = threads * chains * rounds * lanes * (8 if integer else 2)
    return lambda: work / best(lambda: module["peak"](out, operand), threads)


def product(
    isa: Isa, case: Case, tokens: int, builder: Callable[..., Any], threads: int
) -> tuple[Callable[[], float], int]:
    """Return a measurement of one product in seconds, and the bytes of its weight; weights rotate for one token."""
    form = "one" if tokens == 1 else "many"
    function = compiled(builder, isa.name, form, case.options)["main"]
    packed = sample(case).packed
    size = sum(part.nbytes for part in packed)
    copies = max(2, STREAMED // size) if tokens == 1 else 1
    weights = [[aligned(part) for part in packed] for _ in range(copies)]
    if builder is linear_int8:
        inputs = [aligned(part) for part in activations(case, tokens)[1]]
    else:
        inputs = [aligned(np.random.default_rng(0).standard_normal((tokens, case.width)).astype(np.float32))]
    y = aligned(np.zeros((tokens, case.columns), np.float32))

    def run() -> None:
        for weight in weights:
            function(*inputs, *weight, y)

    run()
    return lambda: best(run, threads) / copies, size


def zeros(isa: Isa, threads: int, rounds: int, only: str) -> None:
    """Print what zero points cost a product with one token: time with them to time without, measured in turn."""
    for format, group in [("int4", 32), ("int4", 64), ("int4", 128), ("int8", 128), ("int2", 64)]:
        for rows, width in [(4096, 4096), (14336, 4096)]:
            case = Case(format, group, width, rows)
            name = f"{isa.name} linear_int8 {case} tokens 1"
            if only not in name:
                continue
            without, size = product(isa, case, 1, linear_int8, threads)
            having, larger = product(isa, replace(case, zeros=True), 1, linear_int8, threads)
            ratios = sorted(having() / without() for _ in range(rounds))
            time_ratio = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            print(f"{name}: zeros take {time_ratio} of the time, {larger / size:.3f} of the bytes", flush=True)


def main() -> None:
    """Print one line a kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--zeros", action="store_true", help="compare weights with and without zero points instead")
    parser.add_argument("--only", default="", help="run lines whose text contains this")
    arguments = parser.parse_args()
    threads = arguments.threads
    os.environ.update(TVM_NUM_THREADS=str(threads), TVM_BIND_THREADS="0")  # read when the pool of threads starts
    formats = [("ternary", 64), ("ternary", 0), ("int4", 64), ("int4", 128), ("int8", 128)]
    for isa in (ISAS[name] for name in isa_levels()):
        if arguments.zeros:
            zeros(isa, threads, arguments.rounds, arguments.only)
            continue
        limits = {True: peak(isa, True, threads), False: peak(isa, False, threads), None: reading(isa, threads)}
        for builder, integer in ((linear_int8, True), (linear_float, False)):
            for format, group in formats if integer else [("ternary", 64), ("int4", 64)]:
                for rows, width in [(4096, 1024), (1024, 4096), (14336, 4096)]:
                    for tokens in (1, 128, 512):
                        case = Case(format, group, width, rows)
                        name = f"{isa.name} {builder.__name__} {case} tokens {tokens}"
                        if arguments.only not in name or rows * width * tokens > 1 << 31:
                            continue
                        measure, size = product(isa, case, tokens, builder, threads)
                        seconds, limit = 1e9, 0.0
                        for _ in range(arguments.rounds):
                            seconds = min(seconds, measure())
                            limit = max(limit, limits[None if tokens == 1 else integer]())
                        rate = size / seconds if tokens == 1 else 2 * rows * width * tokens / seconds
                        unit = "GB/s" if tokens == 1 else "Gop/s"
                        print(f"{name}: {rate / 1e9:.1f} {unit}, {rate / limit:.0%} of {limit / 1e9:.1f}", flush=True)


if __name__ == "__main__":
    main()
