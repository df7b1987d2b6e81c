"""Compile kernels in process and run them on numpy arrays."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm

from arkinfer.exporters.kernels.tir.isa import AARCH64_DOTPROD, ISAS, Isa
from arkinfer.exporters.kernels.tir.source import add, bits, integer
from arkinfer.targets.probe import isa_levels

# Read when the pool starts: threads that spin for work slow each other down where tests share few cores.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")

RUNNABLE = [name for name in ISAS if name in isa_levels()]


class _Arithmetic(Isa):
    """A level of 4 lanes whose dot product is spelled out: what kernels do around that of aarch64, run anywhere."""

    def dot(self, accumulator: str, pairs: Sequence[tuple[str, str]], limit: int) -> str:
        def signed(value: str, place: int) -> str:
            moved = f"T.shift_left({bits('int32x4', value)}, {integer(24 - 8 * place, 4)})"
            return f"T.shift_right({moved}, {integer(24, 4)})"

        products = [f"{signed(codes, place)} * {signed(x, place)}" for codes, x in pairs for place in range(4)]
        return add(accumulator, *products)


EMULATED = "aarch64-arithmetic"
_LEVELS = {**ISAS, EMULATED: _Arithmetic(**{**vars(AARCH64_DOTPROD), "name": EMULATED, "target": {"kind": "llvm"}})}


@functools.cache
def _compiled(builder: Callable[..., Any], isa: str, tokens: str, options: str) -> Any:
    kernel = builder(_LEVELS[isa], tokens, **json.loads(options)).with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": kernel}), target=tvm.target.Target(dict(_LEVELS[isa].target)))


def compiled(builder: Callable[..., Any], isa: Isa, tokens: str, options: Mapping[str, Any]) -> Any:
    """Return the compiled module of ``builder(isa, tokens, **options)``, its function named main."""
    return _compiled(builder, isa.name, tokens, json.dumps(options, sort_keys=True))


def aligned(array: np.ndarray) -> Any:
    """Return a tvm tensor with the contents of ``array``; tvm aligns it to 64 bytes."""
    tensor = tvm.runtime.empty(array.shape, str(array.dtype))
    tensor.copyfrom(np.ascontiguousarray(array))
    return tensor


def run(
    builder: Callable[..., Any],
    isa: str,
    tokens: str,
    options: Mapping[str, Any],
    inputs: Sequence[np.ndarray],
    outputs: Sequence[tuple[tuple[int, ...], str]],
) -> list[np.ndarray]:
    """Run a kernel and return its outputs, which start out as garbage."""
    made = [aligned(np.full(shape, 77, dtype)) for shape, dtype in outputs]
    compiled(builder, _LEVELS[isa], tokens, options)["main"](*map(aligned, inputs), *made)
    return [tensor.numpy() for tensor in made]
