"""Kernels for aarch64, each linked with a driver into a program that qemu runs."""

from __future__ import annotations

import functools
import itertools
import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from arkinfer.exporters import emulator, linker
from arkinfer.exporters.kernels.tir.isa import ISAS, Isa
from arkinfer.exporters.platforms import PLATFORMS

LEVELS = [name for name in ISAS if name in emulator.PROCESSORS]
PLATFORM = PLATFORMS["linux-aarch64"]
_numbers = itertools.count()
_CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's type codes by numpy's kinds


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="arkinfer-kernels-")  # removed when the process ends


@functools.cache
def _driver() -> Path:
    out = Path(_folder().name) / "driver.o"
    headers = [Path(tvm_ffi.__file__).parent / "include", Path(tvm.__file__).parent / "include"]
    flags = ["-O2", "-g0", "-ffreestanding", "-fno-builtin", "-fno-stack-protector", "-fno-sanitize=all", "-Wall"]
    includes = [f"-I{folder}" for folder in headers]
    source = Path(__file__).with_name("driver.c")
    linker.zig("cc", "-target", "aarch64-linux-musl", *flags, *includes, "-c", str(source), "-o", str(out))
    return out


def build(kernel: Any, isa: Isa) -> Path:
    """Compile the PrimFunc ``kernel`` for ``isa`` and return the program that calls it; beside it lies its assembly."""
    target = tvm.target.Target({**isa.target, "mtriple": PLATFORM.triple})
    # The pass finds nothing to compact here and takes a fifth of the time.
    with tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"]):
        compiled = tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), target=target)
    name = f"kernel{next(_numbers)}"
    item, out = (Path(_folder().name) / f"{name}{suffix}" for suffix in (".o", ""))
    compiled.mod.write_to_file(str(item))
    out.with_suffix(".s").write_text(compiled.mod.inspect_source("s"))
    linker.zig("ld.lld", "-m", "aarch64linux", "-static", "-o", str(out), str(_driver()), str(item))
    return out


def call(program: Path, level: str, arguments: Sequence[np.ndarray | int]) -> list[np.ndarray]:
    """Run ``program`` on a processor of ``level``; return what its tensors hold then, in order."""
    result = attempt(program, emulator.PROCESSORS[level], arguments)
    assert result.returncode == 0, f"{level}: exit status {result.returncode}: {result.stderr.decode()}"
    values, start = [], 0
    for array in (argument for argument in arguments if isinstance(argument, np.ndarray)):
        values.append(np.frombuffer(result.stdout, array.dtype, array.size, start).reshape(array.shape))
        start += array.nbytes
    assert start == len(result.stdout)
    return values


def attempt(program: Path, processor: str, arguments: Sequence[np.ndarray | int]) -> subprocess.CompletedProcess[bytes]:
    """Run ``program`` on a ``processor`` of qemu's names, whatever comes of it."""
    message = [struct.pack("<i", len(arguments))]
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            kind = argument.dtype
            message.append(struct.pack("<3i", _CODES[kind.kind], 8 * kind.itemsize, argument.ndim))
            message.append(struct.pack(f"<{argument.ndim}q", *argument.shape))
            message.append(np.ascontiguousarray(argument).tobytes())
        else:
            message.append(struct.pack("<3iq", 0, 0, 0, argument))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QEMU_")}
    command = [*emulator.command(processor), str(program)]
    return subprocess.run(command, input=b"".join(message), capture_output=True, env=environment, check=False)
