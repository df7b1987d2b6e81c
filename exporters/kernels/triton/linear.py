"""Matrix products with a weight in any format: one row of x at memory speed, or many on tensor cores.

Codes stay exact integers in the product; scales multiply its float32 sums, group by group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from arkinfer.exporters.kernels.triton import layout, tuning
from arkinfer.exporters.kernels.triton.kernel import Argument, Kernel, Variant, ceil_div, power_of_two, rows_grid


@dataclass(frozen=True)
class Linear:
    """out = (x @ W.T + bias) * factor, W (rows, width); ``rows`` counts gate and up together when ``gated``.

    ``dtype`` is a dense weight's own (float16 or bfloat16), ``scales`` that of the scales. ``gated`` gives
    silu(gate) * up of a weight whose first half is gate: rows / 2 outputs. ``out_stride`` is the distance of output
    rows (0: their length), so that several weights may fill one buffer side by side. ``count`` says which rows of x
    there are: "n", "r" or a number; where it is not "n" there are few, which get small tiles.
    """

    format: str
    rows: int
    width: int
    group: int = 0
    dtype: str = "float16"
    scales: str = "float16"
    zeros: bool = False
    bias: bool = False
    order: bool = False
    gated: bool = False
    out: str = "float16"
    out_stride: int = 0
    factor: float = 1.0
    count: str = "n"

    @property
    def columns(self) -> int:
        """Outputs of a row of x."""
        return self.rows // 2 if self.gated else self.rows

    @property
    def stride(self) -> int:
        return self.out_stride or self.columns

    @property
    def extent(self) -> int:
        """Inputs that share a scale."""
        return self.group or self.width


def _weight(options: Linear) -> tuple[Argument, ...]:
    groups = options.width // options.extent
    if options.format == "dense":
        parts = [Argument("weight", options.dtype, (options.rows, options.width))]
    else:
        parts = [
            Argument("weight", "int32", (options.rows, layout.words(options.format, options.width))),
            Argument("scales", options.scales, (options.rows, groups)),
        ]
    if options.zeros:
        parts.append(Argument("zeros", "uint8", (options.rows, groups)))
    if options.order:
        parts.append(Argument("order", "int32", (options.width,)))
    if options.bias:
        parts.append(Argument("bias", "float32", (options.rows,)))
    return tuple(parts)


def _gemv_arguments(options: Linear) -> tuple[Argument, ...]:
    return (
        Argument("x", "float16", (1, options.width)),
        *_weight(options),
        Argument("out", options.out, (1, options.columns), "out"),
    )


def _gemm_arguments(options: Linear) -> tuple[Argument, ...]:
    return (
        Argument("x", "float16", (options.count, options.width)),
        *_weight(options),
        Argument("out", options.out, (options.count, options.columns), "out", options.out_stride),
        Argument("count", "int32", (options.count,), "scalar"),
    )


def _constants(options: Linear) -> dict[str, int | float | bool | str]:
    form = layout.FORMATS.get(options.format)
    return {
        "ROWS": options.rows,
        "WIDTH": options.width,
        "COLUMNS": options.columns,
        "STRIDE": options.stride,
        "GROUP": options.group,
        "DENSE": form is None,
        "BITS": form.bits if form else 0,
        "PLANES": form.planes if form else 0,
        "ZERO": form.zero if form else 0,
        "WORDS": layout.words(options.format, options.width) if form else 0,
        "ZEROS": options.zeros,
        "BIAS": options.bias,
        "ORDER": options.order,
        "GATED": options.gated,
        "FACTOR": options.factor,
    }


def _shared(options: Linear, planes: int) -> int:
    """Return how many consecutive planes (16 inputs each) share a scale wherever they lie among ``planes``."""
    return math.gcd(options.group // layout.WORDS, planes) if options.group else planes


def _gemv_variant(options: Linear, arch: str) -> Variant:
    """A warp reads a tile of 512 bytes of each row, 16 a lane: as many warps as a row fills, up to eight."""
    per_lane = 8 if options.format == "dense" else 4  # elements of a 128-bit load
    length = options.width if options.format == "dense" else layout.words(options.format, options.width)
    warps = min(8, power_of_two(ceil_div(length, 32 * per_lane)))
    constants = _constants(options)
    tile = tuning.GEMV[arch][int(constants["BITS"]) or 16]
    if options.rows < 4096:
        tile //= 2  # more blocks, which small matrices need to fill the device
    constants |= {"TILE": tile, "STEP": 32 * per_lane * warps}
    constants["SHARED"] = _shared(options, int(constants["PLANES"]))
    outputs = tile // 2 if options.gated else tile
    return Variant(constants, (str(ceil_div(options.columns, outputs)), "1", "1"), warps, 1)


def _gemm_variant(options: Linear, arch: str) -> Variant:
    tile_m, tile_n, warps = (16, 64, 4) if options.count != "n" else tuning.GEMM[arch]
    constants = _constants(options) | {"TILE_M": tile_m, "TILE_N": tile_n, "STEP": 64}
    # Half a chunk at a time where a whole one (256 inputs) would fill the shared memory with x.
    constants["TAKEN"] = min(8, int(constants["PLANES"]))
    constants["SHARED"] = _shared(options, int(constants["TAKEN"]))
    outputs = tile_n // 2 if options.gated else tile_n
    # Tiles of the same weights are neighbours, so that they are read from memory once.
    grid = (rows_grid(options.count, tile_m), str(ceil_div(options.columns, outputs)), "1")
    return Variant(constants, grid, warps, 3)


def _reference(options: Linear, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    x = arguments["x"].float()  # (rows of x, width)
    if options.order:
        x = x[:, arguments["order"].long()]
    weight = layout.dequantise(
        options.format,
        options.group,
        options.width,
        arguments["weight"],
        arguments.get("scales"),
        arguments.get("zeros"),
    )
    product = x @ weight.T
    if options.bias:
        product += arguments["bias"]
    if options.gated:
        gate, up = product.chunk(2, dim=1)
        product = torch.nn.functional.silu(gate) * up
    arguments["out"].copy_(product * options.factor)


GEMV = Kernel("linear_gemv:gemv", Linear, _gemv_arguments, _gemv_variant, _reference)
GEMM = Kernel("linear_gemm:gemm", Linear, _gemm_arguments, _gemm_variant, _reference)
