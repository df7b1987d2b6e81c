"""Rows of an embedding table in any weight format, as float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from arkinfer.exporters.kernels.triton import layout
from arkinfer.exporters.kernels.triton.kernel import Argument, Kernel, Variant, ceil_div


@dataclass(frozen=True)
class Embedding:
    """out = table[token] * scale; the table (rows, width) lies in memory as a linear's weight, so both may share it.

    ``dtype`` is a dense table's own: float16, bfloat16 or float32; ``scales`` that of the scales.
    """

    format: str
    rows: int
    width: int
    group: int = 0
    dtype: str = "float16"
    scales: str = "float16"
    zeros: bool = False
    scale: float = 1.0


def _arguments(options: Embedding) -> tuple[Argument, ...]:
    groups = options.width // (options.group or options.width)
    if options.format == "dense":
        table = [Argument("weight", options.dtype, (options.rows, options.width))]
    else:
        table = [
            Argument("weight", "int32", (options.rows, layout.words(options.format, options.width))),
            Argument("scales", options.scales, (options.rows, groups)),
        ]
        if options.zeros:
            table.append(Argument("zeros", "uint8", (options.rows, groups)))
    return (
        Argument("tokens", "int32", ("n",)),
        *table,
        Argument("out", "float32", ("n", options.width), "out"),
    )


def _variant(options: Embedding, arch: str) -> Variant:
    form = layout.FORMATS.get(options.format)
    constants: dict[str, int | float | bool | str] = {
        "WIDTH": options.width,
        "GROUP": options.group or options.width,
        "DENSE": form is None,
        "BITS": form.bits if form else 0,
        "PLANES": form.planes if form else 0,
        "ZERO": form.zero if form else 0,
        "WORDS": layout.words(options.format, options.width) if form else 0,
        "ZEROS": options.zeros,
        "SCALE": options.scale,
        "BLOCK": 1024,
    }
    return Variant(constants, ("n", str(ceil_div(options.width, 1024)), "1"), 4, 1)


def _reference(options: Embedding, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    ids = arguments["tokens"].long()
    parts = {name: arguments[name][ids] for name in ("weight", "scales", "zeros") if name in arguments}
    values = layout.dequantise(options.format, options.group, options.width, **parts)
    arguments["out"].copy_(values * options.scale)


EMBEDDING = Kernel("embedding:embedding", Embedding, _arguments, _variant, _reference)
