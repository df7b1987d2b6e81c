"""Rows of the embedding table, read from the same panels that the output head multiplies.

Static in a kernel: format, group, dtype, factor. Symbolic: tokens, rows, width (for packed formats: static).
"""

from __future__ import annotations

from typing import Any

from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.layout import CHUNK, PANEL, code_format, grouping
from arkinfer.exporters.kernels.tir.quantize import each_token
from arkinfer.exporters.kernels.tir.source import Source, cast, load, real, storage


def embedding(
    isa: Isa,
    tokens: str,
    *,
    format: str,
    scale: float = 1.0,
    dtype: str = "float32",
    group: int = 0,
    width: int = 0,
    scales: str = "float16",
    zeros: bool = False,
) -> Any:
    """Return the PrimFunc ``(tokens, w[, scales][, zeros], y)``: y (n, K) float32 = scale * table[tokens].

    tokens (n,) int32; w (P, K, 16) of ``dtype`` for format "dense" (bfloat16 in uint16), else (P, C, 64) uint8 with
    scales and zeros (P, G, 16): the layouts of ``pack``.
    """
    source = Source("embedding")
    n = 1 if tokens == "one" else "n"
    source.buffer("tokens", (n,), "int32")
    if format == "dense":
        source.buffer("w", ("P", "K", PANEL), storage(dtype))
    else:
        source.buffer("w", ("P", "C", CHUNK), "uint8")
        source.buffer("scales", ("P", "G", PANEL), storage(scales))
        if zeros:
            source.buffer("zeros", ("P", "G", PANEL), "uint8")
    source.buffer("y", (n, "K"), "float32")
    with each_token(source, tokens) as row:
        token = source.let("token", cast("int64", f"tokens[{row}]"))
        panel, lane = source.let("panel", f"{token} // {PANEL}"), source.let("lane", f"{token} % {PANEL}")
        if format == "dense":
            with source.loop("k", "K"):
                source.line(f"y[{row}, k] = {load('w', f'{panel}, k, {lane}', 1, dtype)} * {real(scale)}")
            return source.build()
        codes, groups = code_format(format), grouping(format, group, width)
        with source.loop("segment", groups.segments(width)):
            weight_group = f"segment // {groups.per_weight}" if groups.per_weight else "0"
            factor = source.let("factor", load("scales", f"{panel}, {weight_group}, {lane}", 1, scales))
            zero = f"zeros[{panel}, {weight_group}, {lane}]" if zeros else str(codes.zero)
            zero = source.let("zero", cast("int32", zero))
            with source.loop("j", groups.segment):
                chunk = f"segment * {groups.padded // codes.inputs} + j // {codes.inputs}"
                byte = cast("int32", f"w[{panel}, {chunk}, {lane} * 4 + j % 4]")
                shift = cast("int32", f"j % {codes.inputs} // 4 * {codes.bits}")
                code = f"T.bitwise_and(T.shift_right({byte}, {shift}), T.int32({(1 << codes.bits) - 1}))"
                value = f"{cast('float32', f'{code} - {zero}')} * {factor} * {real(scale)}"
                source.line(f"y[{row}, segment * {groups.segment} + j] = {value}")
    return source.build()
