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
            outputs = [_kept(source, isa, tile([name], ["0"])[0]) for name in names]
            _finish(source, "pair", "0", [f"{output}[{ramp('0', PANEL)}]" for output in outputs], bias, gated)
        return
    width = max(panels, 2) if gated else panels
    with source.loop("pair", f"(P + {width - 1}) // {width}", "parallel"):
        # Panels and rows beyond the last are the last one again: computed twice, with the same result.
        names = [source.let("panel", f"T.min(pair * {width} + {index}, P - 1)") for index in range(width)]
        with source.loop("block", f"(n + {block - 1}) // {block}"):
            rows = [source.let("row", f"T.min(block * {block} + {index}, n - 1)") for index in range(block)]
            if width > panels:
                outputs = [_kept(source, isa, tile([name], rows)[0]) for name in names]
            else:
                outputs = [_kept(source, isa, results) for results in tile(names, rows)]
            # A loop, not a line for each token: most of a kernel's text would be the writing of its results.
            with source.loop("t", block):
                row = source.let("row", f"T.min(block * {block} + t, n - 1)")
                values = [f"{output}[{ramp(f't * {PANEL}', PANEL)}]" for output in outputs]
                if gated:
                    _finish(source, "pair", row, values, bias, True)
                else:
                    for name, value in zip(names, values, strict=True):
                        _finish(source, name, row, [value], bias, False)


def _kept(source: Source, isa: Isa, results: Sequence[Sequence[str]]) -> str:
    """Emit the storing of one panel's results [token][part] in an array of 16 a token; return its name."""
    outputs = source.local("outputs", len(results) * PANEL, "float32")
    for t, parts in enumerate(results):
        for part, value in enumerate(parts):
            source.line(f"{outputs}[{ramp(str(t * PANEL + part * isa.lanes), isa.lanes)}] = {value}")
    return outputs


def _finish(source: Source, panel: str, row: str, values: Sequence[str], bias: bool, gated: bool) -> None:
    """Write outputs ``panel * 16``.. of token ``row`` to ``y``, without those beyond the last column N."""
    start = f"{panel} * {PANEL}"
    value = source.let("value", swiglu(source, values[0], values[1], PANEL) if gated else values[0])
    with source.block(f"if {start} + {PANEL} <= N"):
        source.line(f"y[{row}, {ramp(start, PANEL)}] = {value}" + (f" + bias[{ramp(start, PANEL)}]" if bias else ""))
    with source.block("else"):
        rest = source.local("rest", PANEL, "float32")
        source.line(f"{rest}[{ramp('0', PANEL)}] = {value}")
        with source.loop("column", f"N - {start}"):
            single = f"{rest}[column]" + (f" + bias[{start} + column]" if bias else "")
            source.line(f"y[{row}, {start} + column] = {single}")
