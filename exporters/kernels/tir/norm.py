"""Root-mean-square norms, alone or after a residual addition, with float or int8 results.

Static in a kernel: eps, residual scale, grouping. Symbolic: tokens and width. A token is the work of one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arkinfer.exporters.kernels.tir.elementwise import sweep
from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.layout import Grouping
from arkinfer.exporters.kernels.tir.quantize import WIDTH, declare_outputs, each_token, round_row
from arkinfer.exporters.kernels.tir.source import Source, cast, fill, fma, index, intrinsic, real


def rms_norm(isa: Isa, tokens: str, *, eps: float, groups: Mapping[str, int] | None = None) -> Any:
    """Return the PrimFunc ``(x, weight, y)``: y = x / sqrt(mean(x^2) + eps) * weight.

    x (n, K), weight (K,), y (n, K) float32; with ``groups`` xq, xs, xsum of ``quantize`` instead of y.
    """
    source = Source("rms_norm")
    source.buffer("x", (1 if tokens == "one" else "n", "K"), "float32")
    return _norm(source, tokens, "x", eps, groups, None)


def add_rms_norm(isa: Isa, tokens: str, *, scale: float, eps: float, groups: Mapping[str, int] | None = None) -> Any:
    """Return the PrimFunc ``(residual, delta, weight, total, y)``: total = residual + scale * delta, y its norm.

    residual, delta, total, y (n, K), weight (K,) float32; with ``groups`` xq, xs, xsum of ``quantize`` instead of y.
    ``total`` may be the same memory as ``residual`` or ``delta``.
    """
    source = Source("add_rms_norm")
    n = 1 if tokens == "one" else "n"
    source.buffer("residual", (n, "K"), "float32")
    source.buffer("delta", (n, "K"), "float32")
    return _norm(source, tokens, "total", eps, groups, scale)


def _norm(
    source: Source, tokens: str, x: str, eps: float, groups: Mapping[str, int] | None, scale: float | None
) -> Any:
    n = 1 if tokens == "one" else "n"
    source.buffer("weight", ("K",), "float32")
    if scale is not None:
        source.buffer("total", (n, "K"), "float32")
    if groups is None:
        source.buffer("y", (n, "K"), "float32")
    else:
        declare_outputs(source, n)
    with each_token(source, tokens) as row:
        squares = {lanes: source.local("squares", lanes, "float32") for lanes in (WIDTH, 1)}
        for lanes, name in squares.items():
            source.line(f"{name}[{index('0', lanes)}] = {fill(real(0.0), lanes)}")

        def accumulate(k: str, lanes: int) -> None:
            value = f"{x}[{row}, {index(k, lanes)}]"
            if scale is not None:
                delta, residual = f"delta[{row}, {index(k, lanes)}]", f"residual[{row}, {index(k, lanes)}]"
                value = source.let("sum", fma(delta, fill(real(scale), lanes), residual, lanes))
                source.line(f"total[{row}, {index(k, lanes)}] = {value}")
            else:
                value = source.let("x", value)
            square = f"{squares[lanes]}[{index('0', lanes)}]"
            source.line(f"{square} = {fma(value, value, square, lanes)}")

        sweep(source, "K", accumulate)
        vector = f"{squares[WIDTH]}[{index('0', WIDTH)}]"
        total = intrinsic("float32", "llvm.vector.reduce.fadd", f"{squares[1]}[0]", vector)
        mean = f"{total} / {cast('float32', 'K')}"
        inverse = source.let("inverse", f"{real(1.0)} / T.sqrt({mean} + {real(eps)})")

        def value(k: str, lanes: int) -> str:
            scaled = f"({x}[{row}, {index(k, lanes)}] * {fill(inverse, lanes)})"
            return f"{scaled} * weight[{index(k, lanes)}]"

        if groups is None:
            sweep(source, "K", lambda k, lanes: source.line(f"y[{row}, {index(k, lanes)}] = {value(k, lanes)}"))
        else:
            round_row(source, Grouping(**groups), row, value)
    return source.build()
