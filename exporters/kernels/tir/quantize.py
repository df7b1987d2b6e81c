"""Rounding of activations to int8, per token and activation group, as arkinfer.ops.linear defines it.

Static in a kernel: grouping, order. Symbolic: tokens and width. A token is the work of one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.layout import Grouping
from arkinfer.exporters.kernels.tir.source import (
    Source,
    bits,
    cast,
    index,
    integer,
    intrinsic,
    ramp,
    real,
    splat,
    swiglu,
)

WIDTH = 16  # lanes of elementwise code; a narrower machine takes two or four registers for them

Value = Callable[[str, int], str]  # (index of the first input, lanes) -> float32 text


def declare_outputs(source: Source, n: int | str) -> None:
    """Declare what every quantising kernel writes: xq (n, Kp) int8, xs (n, A) float32, xsum (n, S) int32."""
    source.buffer("xq", (n, "Kp"), "int8")
    source.buffer("xs", (n, "A"), "float32")
    source.buffer("xsum", (n, "S"), "int32")


@contextmanager
def each_token(source: Source, tokens: str) -> Iterator[str]:
    """Open the loop over tokens and give the row's name; one token stays on the calling thread."""
    if tokens == "one":
        yield "0"
        return
    with source.loop("row", "n", "parallel"):
        yield "row"


def round_row(source: Source, groups: Grouping, row: str, value: Value) -> None:
    """Emit the rounding of token ``row``: value(k, lanes) is the text of its inputs from ``k`` on.

    scale = max|x| / 127, code = round-half-even(x / scale); both 0 for a group of zeros.
    """
    size = groups.activation
    if size % WIDTH or groups.per_activation > 1:
        _round_slowly(source, groups, row, value)
        return
    # Outside the loop over groups: an array of 1 KiB or more is allocated where it is declared.
    values = source.local("values", size, "float32")
    largest = source.local("largest", WIDTH, "float32")
    total = source.local("total", WIDTH, "int32")
    at = ramp("0", WIDTH)
    with source.loop("group", "A"):
        source.line(f"{largest}[{at}] = {real(0.0, WIDTH)}")
        with source.loop("j", size // WIDTH):
            v = source.let("v", value(f"group * {size} + j * {WIDTH}", WIDTH))
            source.line(f"{values}[{ramp(f'j * {WIDTH}', WIDTH)}] = {v}")
            source.line(f"{largest}[{at}] = T.max({largest}[{at}], T.abs({v}))")
        # The bits of floats without sign order as integers do.
        whole = bits(f"int32x{WIDTH}", f"{largest}[{at}]")
        most = bits("float32", intrinsic("int32", "llvm.vector.reduce.smax", whole))
        divisor = splat(_scale(source, row, most), WIDTH)
        source.line(f"{total}[{at}] = {integer(0, WIDTH)}")
        with source.loop("j", size // WIDTH):
            quotient = f"{values}[{ramp(f'j * {WIDTH}', WIDTH)}] / {divisor}"
            code = source.let("code", cast(f"int32x{WIDTH}", intrinsic(f"float32x{WIDTH}", "llvm.rint", quotient)))
            source.line(f"xq[{row}, {ramp(f'group * {size} + j * {WIDTH}', WIDTH)}] = {cast(f'int8x{WIDTH}', code)}")
            source.line(f"{total}[{at}] = {total}[{at}] + {code}")
        source.line(f"xsum[{row}, group] = {intrinsic('int32', 'llvm.vector.reduce.add', f'{total}[{at}]')}")


def _scale(source: Source, row: str, most: str) -> str:
    """Store the scale of the largest magnitude ``most``; return what to divide by."""
    scale = source.let("scale", f"{most} / {real(127.0)}")
    source.line(f"xs[{row}, group] = {scale}")
    return source.let("divisor", f"T.Select({scale} == {real(0.0)}, {real(1.0)}, {scale})")


def _round_slowly(source: Source, groups: Grouping, row: str, value: Value) -> None:
    """Emit the rounding of a row in groups of any size, element by element."""
    largest = source.local("largest", 1, "float32")
    total = source.local("total", 1, "int32")
    with source.loop("group", "A"):
        source.line(f"{largest}[0] = {real(0.0)}")
        with source.loop("k", groups.activation):
            source.line(f"{largest}[0] = T.max({largest}[0], T.abs({value(f'group * {groups.activation} + k', 1)}))")
        divisor = _scale(source, row, f"{largest}[0]")
        with source.loop("part", groups.per_activation):
            segment = source.let("segment", f"group * {groups.per_activation} + part")
            source.line(f"{total}[0] = 0")
            with source.loop("j", groups.segment):
                v = value(f"{segment} * {groups.segment} + j", 1)
                code = source.let("code", cast("int32", intrinsic("float32", "llvm.rint", f"{v} / {divisor}")))
                source.line(f"xq[{row}, {segment} * {groups.padded} + j] = {cast('int8', code)}")
                source.line(f"{total}[0] = {total}[0] + {code}")
            with source.loop("j", groups.padded - groups.segment):
                source.line(f"xq[{row}, {segment} * {groups.padded} + {groups.segment} + j] = T.int8(0)")
            source.line(f"xsum[{row}, {segment}] = {total}[0]")


def quantize(isa: Isa, tokens: str, *, groups: Mapping[str, int], order: bool = False) -> Any:
    """Return the PrimFunc ``(x[, order], xq, xs, xsum)``; ``groups`` are the fields of a ``layout.Grouping``.

    x (n, K) float32; order (K,) int32: input k of the result is x[order[k]]. xq (n, S * padded) int8 with each segment
    padded by zeros, xs (n, A) float32, xsum (n, S) int32: the sum of the codes of each segment.
    """
    source = Source("quantize")
    n = 1 if tokens == "one" else "n"
    source.buffer("x", (n, "K"), "float32")
    if order:
        source.buffer("order", ("K",), "int32")
    declare_outputs(source, n)
    with each_token(source, tokens) as row:
        round_row(
            source,
            Grouping(**groups),
            row,
            lambda k, lanes: f"x[{row}, order[{index(k, lanes)}]]" if order else f"x[{row}, {index(k, lanes)}]",
        )
    return source.build()


def swiglu_quantize(isa: Isa, tokens: str, *, groups: Mapping[str, int]) -> Any:
    """Return the PrimFunc ``(gate_up, xq, xs, xsum)``: ``quantize`` of silu(gate) * up.

    gate_up (n, 2 K) float32, the gate first; outputs as those of ``quantize``.
    """
    source = Source("swiglu_quantize")
    n = 1 if tokens == "one" else "n"
    source.buffer("gate_up", (n, "K2"), "float32")
    declare_outputs(source, n)
    with each_token(source, tokens) as row:

        def value(k: str, lanes: int) -> str:
            up = f"gate_up[{row}, {index(f'K2 // 2 + {k}', lanes)}]"
            return swiglu(source, f"gate_up[{row}, {index(k, lanes)}]", up, lanes)

        round_row(source, Grouping(**groups), row, value)
    return source.build()
