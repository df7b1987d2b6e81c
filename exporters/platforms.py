"""The systems that compiled code is linked for: their triples, file names, and what their loaders ask of a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from arkinfer.targets import Target


@dataclass(frozen=True)
class Platform:
    """One operating system on one architecture.

    ``machine`` is the architecture as LLVM names it; ``triple`` is LLVM's, ``zig`` that of `zig cc -target`: for iOS
    both name macOS, see macho.py. ``suffix`` is that of a shared library. ``page`` is the largest page in bytes that a
    loader may use. ``glibc`` is the oldest C library that code may need ("2.28"), empty
    where there is none. ``needed`` are the libraries that a shared library must name because the system's linker finds
    no symbol otherwise.
    """

    name: str
    system: str  # "linux", "android", "macos" or "ios"
    machine: str
    triple: str
    zig: str
    suffix: str
    page: int
    glibc: str = ""
    needed: tuple[str, ...] = ()


_GLIBC = "2.28"  # that of the wheels of apache-tvm: Debian 10, Ubuntu 18.10, RHEL 8
_MACOS = ("arm64-apple-macosx11.0.0", "aarch64-macos.11.0")

PLATFORMS: Mapping[str, Platform] = {
    platform.name: platform
    for platform in (
        Platform("linux-x86_64", "linux", "x86_64", "x86_64-linux-gnu", "x86_64-linux-gnu", ".so", 4096, _GLIBC),
        # 64 KiB pages: kernels of RHEL and Debian offer them.
        Platform("linux-aarch64", "linux", "aarch64", "aarch64-linux-gnu", "aarch64-linux-gnu", ".so", 65536, _GLIBC),
        Platform(
            "android-aarch64",
            "android",
            "aarch64",
            "aarch64-linux-android",
            "aarch64-linux-android",
            ".so",
            16384,
            needed=("libc.so", "libm.so"),
        ),
        Platform("macos-arm64", "macos", "aarch64", *_MACOS, ".dylib", 16384),
        Platform("ios-arm64", "ios", "aarch64", *_MACOS, ".dylib", 16384),
    )
}


def find(name: str, glibc: str = "") -> Platform:
    """Return the platform called ``name``, for that version of the C library where it has one."""
    found = PLATFORMS[name]
    if not found.glibc:
        return found
    glibc = glibc or found.glibc
    return replace(found, glibc=glibc, zig=f"{found.zig}.{glibc}")


def of(target: Target) -> Platform:
    """Return what ``target`` is linked for."""
    return find(name_of(target.arch, target.platform), target.glibc or "")


def name_of(levels: Sequence[str], stated: str | None) -> str:
    """Return the platform that a target's file states, or else Linux on the architecture of its ``levels``."""
    return stated or f"linux-{'aarch64' if levels[0].startswith('aarch64') else 'x86_64'}"
