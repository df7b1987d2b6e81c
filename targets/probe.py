"""What this machine is: instruction set levels, cores, memory, and how fast memory can be read."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arkinfer.targets.schema import Target

# Level name -> features, by /proc/cpuinfo's names, that a processor needs for code of that level. The best first.
LEVELS: Mapping[str, tuple[str, ...]] = {
    "x86-64-v4-vnni": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"),
    "x86-64-v3": ("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"),
    "aarch64-i8mm": ("asimd", "asimddp", "fphp", "asimdhp", "i8mm"),
    "aarch64-dotprod": ("asimd", "asimddp", "fphp", "asimdhp"),
}
# The same features as macOS names them in hw.optional.arm.
_APPLE = {"asimddp": "FEAT_DotProd", "fphp": "FEAT_FP16", "asimdhp": "FEAT_FP16", "i8mm": "FEAT_I8MM"}
_JETPACK: Mapping[str, str] = {"35": "5", "36": "6", "38": "7", "39": "7"}  # release of L4T -> of JetPack
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine: processor name, architecture, usable levels (best first), usable cores, memory in bytes."""

    processor: str
    architecture: str
    levels: tuple[str, ...]
    cores: int
    memory: int
    available: int

    def to_dict(self) -> dict[str, Any]:
        """Return the machine as plain JSON values."""
        return {**asdict(self), "levels": list(self.levels)}


def machine() -> Machine:
    """Return what this machine is now; ``available`` memory changes from call to call."""
    memory = _meminfo()
    return Machine(
        processor=_cpuinfo().get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        levels=isa_levels(),
        cores=cores(),
        memory=memory.get("MemTotal", 0),
        available=min(memory.get("MemAvailable", 0), _control_group_limit()),
    )


def isa_levels() -> tuple[str, ...]:
    """Return the names of the levels that this processor can run, the best first."""
    text = _cpuinfo()
    return levels_of(frozenset((text.get("flags") or text.get("Features") or "").split()) | _apple_features())


def levels_of(features: frozenset[str]) -> tuple[str, ...]:
    """Return the levels that a processor with these features can run, the best first."""
    return tuple(name for name, needs in LEVELS.items() if features.issuperset(needs))


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def level_for(target: Target) -> str | None:
    """Return the level of ``target`` that this machine would run, or None if it can run none."""
    return usable(target.arch, target.platform)


def system() -> str:
    """Return what the names of platforms begin with on this system; an Android that runs Python calls itself Linux."""
    name = "android" if hasattr(sys, "getandroidapilevel") else platform.system().lower()
    return {"darwin": "macos"}.get(name, name)


def usable(levels: Sequence[str], platform: str | None = None) -> str | None:
    """Return the first of ``levels``, of processors or GPUs, that this machine can run, or None.

    Code for processors also needs the system that it is linked for: ``platform``, None for Linux.
    """
    here = isa_levels() if (platform or "linux").partition("-")[0] == system() else ()
    if any(level.startswith("sm_") for level in levels) and (device := gpu()) is not None:
        here += (device.level,)
    return next((level for level in levels if level in here), None)


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first NVIDIA GPU: name, level ("sm_89"), memory in bytes, the CUDA version that its driver speaks."""

    name: str
    level: str
    memory: int
    cuda: str


def cuda_driver() -> ctypes.CDLL | None:
    """Return the library of NVIDIA's driver, or None where it is not installed."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def gpu() -> Gpu | None:
    """Return the first GPU as its driver describes it, or None without a driver or a GPU; nothing is allocated."""
    driver = cuda_driver()
    if driver is None:
        return None
    count, device, version, major, minor = (ctypes.c_int() for _ in range(5))
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(128)
    calls: tuple[Callable[[], int], ...] = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGetCount(ctypes.byref(count)),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDriverGetVersion(ctypes.byref(version)),
        lambda: driver.cuDeviceGetName(name, len(name), device),
        lambda: driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY[0], device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY[1], device),
    )
    if any(call() for call in calls):  # each returns 0 where it succeeds; no device is an error of cuDeviceGet
        return None
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(errors="replace"), f"sm_{major.value}{minor.value}", memory.value, cuda)


