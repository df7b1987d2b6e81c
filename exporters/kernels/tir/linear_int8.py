"""Matrix products of int8 activations with integer weights: exact integer sums, scaled and added in float32.

Static in a kernel: format, grouping, dtype of the scales, zero points, bias, gate. Symbolic: tokens, inputs, outputs.
A row's result is bitwise the same whichever form ("one" or "many" tokens) and however many threads computed it.
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
    add,
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

UNROLL = 4  # chunks per round of the inner loop for one token; more tokens fill a round with one

# Chunks between a load and the prefetch of one to come: left alone, hardware stops at each page of 4 KiB.
AHEAD = 64

Sums = list[list[list[list[str]]]]  # buffer names [panel][token][part][way]


def linear_int8(
    isa: Isa,
    tokens: str,
    *,
    format: str,
    group: int,
    width: int,
    scales: str = "float16",
    zeros: bool = False,
    bias: bool = False,
    gated: bool = False,
) -> Any:
    """Return the PrimFunc ``(xq, xs, xsum, w, scales[, zeros][, bias], y)``; ``tokens`` "one" fixes n = 1.

    xq (n, Kp) int8, xs (n, A) float32, xsum (n, S) int32: made by ``quantize`` for ``grouping(format, group, width)``.
    w (P, C, 64) uint8, scales (P, G, 16), zeros (P, G, 16) uint8: see ``pack``; bfloat16 scales are uint16 buffers.
    bias (N,) float32, y (n, N) float32, N <= 16 P.

    With ``gated`` panels 2i and 2i + 1 are gate and up rows of outputs 16i..16i+15 and y = silu(gate) * up, N <= 8 P.
    """
    source = Source("linear_int8")
    n = 1 if tokens == "one" else "n"
    source.buffer("xq", (n, "Kp"), "int8")
    source.buffer("xs", (n, "A"), "float32")
    source.buffer("xsum", (n, "segments"), "int32")
    source.buffer("w", ("P", "C", CHUNK), "uint8")
    source.buffer("scales", ("P", "G", PANEL), storage(scales))
    if zeros:
        source.buffer("zeros", ("P", "G", PANEL), "uint8")
    if bias:
        source.buffer("bias", ("N",), "float32")
    source.buffer("y", (n, "N"), "float32")
    generator = _Paired if isa.pairs and tokens == "many" else _Kernel
    kernel = generator(source, isa, code_format(format), grouping(format, group, width), scales, zeros)
    parallel_panels(source, isa, tokens, isa.panels_int8, isa.tokens_int8, kernel.tile, bias, gated)
    return source.build()


@dataclass(frozen=True)
class _Kernel:
    """The generator of one kernel; ``tile`` emits the product of some panels with some tokens."""

    source: Source
    isa: Isa
    codes: CodeFormat
    groups: Grouping
    scales: str
    zeros: bool

    @property
    def chunks(self) -> int:
        """Chunks of a segment."""
        return self.groups.padded // self.codes.inputs

    @property
    def step(self) -> int:
        """Chunks that are multiplied together: maddubs has room for several planes before they are widened, and sdot
        takes 16 inputs of a token from one register.
        """
        if self.isa.product == "sdot":
            return 4 // self.codes.planes
        return 2 if self.isa.product == "maddubs" and self.codes.planes == 2 else 1

    def tile(self, panels: Sequence[str], rows: Sequence[str]) -> list[list[list[str]]]:
        """Emit the sums over all inputs; return float32 expressions [panel][token][part]."""
        source, lanes, parts = self.source, self.isa.lanes, range(self.isa.parts)
        # One token alone must keep several sums in flight; many tokens are enough of them.
        alone = len(panels) * len(rows) == 1
        at = ramp("0", lanes)
        totals = [[[source.local("total", lanes, "float32") for _ in parts] for _ in rows] for _ in panels]
        for total in (part for panel in totals for row in panel for part in row):
            source.line(f"{total}[{at}] = {real(0.0, lanes)}")
        with source.loop("segment", "segments"):
            sums = self._open(panels, rows, alone)
            self._chunks(panels, rows, sums, alone)
            ratio = self.groups.per_activation
            group = "segment" if ratio == 1 else f"segment // {ratio}"
            for p, panel in enumerate(panels):
                for part in parts:
                    place = f"{panel}, {self._weight_group()}, {part * lanes}"
                    scale = source.let("scale", load("scales", place, lanes, self.scales))
                    for t, row in enumerate(rows):
                        whole = self._whole(sums[p][t][part], (panel, row, part), t, alone)
                        dot = cast(f"float32x{lanes}", whole)
                        factor = f"{scale} * {splat(f'xs[{row}, {group}]', lanes)}"
                        total = f"{totals[p][t][part]}[{at}]"
                        source.line(f"{total} = {fma(dot, factor, total, lanes)}")
        return [[[f"{part}[{at}]" for part in row] for row in panel] for panel in totals]

    def _open(self, panels: Sequence[str], rows: Sequence[str], alone: bool) -> Sums:
        """Declare the sums of a segment and emit what they start from."""
        source, lanes, parts = self.source, self.isa.lanes, range(self.isa.parts)
        ways = self._ways(alone)
        sums: Sums = [
            [[[source.local("sum", lanes, "int32") for _ in range(ways)] for _ in parts] for _ in rows] for _ in panels
        ]
        for p, panel in enumerate(panels):
            for t, row in enumerate(rows):
                for part in parts:
                    for way, name in enumerate(sums[p][t][part]):
                        start = integer(0, lanes) if way else self._start(panel, row, part)
                        source.line(f"{name}[{ramp('0', lanes)}] = {start}")
        return sums

    def _weight_group(self) -> str:
        if not self.groups.per_weight:
            return "0"
        return "segment" if self.groups.per_weight == 1 else f"segment // {self.groups.per_weight}"

    def _ways(self, alone: bool) -> int:
        """Return how many partial sums a lane keeps."""
        if not alone:
            return 1
        return 4 if self.isa.in_place_masks else 4 // min(self.isa.parts, 2)

    def _start(self, panel: str, row: str, part: int) -> str:
        """Return what a sum starts from: minus the zero point times the sum of the activations."""
        lanes = self.isa.lanes
        negative = f"(0 - xsum[{row}, segment])"
        shift = 128 if self.codes.limit == 255 and self.isa.signed_bytes else 0  # what ``_planes`` took from the codes
        if self.zeros:
            place = f"{panel}, {self._weight_group()}, {ramp(str(part * lanes), lanes)}"
            zero = cast(f"int32x{lanes}", f"zeros[{place}]")
            zero = f"({zero} - {integer(shift, lanes)})" if shift else zero
            return f"{zero} * {splat(negative, lanes)}"
        common = self.codes.zero - shift
        return splat(f"{negative} * {common}", lanes) if common else integer(0, lanes)

    def _whole(self, sums: Sequence[str], place: tuple[str, str, int], token: int, alone: bool) -> str:
        """Return the sum of the partial sums of a (panel, row, part), each shifted back to its place."""
        lanes, at = self.isa.lanes, ramp("0", self.isa.lanes)
        terms = [f"{name}[{at}]" for name in sums]
        if alone and self.isa.in_place_masks:
            shifts = [way % self.codes.planes * self.codes.bits for way in range(len(sums))]
            terms = [
                f"T.shift_right({term}, {integer(shift, lanes)})" if shift else term
                for term, shift in zip(terms, shifts, strict=True)
            ]
        return add(*terms)

    def _chunks(self, panels: Sequence[str], rows: Sequence[str], sums: Sums, alone: bool) -> None:
        """Emit the loop over the chunks of a segment."""
        unroll = UNROLL if alone else self.step
        rounds, rest = divmod(self.chunks, unroll)
        if rounds > 1:
            with self.source.loop("round", rounds):
                self._some(f"round * {unroll}", unroll, panels, rows, sums, alone)
        elif rounds:
            self._some("0", unroll, panels, rows, sums, alone)
        if rest:
            self._some(str(rounds * unroll), rest, panels, rows, sums, alone)

    def _some(
        self, first: str, count: int, panels: Sequence[str], rows: Sequence[str], sums: Sums, alone: bool
    ) -> None:
        """Emit ``count`` chunks from chunk ``first`` of the segment."""
        for offset in range(0, count, self.step):
            chunks = [f"segment * {self.chunks} + {first} + {o}" for o in range(offset, min(offset + self.step, count))]
            self._step(chunks, offset // self.step, panels, rows, sums, alone)

    def _step(
        self, chunks: Sequence[str], number: int, panels: Sequence[str], rows: Sequence[str], sums: Sums, alone: bool
    ) -> None:
        """Emit the product of some chunks, the ``number``-th of a round."""
        source, lanes, parts = self.source, self.isa.lanes, range(self.isa.parts)
        planes, at = self.codes.planes, ramp("0", lanes)
        if alone:
            for chunk in chunks:
                source.prefetch(f"w[{panels[0]}, {chunk} + {AHEAD}, 0]")
        weights = {
            (p, part): [
                source.let("codes", plane)
                for chunk in chunks
                for plane in self._planes(source.let("w", panel_bytes(panel, chunk, part, lanes)), alone)
            ]
            for p, panel in enumerate(panels)
            for part in parts
        }
        for t, row in enumerate(rows):
            inputs = self._activations(row, [f"({c}) * {4 * planes} + {4 * p}" for c in chunks for p in range(planes)])
            for p in range(len(panels)):
                for part in parts:
                    names = sums[p][t][part]
                    pairs = list(zip(weights[p, part], inputs, strict=True))
                    # A sum of its own for each plane where its codes are not in place.
                    apart = alone and self.isa.product != "maddubs"
                    for index, some in enumerate([[pair] for pair in pairs] if apart else [pairs]):
                        place = number * len(pairs) + index if apart else number
                        name = f"{names[place % len(names)]}[{at}]"
                        source.line(f"{name} = {self.isa.dot(name, some, self.codes.limit)}")

    def _activations(self, row: str, places: Sequence[str]) -> list[str]:
        """Emit four activations from each of the ``places``, repeated for every row of a register; return their names.

        The places follow each other. Where the product takes one lane of a register for all rows, four are one load.
        """
        source = self.source
        found: list[str] = []
        if self.isa.product == "sdot":
            while len(places) - len(found) >= 4:
                x = source.let("x", bits("int32x4", f"xq[{row}, {ramp(places[len(found)], 16)}]"))
                found += [bits("int8x16", f"T.Shuffle([{x}], {[lane] * 4})") for lane in range(4)]
        for k in places[len(found) :]:
            four = bits("int32", f"xq[{row}, {ramp(k, 4)}]")
            found.append(source.let("x", bits(f"int8x{4 * self.isa.lanes}", splat(four, self.isa.lanes))))
        return found

    def _planes(self, w: str, alone: bool) -> list[str]:
        """Return the codes of each plane of the bytes ``w``."""
        size = 4 * self.isa.lanes
        if self.codes.planes == 1:
            if self.isa.signed_bytes:
                return [bits(f"int8x{size}", f"T.bitwise_xor({w}, {splat('T.uint8(128)', size)})")]
            return [w]
        mask = (1 << self.codes.bits) - 1
        result = []
        for plane in range(self.codes.planes):
            shift, source = plane * self.codes.bits, w
            place = mask << shift if alone and self.isa.in_place_masks else mask
            if shift and place == mask:
                half = f"T.shift_right({bits(f'uint16x{size // 2}', w)}, {splat(f'T.uint16({shift})', size // 2)})"
                source = bits(f"uint8x{size}", half)
            result.append(f"T.bitwise_and({source}, {splat(f'T.uint8({place})', size)})")
        return result


@dataclass(frozen=True)
class _Paired(_Kernel):
    """The generator for many tokens where one instruction multiplies two rows with two tokens, eight inputs of each.

    The sums of tokens 2i and 2i + 1 with a part, four rows, lie together: [row 0 with both tokens, row 1 with both],
    then the same of rows 2 and 3. They are taken apart after each segment.
    """

    @property
    def step(self) -> int:
        return 2 if self.codes.planes == 1 else 1  # chunks that hold eight inputs of a row

    def _open(self, panels: Sequence[str], rows: Sequence[str], alone: bool) -> Sums:
        found: Sums = []
        for _ in panels:
            pairs = [
                [[self.source.local("sum", 4, "int32") for _ in range(2)] for _ in range(self.isa.parts)]
                for _ in range((len(rows) + 1) // 2)
            ]
            for name in (name for pair in pairs for part in pair for name in part):
                self.source.line(f"{name}[{ramp('0', 4)}] = {integer(0, 4)}")
            found.append([pairs[t // 2] for t in range(len(rows))])
        return found

    def _whole(self, sums: Sequence[str], place: tuple[str, str, int], token: int, alone: bool) -> str:
        low, high = (f"{name}[{ramp('0', 4)}]" for name in sums)
        return add(f"T.Shuffle([{low}, {high}], {[lane + token % 2 for lane in (0, 2, 4, 6)]})", self._start(*place))

    def _step(
        self, chunks: Sequence[str], number: int, panels: Sequence[str], rows: Sequence[str], sums: Sums, alone: bool
    ) -> None:
        source, planes = self.source, self.codes.planes
        places = [f"({chunk}) * {4 * planes} + {4 * plane}" for chunk in chunks for plane in range(planes)]
        codes = {
            (p, part): [
                bits("int32x4", source.let("codes", plane))
                for chunk in chunks
                for plane in self._planes(source.let("w", panel_bytes(panel, chunk, part, 4)), alone)
            ]
            for p, panel in enumerate(panels)
            for part in range(self.isa.parts)
        }
        for first in range(0, len(places), 2):
            lone = first + 1 == len(places)  # four inputs are left: zeros follow those of the weight
            inputs = [
                self._tokens(rows[t], rows[min(t + 1, len(rows) - 1)], places[first], lone)
                for t in range(0, len(rows), 2)
            ]
            for (p, part), quads in codes.items():
                pair = f"{quads[first]}, {integer(0, 4) if lone else quads[first + 1]}"
                for half, lanes in enumerate(([0, 4, 1, 5], [2, 6, 3, 7])):
                    both = source.let("both", bits("uint8x16", f"T.Shuffle([{pair}], {lanes})"))
                    for t, x in enumerate(inputs):
                        name = f"{sums[p][2 * t][part][half]}[{ramp('0', 4)}]"
                        source.line(f"{name} = {self.isa.dot_pairs(name, both, x)}")

    def _tokens(self, first: str, second: str, k: str, lone: bool) -> str:
        """Emit eight activations of two tokens, or four of each twice, and return their name."""
        count = 4 if lone else 8
        loaded = [bits("int32" if lone else "int32x2", f"xq[{row}, {ramp(k, count)}]") for row in (first, second)]
        halves = [splat(value, 2) if lone else value for value in loaded]
        return self.source.let("x", bits("int8x16", f"T.Shuffle([{', '.join(halves)}], [0, 1, 2, 3])"))
