"""How fast the machine that a target describes is: by its file, or measured here without a compiler."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable

import numpy as np

from arkinfer.estimate import INT8_PER_FLOAT32, Factors, Rates
from arkinfer.targets import Target, probe

_SIZE, _COUNT = 64, 16  # of square matrices: they stay in the first caches, and numpy's BLAS runs them on one thread
_PART = 128 << 20  # bytes that each thread reads: more than its share of the caches

Run = Callable[[], object]


def rates(target: Target, factors: Factors, threads: int | None = None, seconds: float = 0.4) -> Rates:
    """Return the rates of ``target``; what its file leaves open is measured if this machine runs its code, else None.

    The read bandwidth is that of the C library's memchr and memcmp, as in targets.probe, and the float32 peak that of
    numpy's matrix product over the share that it reaches, on ``threads`` threads (default: one a core) together; int8
    is that times the ratio of the level's instructions. Of each thread its best run counts, in the time that the
    thread itself was running: on a busy machine that tells what an idle one would do better than the clock does. Both
    take about ``seconds`` together.
    """
    level = probe.level_for(target)
    bandwidth, int8, float32 = target.bandwidth, target.compute.get("int8"), target.compute.get("fp32")
    if level is None or level.startswith("sm_") or (bandwidth and int8 and float32):
        return Rates(bandwidth, int8, float32, "the target's file", target.compute.get("fp16"))
    count = threads or probe.cores()
    if bandwidth is None:
        bandwidth = _together(_reader, count, seconds / 2)
    float32 = float32 or _together(_product, count, seconds / 2) / factors.gemm_share
    return Rates(bandwidth, int8 or float32 * INT8_PER_FLOAT32[level], float32, f"measured here, {level}")


def _reader() -> tuple[int, list[Run]]:
    """Return the bytes that a run reads, and ways to read them: one stream, two streams."""
    data = np.ones(_PART, np.uint8)  # lives as long as the functions, which hold it
    library, base, half = ctypes.CDLL(None), data.ctypes.data, _PART // 2
    for function in (library.memchr, library.memcmp):
        function.restype = ctypes.c_void_p

    def one(held: np.ndarray = data) -> None:
        library.memchr(ctypes.c_void_p(base), ctypes.c_int(0), ctypes.c_size_t(_PART))

    def two(held: np.ndarray = data) -> None:
        library.memcmp(ctypes.c_void_p(base), ctypes.c_void_p(base + half), ctypes.c_size_t(half))

    return _PART, [one, two]


def _product() -> tuple[int, list[Run]]:
    """Return the operations of a run, and the run: products of small matrices."""
    a, b = np.ones((_COUNT, _SIZE, _SIZE), np.float32), np.ones((_SIZE, _SIZE), np.float32)
    out = np.empty_like(a)
    return 2 * a.size * _SIZE, [lambda: np.matmul(a, b, out=out)]


def _together(make: Callable[[], tuple[int, list[Run]]], threads: int, seconds: float) -> float:
    """Return the units a second that ``threads`` threads do together, each with work of its own from ``make``."""
    best = [0.0] * threads
    ready = threading.Barrier(threads)

    def work(index: int) -> None:
        amount, runs = make()
        ready.wait()
        stop = time.monotonic() + seconds
        while not best[index] or time.monotonic() < stop:
            for run in runs:
                begin = time.thread_time()
                run()
                taken = time.thread_time() - begin
                best[index] = max(best[index], amount / taken if taken else 0.0)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(best)
