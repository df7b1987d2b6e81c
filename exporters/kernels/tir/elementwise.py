"""Kernels without reductions: swiglu, scaling by a constant, joining, picking rows or columns, changing shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.quantize import WIDTH, each_token
from arkinfer.exporters.kernels.tir.source import Source, fill, index, real, swiglu


def sweep(source: Source, extent: str, emit: Callable[[str, int], None]) -> None:
    """Emit ``emit(start, lanes)`` over 0..extent: vectors of 16, then what is left element by element."""
    with source.loop("k", f"{extent} // {WIDTH}"):
        emit(f"k * {WIDTH}", WIDTH)
    with source.loop("k", f"{extent} % {WIDTH}"):
        emit(f"({extent} // {WIDTH} * {WIDTH} + k)", 1)


def swiglu_float(isa: Isa, tokens: str) -> Any:
    """Return the PrimFunc ``(gate_up, y)``: y (n, K) = silu(gate) * up for gate_up (n, 2 K), gate first; float32."""
    source = Source("swiglu")
    n = 1 if tokens == "one" else "n"
    source.buffer("gate_up", (n, "K2"), "float32")
    source.buffer("y", (n, "K"), "float32")
    with each_token(source, tokens) as row:

        def emit(k: str, lanes: int) -> None:
            up = f"gate_up[{row}, {index(f'K + {k}', lanes)}]"
            source.line(
                f"y[{row}, {index(k, lanes)}] = {swiglu(source, f'gate_up[{row}, {index(k, lanes)}]', up, lanes)}"
            )

        sweep(source, "K", emit)
    return source.build()


def scale(isa: Isa, tokens: str, *, factor: float) -> Any:
    """Return the PrimFunc ``(x, y)``: y (n, K) = factor * x (n, K), float32."""
    source = Source("scale")
    n = 1 if tokens == "one" else "n"
    source.buffer("x", (n, "K"), "float32")
    source.buffer("y", (n, "K"), "float32")
    with each_token(source, tokens) as row:

        def emit(k: str, lanes: int) -> None:
            source.line(f"y[{row}, {index(k, lanes)}] = x[{row}, {index(k, lanes)}] * {fill(real(factor), lanes)}")

        sweep(source, "K", emit)
    return source.build()


def concatenate(isa: Isa, tokens: str, *, widths: Sequence[int]) -> Any:
    """Return the PrimFunc ``(x0, x1, ..., y)``: y (n, sum of widths) holds each xi (n, widths[i]) in turn; float32."""
    source = Source("concatenate")
    n = 1 if tokens == "one" else "n"
    for number, width in enumerate(widths):
        source.buffer(f"x{number}", (n, width), "float32")
    source.buffer("y", (n, sum(widths)), "float32")
    with each_token(source, tokens) as row:
        start = 0
        for number, width in enumerate(widths):

            def emit(k: str, lanes: int, number: int = number, start: int = start) -> None:
                source.line(f"y[{row}, {index(f'{start} + {k}', lanes)}] = x{number}[{row}, {index(k, lanes)}]")

            sweep(source, str(width), emit)
            start += width
    return source.build()


def take_rows(isa: Isa, tokens: str) -> Any:
    """Return the PrimFunc ``(x, rows, y)``: y (r, K) = x[rows] for x (n, K) float32 and rows (r,) int32."""
    source = Source("take_rows")
    source.buffer("x", (1 if tokens == "one" else "n", "K"), "float32")
    source.buffer("rows", (1 if tokens == "one" else "r",), "int32")
    source.buffer("y", (1 if tokens == "one" else "r", "K"), "float32")
    with source.loop("row", 1 if tokens == "one" else "r"):
        taken = source.let("taken", "rows[row]")
        sweep(source, "K", lambda k, lanes: source.line(f"y[row, {index(k, lanes)}] = x[{taken}, {index(k, lanes)}]"))
    return source.build()


def take_last(isa: Isa, tokens: str) -> Any:
    """Return the PrimFunc ``(x, y)``: y (1, K) is the last row of x (n, K), float32."""
    source = Source("take_last")
    source.buffer("x", (1 if tokens == "one" else "n", "K"), "float32")
    source.buffer("y", (1, "K"), "float32")
    last = "0" if tokens == "one" else "n - 1"
    sweep(source, "K", lambda k, lanes: source.line(f"y[0, {index(k, lanes)}] = x[{last}, {index(k, lanes)}]"))
    return source.build()


def take_columns(isa: Isa, tokens: str) -> Any:
    """Return the PrimFunc ``(x, order, y)``: y (n, K) = x[:, order] for x (n, K) float32 and order (K,) int32."""
    source = Source("take_columns")
    n = 1 if tokens == "one" else "n"
    source.buffer("x", (n, "K"), "float32")
    source.buffer("order", ("K",), "int32")
    source.buffer("y", (n, "K"), "float32")
    with each_token(source, tokens) as row:

        def emit(k: str, lanes: int) -> None:
            source.line(f"y[{row}, {index(k, lanes)}] = x[{row}, order[{index(k, lanes)}]]")

        sweep(source, "K", emit)
    return source.build()


def reshape(isa: Isa, tokens: str) -> Any:
    """Return the PrimFunc ``(x, y)``: y (n, heads * head_dim) holds the elements of x (n, heads, head_dim), float32."""
    source = Source("reshape")
    n = 1 if tokens == "one" else "n"
    source.buffer("x", (n, "heads", "head_dim"), "float32")
    source.buffer("y", (n, "K"), "float32")
    with each_token(source, tokens) as row, source.loop("head", "heads"):

        def emit(k: str, lanes: int) -> None:
            source.line(f"y[{row}, {index(f'head * head_dim + {k}', lanes)}] = x[{row}, head, {index(k, lanes)}]")

        sweep(source, "head_dim", emit)
    return source.build()
