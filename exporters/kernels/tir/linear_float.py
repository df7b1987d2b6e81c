"""Matrix products of float32 activations: dense weights, and packed ones widened to float32 (the exact path).

Static in a kernel: format, grouping, dtypes, zero points, bias, gate, and the inputs of packed weights. Symbolic:
tokens, outputs, inputs of dense weights. A row's result is bitwise the same whichever form ("one" or "many" tokens) and
however many threads computed it: every output is CHAINS sums over k, added at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.layout import CHUNK, PANEL, CodeFormat, Grouping, code_format, grouping
from arkinfer.exporters.kernels.tir.panels import panel_bytes, parallel_panels
from arkinfer.exporters.kernels.tir.source import (
    Source,
    bits,
    cast,
    fma,
    integer,
    load,
    ramp,
    real,
    splat,
    storage,
)

CHAINS = 2  # sums of an output over even and odd k: one alone would wait for each addition
UNROLL = 4  # inputs per round of the dense loop

Sums = list[list[list[list[str]]]]  # buffer names [panel][token][part][chain]


def linear_float(
    isa: Isa,
    tokens: str,
    *,
    format: str,
    dtype: str = "float32",
    group: int = 0,
    width: int = 0,
    scales: str = "float16",
    zeros: bool = False,
    bias: bool = False,
    gated: bool = False,
) -> Any:
    """Return the PrimFunc ``(x, w[, scales][, zeros][, bias], y)``; ``tokens`` "one" fixes n = 1.

    x (n, K) float32. Format "dense": w (P, K, 16) of ``dtype``. Else w (P, C, 64) uint8, scales (P, G, 16) and zeros
    (P, G, 16) uint8 for groups of ``group`` of the ``width`` inputs. bfloat16 lies in uint16 buffers. bias (N,) and
    y (n, N) float32, N <= 16 P.

    With ``gated`` panels 2i and 2i + 1 are gate and up rows of outputs 16i..16i+15 and y = silu(gate) * up, N <= 8 P.
    """
    source = Source("linear_float")
    n = 1 if tokens == "one" else "n"
    source.buffer("x", (n, "K"), "float32")
    if format == "dense":
        source.buffer("w", ("P", "K", PANEL), storage(dtype))
    else:
        source.buffer("w", ("P", "C", CHUNK), "uint8")
        source.buffer("scales", ("P", "G", PANEL), storage(scales))
    if zeros:
        source.buffer("zeros", ("P", "G", PANEL), "uint8")
    if bias:
        source.buffer("bias", ("N",), "float32")
    source.buffer("y", (n, "N"), "float32")
    if format == "dense":
        tile = _Dense(source, isa, dtype).tile
    else:
        groups = grouping(format, group, width)
        tile = _Packed(source, isa, code_format(format), groups, groups.segments(width), scales, zeros).tile
    parallel_panels(source, isa, tokens, isa.panels_float, isa.tokens_float, tile, bias, gated)
    return source.build()


def _cleared(source: Source, isa: Isa, panels: Sequence[str], rows: Sequence[str]) -> Sums:
    """Declare the sums of a tile and emit their clearing."""
    sums: Sums = [
        [[[source.local("sum", isa.lanes, "float32") for _ in range(CHAINS)] for _ in range(isa.parts)] for _ in rows]
        for _ in panels
    ]
    _clear(source, isa, sums)
    return sums


def _clear(source: Source, isa: Isa, sums: Sums) -> None:
    for name in (chain for panel in sums for row in panel for part in row for chain in part):
        source.line(f"{name}[{ramp('0', isa.lanes)}] = {real(0.0, isa.lanes)}")


def _accumulate(
    source: Source, isa: Isa, sums: Sums, chain: int, k: str, weights: Sequence[Sequence[str]], rows: Sequence[str]
) -> None:
    """Emit the products of input ``k`` with ``weights`` [panel][part], added to the sums of ``chain``."""
    at = ramp("0", isa.lanes)
    for t, row in enumerate(rows):
        x = source.let("x", splat(f"x[{row}, {k}]", isa.lanes))
        for p, parts in enumerate(weights):
            for part, weight in enumerate(parts):
                total = f"{sums[p][t][part][chain]}[{at}]"
                source.line(f"{total} = {fma(weight, x, total, isa.lanes)}")


@dataclass(frozen=True)
class _Dense:
    """The generator for dense weights; ``tile`` emits the product of some panels with some tokens."""

    source: Source
    isa: Isa
    dtype: str

    def tile(self, panels: Sequence[str], rows: Sequence[str]) -> list[list[list[str]]]:
        """Emit the sums over all inputs; return float32 expressions [panel][token][part]."""
        source, lanes = self.source, self.isa.lanes
        sums = _cleared(source, self.isa, panels, rows)
        with source.loop("round", f"K // {UNROLL}"):
            for index in range(UNROLL):
                self._input(f"round * {UNROLL} + {index}", index % CHAINS, panels, rows, sums)
        with source.loop("rest", f"K % {UNROLL}"):
            self._input(f"K // {UNROLL} * {UNROLL} + rest", 0, panels, rows, sums)
        at = ramp("0", lanes)
        return [
            [["(" + " + ".join(f"{chain}[{at}]" for chain in part) + ")" for part in row] for row in panel]
            for panel in sums
        ]

    def _input(self, k: str, chain: int, panels: Sequence[str], rows: Sequence[str], sums: Sums) -> None:
        source, lanes = self.source, self.isa.lanes
        weights = [
            [
                source.let("w", load("w", f"{panel}, {k}, {part * lanes}", lanes, self.dtype))
                for part in range(self.isa.parts)
            ]
            for panel in panels
        ]
        _accumulate(source, self.isa, sums, chain, k, weights, rows)


@dataclass(frozen=True)
class _Packed:
    """The generator for integer weights: each code widened in its 32-bit lane, the scale applied once a segment."""

    source: Source
    isa: Isa
    codes: CodeFormat
    groups: Grouping
    segments: int
    scales: str
    zeros: bool

    def tile(self, panels: Sequence[str], rows: Sequence[str]) -> list[list[list[str]]]:
        """Emit the sums over all inputs; return float32 expressions [panel][token][part]."""
        source, lanes, parts = self.source, self.isa.lanes, range(self.isa.parts)
        at = ramp("0", lanes)
        totals = [[[source.local("total", lanes, "float32") for _ in parts] for _ in rows] for _ in panels]
        for name in (part for panel in totals for row in panel for part in row):
            source.line(f"{name}[{at}] = {real(0.0, lanes)}")
        with source.loop("segment", self.segments):
            sums = _cleared(source, self.isa, panels, rows)
            group = f"segment // {self.groups.per_weight}" if self.groups.per_weight else "0"
            zeros = [[self._zero(panel, group, part) for part in parts] for panel in panels]
            whole, rest = divmod(self.groups.segment, self.codes.inputs)
            with source.loop("chunk", whole):
                self._chunk("chunk", self.codes.inputs, panels, rows, zeros, sums)
            if rest:
                self._chunk(str(whole), rest, panels, rows, zeros, sums)
            for p, panel in enumerate(panels):
                for part in parts:
                    scale = source.let("scale", load("scales", f"{panel}, {group}, {part * lanes}", lanes, self.scales))
                    for t in range(len(rows)):
                        chains = " + ".join(f"{chain}[{at}]" for chain in sums[p][t][part])
                        total = f"{totals[p][t][part]}[{at}]"
                        source.line(f"{total} = {fma(f'({chains})', scale, total, lanes)}")
        return [[[f"{part}[{at}]" for part in row] for row in panel] for panel in totals]

    def _zero(self, panel: str, group: str, part: int) -> str:
        """Return the code that stands for 0, in float32."""
        lanes = self.isa.lanes
        if not self.zeros:
            return real(float(self.codes.zero), lanes)
        place = f"zeros[{panel}, {group}, {ramp(str(part * lanes), lanes)}]"
        return self.source.let("zero", cast(f"float32x{lanes}", place))

    def _chunk(
        self,
        chunk: str,
        inputs: int,
        panels: Sequence[str],
        rows: Sequence[str],
        zeros: Sequence[Sequence[str]],
        sums: Sums,
    ) -> None:
        """Emit the first ``inputs`` inputs of chunk ``chunk`` of the segment; what follows them is padding."""
        source, lanes, parts, codes = self.source, self.isa.lanes, range(self.isa.parts), self.codes
        place = f"segment * {self.groups.padded // codes.inputs} + {chunk}"
        stored = [
            [source.let("w", bits(f"int32x{lanes}", panel_bytes(panel, place, part, lanes))) for part in parts]
            for panel in panels
        ]
        for k in range(inputs):
            shift = 8 * (k % 4) + k // 4 * codes.bits
            weights = [[self._widened(stored[p][i], shift, zeros[p][i]) for i in parts] for p in range(len(panels))]
            x = f"segment * {self.groups.segment} + {chunk} * {codes.inputs} + {k}"
            _accumulate(source, self.isa, sums, k % CHAINS, x, weights, rows)

    def _widened(self, stored: str, shift: int, zero: str) -> str:
        """Emit the code at bit ``shift`` of each lane as float32, less its zero point, and return its name."""
        lanes = self.isa.lanes
        moved = f"T.shift_right({stored}, {integer(shift, lanes)})" if shift else stored
        code = f"T.bitwise_and({moved}, {integer((1 << self.codes.bits) - 1, lanes)})"
        return self.source.let("weight", f"{cast(f'float32x{lanes}', code)} - {zero}")
