"""The machine's peak: the inner instruction of the matrix kernels on data that never leaves the first cache."""

from __future__ import annotations

from typing import Any

from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.source import Source, fma, integer, ramp, real

ROUNDS = 20_000  # of the inner loop in each work item
SOURCES = 8  # vectors of x that the loop goes through, so that no product is the same each time round


def chains(isa: Isa) -> int:
    """Return how many independent sums hide the latency of a dot product and still fit into the registers."""
    return 24 if isa.lanes == 16 else 12


def operations(isa: Isa, whole: bool) -> int:
    """Return the multiplications and additions of one work item."""
    return 2 * ROUNDS * chains(isa) * isa.lanes * ((8 if isa.pairs else 4) if whole else 1)


def peak(isa: Isa, tokens: str, *, whole: bool) -> Any:
    """Return the PrimFunc ``(x, y)``: int8 dot products if ``whole``, float32 fused multiply-adds otherwise.

    x (SOURCES * 64,) int8, or float32 with 16 for 64; y (items, chains, lanes) of sums: each item is work for a thread.
    """
    source = Source("peak")
    step, dtype = (4 * isa.lanes, "int32") if whole else (isa.lanes, "float32")
    source.buffer("x", (SOURCES * (64 if whole else 16),), "int8" if whole else "float32")
    source.buffer("y", ("items", chains(isa), isa.lanes), dtype)
    zero = integer(0, isa.lanes) if whole else real(0.0, isa.lanes)
    with source.loop("item", "items", "parallel"):
        sums = [source.local("sum", isa.lanes, dtype) for _ in range(chains(isa))]
        for name in sums:
            source.line(f"{name}[{ramp('0', isa.lanes)}] = {zero}")
        with source.loop("round", ROUNDS):
            vector = f"x[{ramp(f'round % {SOURCES} * {step}', step)}]"
            for number, name in enumerate(sums):
                held = f"{name}[{ramp('0', isa.lanes)}]"
                other = f"x[{ramp(str(number % SOURCES * step), step)}]"
                if whole:
                    codes = f'T.bitwise_and(T.reinterpret("uint8x{step}", {other}), T.Broadcast(T.uint8(3), {step}))'
                    product = isa.dot_pairs(held, codes, vector) if isa.pairs else isa.dot(held, [(codes, vector)], 3)
                    source.line(f"{held} = {product}")
                else:
                    source.line(f"{held} = {fma(other, vector, held, isa.lanes)}")
        for number, name in enumerate(sums):
            source.line(f"y[item, {number}, {ramp('0', isa.lanes)}] = {name}[{ramp('0', isa.lanes)}]")
    return source.build()