def measure_read_bandwidth(threads: int | None = None, seconds: float = 1.0, size: int = 256 << 20) -> float:
    """Return how fast ``threads`` (default: all cores) can read memory together, in bytes/s.

    Method: ``size`` bytes, far more than the caches hold and touched beforehand, are divided among the threads; the C
    library's memchr looks in each part for a byte that is not there, and memcmp compares each part's halves, which are
    equal. Both read every byte once with the widest loads that the processor has and do next to nothing else, along one
    and two streams; which is faster depends on the machine. A round lasts from the common start to the end of the
    slowest thread. Rounds repeat for about ``seconds``; the fastest counts, because a limit is what the machine can do
    and other work only slows it down.
    """
    count = threads or cores()
    library = ctypes.CDLL(None)
    for function in (library.memchr, library.memcmp):
        function.restype = ctypes.c_void_p
    part = size // count // 4096 * 4096
    buffer = ctypes.create_string_buffer(part * count)
    base = ctypes.addressof(buffer)
    ctypes.memset(base, 1, part * count)

    def one_stream(start: int) -> None:
        library.memchr(ctypes.c_void_p(start), ctypes.c_int(0), ctypes.c_size_t(part))

    def two_streams(start: int) -> None:
        half = part // 2
        library.memcmp(ctypes.c_void_p(start), ctypes.c_void_p(start + half), ctypes.c_size_t(half))

    best = 0.0
    stop = time.monotonic() + seconds
    while True:
        for read in (one_stream, two_streams):
            best = max(best, part * count / _round(read, [base + index * part for index in range(count)]))
        if time.monotonic() >= stop:
            return best


def _round(read: Any, starts: list[int]) -> float:
    """Return the seconds from the common start of ``read`` over all ``starts`` to the end of the slowest."""
    ready = threading.Barrier(len(starts))
    times: list[tuple[float, float]] = []

    def work(start: int) -> None:
        ready.wait()
        begin = time.perf_counter()
        read(start)
        times.append((begin, time.perf_counter()))

    threads = [threading.Thread(target=work, args=(start,)) for start in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in times) - min(begin for begin, _ in times)


@cache
def _apple_features() -> frozenset[str]:
    """Return what macOS says of an Apple processor, by the names of /proc/cpuinfo; empty on other systems."""
    if platform.system() != "Darwin":
        return frozenset()
    query = getattr(ctypes.CDLL(None), "sysctlbyname", None)
    found = {"asimd"}
    for name, key in _APPLE.items():
        value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        asked = (f"hw.optional.arm.{key}".encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
        if query is not None and query(*asked) == 0 and value.value:
            found.add(name)
    return frozenset(found)


@cache
def _cpuinfo() -> Mapping[str, str]:
    """Return the first processor's entries of /proc/cpuinfo; empty where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _meminfo() -> Mapping[str, int]:
    """Return /proc/meminfo in bytes."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[1].isdigit()}


def _control_group_limit() -> int:
    """Return how many more bytes this process's control group allows; a container sees the host's meminfo."""
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        return max(0, int(limit) - used)
    except (OSError, ValueError):  # no control group, version 1, or "max"
        return 1 << 62


def jetson() -> str | None:
    """Return the release of a Jetson's system, such as "L4T 36.4.3 (JetPack 6)", or None on other machines."""
    try:
        text = Path("/etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.match(r"# R([0-9]+) \(release\), REVISION: ([0-9.]+)", text)
    if match is None:
        return "L4T of an unknown release"
    jetpack = _JETPACK.get(match[1])
    return f"L4T {match[1]}.{match[2]}" + (f" (JetPack {jetpack})" if jetpack else "")
