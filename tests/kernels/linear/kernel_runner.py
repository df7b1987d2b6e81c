"""Compile kernels and run them on numpy arrays: in process, or under qemu where this machine lacks their level."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm

from arkinfer.exporters.kernels.tir.isa import ISAS
from arkinfer.targets.probe import isa_levels
from tests.kernels.emulated import runner as emulated

# Read when the pool starts: threads that spin for work slow each other down where tests share few cores.
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")

RUNNABLE = [name for name in ISAS if name in isa_levels()]
EMULATED = emulated.LEVELS  # run by qemu, and compiled there: a handful of cases each


@functools.cache
def _compiled(builder: Callable[..., Any], isa: str, tokens: str, options: str) -> Any:
    kernel = builder(ISAS[isa], tokens, **json.loads(options)).with_attr("global_symbol", "main")
    if isa in EMULATED:
        return emulated.build(kernel, ISAS[isa])
    return tvm.compile(tvm.IRModule({"main": kernel}), target=tvm.target.Target(dict(ISAS[isa].target)))


def compiled(builder: Callable[..., Any], isa: str, tokens: str, options: Mapping[str, Any]) -> Any:
    """Return the compiled module of ``builder(isa, tokens, **options)``, its function named main.

    For levels that are emulated: the program that calls it.
    """
    return _compiled(builder, isa, tokens, json.dumps(options, sort_keys=True))


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
    garbage = [np.full(shape, 77, dtype) for shape, dtype in outputs]
    made = compiled(builder, isa, tokens, options)
    if isa in EMULATED:
        return emulated.call(made, isa, [*inputs, *garbage])[len(inputs) :]
    tensors = [aligned(array) for array in garbage]
    made["main"](*map(aligned, inputs), *tensors)
    return [tensor.numpy() for tensor in tensors]
