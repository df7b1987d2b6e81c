"""The parts of a Program that MLC calls by themselves, and the memory that each takes. Needs neither torch nor TVM."""

from __future__ import annotations

import math
from dataclasses import replace

from arkinfer.exporters.program import Program

ATTENTION = "paged_attention"  # no kernel: a function of the runtime, that calls those of kernels/tir/paged.py
EMBED = ("embedding", "scale")  # the calls that make the function `embed`
_ITEM = {"float32": 4, "float16": 2, "int32": 4, "int8": 1}


def split(program: Program) -> tuple[Program, Program]:
    """Return the part from tokens to the first layer's input, and the rest, whose input is called ``hidden``."""
    count = next(index for index, call in enumerate(program.calls) if call.kernel not in EMBED)
    (hidden,) = program.calls[count - 1].outputs
    first = replace(program, calls=program.calls[:count], result=hidden.name, taps=[])
    tokens = [value for value in program.inputs if value.name == "tokens"]
    rows = [value for value in program.inputs if value.name == "rows"]
    return replace(first, inputs=tokens), replace(program, inputs=[hidden, *rows], calls=program.calls[count:])


def workspace(program: Program, tokens: int, rows: int) -> int:
    """Return the bytes of inner values that are needed at once for ``tokens`` tokens and logits of ``rows``."""
    extents = {"n": tokens, "r": rows}
    last = {name: index for index, call in enumerate(program.calls) for name in call.inputs}
    last[program.result] = len(program.calls)
    living: dict[str, int] = {}
    most = 0
    for index, call in enumerate(program.calls):
        for value in call.outputs:
            shape = [extents[extent] if isinstance(extent, str) else extent for extent in value.shape]
            living[value.name] = 0 if call.kernel == "reshape" else _ITEM[value.dtype] * math.prod(shape)
        for name in call.inputs:
            # A view keeps what it shows; it is charged to the view from here on.
            if call.kernel == "reshape" and last.get(name) == index:
                living[call.outputs[0].name] += living.get(str(name), 0)
        most = max(most, sum(living.values()))
        living = {name: size for name, size in living.items() if last.get(name, -1) > index}
    return most
