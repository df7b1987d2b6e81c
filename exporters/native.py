"""What an artifact holds for programs without Python: the runner, compiled, and the program as the runner reads it.

The runner is the C code in backends/native. It calls the kernels of the compiled libraries by name, so that one library
serves it and TVM's runtime alike.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arkinfer.artifact import tensors
from arkinfer.exporters import compiled, linker
from arkinfer.exporters.platforms import Platform
from arkinfer.exporters.program import Call, Extent, Program, Value

FORMAT = 1  # of payload/native.json; the runner refuses any other
BLOCK = 64  # capacities are whole attention blocks
SOURCES = Path(__file__).parent.parent / "backends" / "native"  # beside this folder, installed or not
FOLDER = "payload/native"
COMMAND = "arkrun"
Names = Mapping[str, Sequence[str | None]]  # kernels by form: see relax.module


def describe(
    program: Program,
    plan: Mapping[str, Any],
    specs: Mapping[str, tensors.TensorSpec],
    levels: Mapping[str, tuple[str, Names]],
) -> dict[str, Any]:
    """Return payload/native.json: ``program`` over numbered values, for a runner that knows no names.

    ``plan`` is payload/plan.json, ``specs`` the tensors of the weight file in their order. ``levels`` gives the library
    and its kernels' names for each instruction set level, the preferred first.
    """
    offsets = _offsets(specs)
    table = _Values(program, offsets)
    kernels = {_key(call): index for index, call in enumerate(_distinct(program))}
    calls = [
        [kernels[_key(call)], *(table.argument(item) for item in call.inputs), *map(table.place, call.outputs)]
        for call in program.calls
        if call.kernel != "reshape" or table.alias(call)
    ]
    sparse = plan["sparse"]
    rope = plan["rope"]
    return {
        "format": FORMAT,
        "vocabulary": plan["vocab_size"],
        "context": plan["max_context"],
        "block": BLOCK,
        "weights": plan["weights"],
        "dense_len": sparse["dense_len"] if sparse is not None else None,
        "rope": {
            "frequencies": [_bits(value) for value in rope["inverse_frequencies"]],
            "magnitude": _bits(rope["magnitude"]),
        },
        "values": table.entries,
        "caches": [[cache["stride"], cache["pack"]] for cache in plan["caches"]],
        "result": table.numbers[program.result],
        "calls": calls,
        "levels": [{"name": level, "library": library, **names} for level, (library, names) in levels.items()],
    }


class _Values:
    """Numbers for the names of a program: inputs, caches, parameters, then what calls make, in their order."""

    def __init__(self, program: Program, offsets: Mapping[str, int]) -> None:
        self._program, self._offsets = program, offsets
        self._growing = {extent for value in program.caches for extent in value.shape if isinstance(extent, str)}
        self.entries: list[list[Any]] = []  # dtype, extents, number of the value that it is a view of, offset
        self.numbers: dict[str, int] = {}
        for value in (*program.inputs, *program.caches, *program.parameters):
            self._add(value)

    def argument(self, item: str | int) -> str:
        """Return what stands for an argument: c and a constant, s and the number of a scalar, v and that of a value."""
        if isinstance(item, int):
            return f"c{item}"
        scalars = self._program.scalars
        return f"s{scalars.index(item)}" if item in scalars else f"v{self.numbers[item]}"

    def place(self, value: Value) -> str:
        """Return the argument for an output, numbering it."""
        self._add(value)
        return self.argument(value.name)

    def alias(self, call: Call) -> bool:
        """Number the output of a view and return False: it is no call."""
        (output,) = call.outputs
        self._add(output, self.numbers[str(call.inputs[0])])
        return False

    def _add(self, value: Value, alias: int = -1) -> None:
        self.numbers[value.name] = len(self.entries)
        extents = [self._extent(extent) for extent in value.shape]
        self.entries.append([value.dtype, extents, alias, self._offsets.get(value.name, -1)])

    def _extent(self, extent: Extent) -> Extent:
        return "g" if extent in self._growing else extent


def _key(call: Call) -> str:
    return json.dumps([call.kernel, call.options], sort_keys=True)


def _distinct(program: Program) -> list[Call]:
    return [Call(kernel, options, ()) for kernel, options in program.kernels()]


def _offsets(specs: Mapping[str, tensors.TensorSpec]) -> dict[str, int]:
    """Return where each tensor begins in the file: where the one before it ends, its gap included."""
    start, ends = tensors.header(specs)
    return dict(zip(ends, [len(start), *ends.values()], strict=False))


def _bits(value: str) -> int:
    """Return the bits of a float32 in float.hex's spelling."""
    return int(np.float32(float.fromhex(value)).view(np.uint32))


def export(
    program: Program,
    plan: Mapping[str, Any],
    specs: Mapping[str, tensors.TensorSpec],
    levels: Mapping[str, tuple[str, Names]],
    platform: Platform,
    path: Callable[[str], Path],
) -> None:
    """Write payload/native.json and, in payload/native, the runner's library, header and, on Linux, its command."""
    text = json.dumps(describe(program, plan, specs, levels), sort_keys=True, separators=(",", ":"))
    path("payload/native.json").write_text(text + "\n", encoding="utf-8")
    path(f"{FOLDER}/arkinfer.h").write_bytes((SOURCES / "arkinfer.h").read_bytes())
    for name in files(platform):
        fetch(platform, name, path(f"{FOLDER}/{name}"))


def files(platform: Platform) -> list[str]:
    """Return the names of what is compiled from the runner's sources for ``platform``."""
    return [f"libarkinfer{platform.suffix}", *([COMMAND] if platform.system == "linux" else [])]


def fetch(platform: Platform, name: str, out: Path) -> None:
    """Copy one of ``files(platform)`` from the cache of compiled code, or compile it."""
    key = _cached(platform, name)
    if not compiled.fetch(key, out, ".native"):
        build(platform, name, out)
        compiled.keep(key, out, ".native")
    out.chmod(0o755)


def build(platform: Platform, name: str, out: Path) -> None:
    """Compile one of ``files(platform)``. The same sources give the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        item = Path(folder) / "runner.o"
        sources = [file for file in sorted(SOURCES.glob("*.c")) if not file.stem.startswith(COMMAND) or name == COMMAND]
        linker.compile_c(platform, sources, item, "-fvisibility=hidden", "-ffp-contract=off")
        linker.link_c(platform, item, out, program=name == COMMAND)


def _cached(platform: Platform, name: str) -> str:
    digest = hashlib.sha256(repr((platform, name, linker.version())).encode())
    own = [Path(__file__).with_name(name) for name in ("linker.py", "macho.py", "native.py")]
    for file in sorted([*SOURCES.glob("*.[ch]"), *own]):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
