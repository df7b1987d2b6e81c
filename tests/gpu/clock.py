"""Time by CUDA events: the driver's for the backend, torch's for kernels and peers; the host's clock without a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from arkinfer.backends.cuda_driver import Driver


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def by_driver(driver: Driver, work: Callable[[], Any]) -> float:
    """Return the seconds between events before and after what ``work`` starts on the driver's stream."""
    first, last = driver.call("cuEventCreate", 0), driver.call("cuEventCreate", 0)
    driver.wait()
    driver.call("cuEventRecord", first, driver.stream)
    work()
    driver.call("cuEventRecord", last, driver.stream)
    driver.call("cuEventSynchronize", last)
    return float(driver.call("cuEventElapsedTime", first, last)) / 1e3


def by_torch(run: Callable[[int], object], launches: int = 16, repeats: int = 20, graph: bool = True) -> float:
    """Return the median time of ``run(i)``, over replays of a graph of ``launches`` of them.

    Launched one by one (not ``graph``), the host's part of a launch is timed too.
    """
    for index in range(launches):
        run(index)
    if device() == "cpu":
        return _by_host(run, launches, repeats)
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    if graph:
        with torch.cuda.graph(recorded):
            for index in range(launches):
                run(index)
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        if graph:
            recorded.replay()
        else:
            for index in range(launches):
                run(index)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / launches)
    return statistics.median(times)


def _by_host(run: Callable[[int], object], launches: int, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for index in range(launches):
            run(index)
        times.append((time.perf_counter() - start) / launches)
    return statistics.median(times)


def copy_bandwidth(nbytes: int = 1 << 30) -> float:
    """Return bytes per second read and written by a copy that no cache holds."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * nbytes / by_torch(lambda _: target.copy_(source), launches=4)


def matrix_peak(size: int = 8192) -> float:
    """Return the operations per second of torch's product of square float16 matrices of random numbers."""
    left, right = (torch.randn(size, size, device=device()).half() for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / by_torch(lambda _: torch.mm(left, right, out=out), launches=4, repeats=10)
