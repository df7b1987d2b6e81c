"""The loops that every matrix product shares: panels over threads, tokens in blocks, and writing the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from arkinfer.errors import UserError
from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.layout import PANEL
from arkinfer.exporters.kernels.tir.source import Source, ramp, swiglu

# (panels, token rows) -> float32 expressions [panel][token][part]
Tile = Callable[[Sequence[str], Sequence[str]], list[list[list[str]]]]


def panel_bytes(panel: str, chunk: str, part: int, lanes: int) -> str:
    """Return the bytes of register ``part`` of a chunk of the packed weight ``w``."""
    return f"w[{panel}, {chunk}, {ramp(str(part * 4 * lanes), 4 * lanes)}]"


def parallel_panels(
    source: Source, isa: Isa, tokens: str, panels: int, block: int, tile: Tile, bias: bool, gated: bool
) -> None:
    """Emit the loops over the panels of ``w`` (P, ...) and the rows of ``y`` (n, N) around ``tile``.

    The runtime gives each thread a contiguous range of panels: one stream of memory per thread. For one token panels
    are taken one by one; for many, ``panels`` of them with ``block`` tokens at a time (a gate and its up panel always
    together).
    """
    if bias and gated:
        raise UserError("a gated matrix product takes no bias", code="ARK-E152")
    if tokens == "one":
        with source.loop("pair", "P // 2" if gated else "P", "parallel"):
            names = ["pair * 2", "pair * 2 + 1"] if gated else ["pair"]
            results = [tile([name], ["0"])[0][0] for name in names]
            finish(source, isa, "pair", "0", results, bias, gated)
        return
    width = max(panels, 2) if gated else panels
    with source.loop("pair", f"(P + {width - 1}) // {width}", "parallel"):
        # Panels and rows beyond the last are the last one again: computed twice, with the same result.
        names = [source.let("panel", f"T.min(pair * {width} + {index}, P - 1)") for index in range(width)]
        with source.loop("block", f"(n + {block - 1}) // {block}"):
            rows = [source.let("row", f"T.min(block * {block} + {index}, n - 1)") for index in range(block)]
            if width > panels:
                tiles = [tile([name], rows)[0] for name in names]
            else:
                tiles = tile(names, rows)
            for index, row in enumerate(rows):
                if gated:
                    finish(source, isa, "pair", row, [tiles[0][index], tiles[1][index]], bias, True)
                else:
                    for panel, name in enumerate(names):
                        finish(source, isa, name, row, [tiles[panel][index]], bias, False)


def finish(
    source: Source, isa: Isa, panel: str, row: str, results: Sequence[Sequence[str]], bias: bool, gated: bool
) -> None:
    """Write outputs ``panel * 16``.. of token ``row`` to ``y``, without those beyond the last column N."""
    start = f"{panel} * {PANEL}"
    outputs = source.local("outputs", PANEL, "float32")
    for part in range(isa.parts):
        value = swiglu(source, results[0][part], results[1][part], isa.lanes) if gated else results[0][part]
        source.line(f"{outputs}[{ramp(str(part * isa.lanes), isa.lanes)}] = {value}")
    whole = f"{outputs}[{ramp('0', PANEL)}]"
    with source.block(f"if {start} + {PANEL} <= N"):
        source.line(f"y[{row}, {ramp(start, PANEL)}] = {whole}" + (f" + bias[{ramp(start, PANEL)}]" if bias else ""))
    with source.block("else"), source.loop("column", f"N - {start}"):
        value = f"{outputs}[column]" + (f" + bias[{start} + column]" if bias else "")
        source.line(f"y[{row}, {start} + column] = {value}")
