"""What MLC's engine does to logits before it draws: biases, penalties, masks and the softmax, under its names.

Arguments are those of mlc_llm.compiler_pass.attach_logit_processor; logits (b, vocab) float32 change in place.
"""

from __future__ import annotations

from typing import Any

from arkinfer.exporters.kernels.tir.elementwise import sweep
from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.quantize import WIDTH
from arkinfer.exporters.kernels.tir.source import Source, cast, exp, fill, index, intrinsic, real

_LOWEST = -3.4028234663852886e38  # float32's


def apply_logit_bias_inplace(isa: Isa) -> Any:
    """Return the PrimFunc ``(logits, rows, ids, biases)``: logits[rows[i], ids[i]] += biases[i], arrays (t,)."""
    source = Source("apply_logit_bias_inplace")
    source.buffer("logits", ("b", "vocab"), "float32")
    source.buffer("rows", ("t",), "int32")
    source.buffer("ids", ("t",), "int32")
    source.buffer("biases", ("t",), "float32")
    with source.loop("i", "t"):
        source.line("logits[rows[i], ids[i]] = logits[rows[i], ids[i]] + biases[i]")
    return source.build()


def apply_penalty_inplace(isa: Isa) -> Any:
    """Return the PrimFunc ``(logits, rows, owners, ids, counts, penalties)``.

    Token ids[i] occurred counts[i] times in the text of owners[i], whose logits are row rows[owners[i]] and whose
    penalties (s, 3) are: presence, frequency (subtracted, the latter once per occurrence), then repetition, by which
    negative logits are multiplied and others divided.
    """
    source = Source("apply_penalty_inplace")
    source.buffer("logits", ("b", "vocab"), "float32")
    source.buffer("rows", ("s",), "int32")
    for name in ("owners", "ids", "counts"):
        source.buffer(name, ("t",), "int32")
    source.buffer("penalties", ("s", 3), "float32")
    with source.loop("i", "t"):
        owner, token = source.let("owner", "owners[i]"), source.let("token", "ids[i]")
        row = source.let("row", f"rows[{owner}]")
        less = f"penalties[{owner}, 0] + {cast('float32', 'counts[i]')} * penalties[{owner}, 1]"
        x = source.let("x", f"logits[{row}, {token}] - ({less})")
        by = source.let("by", f"penalties[{owner}, 2]")
        source.line(f"logits[{row}, {token}] = T.Select({x} < {real(0.0)}, {x} * {by}, {x} / {by})")
    return source.build()


def apply_bitmask_inplace(isa: Isa) -> Any:
    """Return the PrimFunc ``(logits, rows, mask)``: of each of ``rows`` (s,), logits whose bit is 0 become the lowest.

    mask (b, ceil(vocab / 32)) int32: bit v % 32 of word v // 32 of the logits' own row is token v's.
    """
    source = Source("apply_bitmask_inplace")
    source.buffer("logits", ("b", "vocab"), "float32")
    source.buffer("rows", ("s",), "int32")
    source.buffer("mask", ("b", "words"), "int32")
    with source.loop("i", "s", "parallel"):
        row = source.let("row", cast("int64", "rows[i]"))
        with source.loop("v", "vocab"):
            bit = f"T.bitwise_and(T.shift_right(mask[{row}, v // 32], {cast('int32', 'v % 32')}), T.int32(1))"
            with source.block(f"if {bit} == T.int32(0)"):
                source.line(f"logits[{row}, v] = {real(_LOWEST)}")
    return source.build()


def softmax_with_temperature(isa: Isa) -> Any:
    """Return the PrimFunc ``(x, temperature, y)``: y (b, vocab) = softmax(x / temperature), a row's own (b,) float32.

    Temperature 0 gives the largest logit all, shared where several are.
    """
    source = Source("softmax")
    source.buffer("x", ("b", "vocab"), "float32")
    source.buffer("temperature", ("b",), "float32")
    source.buffer("y", ("b", "vocab"), "float32")
    with source.loop("row", "b", "parallel"):
        most = {lanes: source.local("most", lanes, "float32") for lanes in (WIDTH, 1)}
        total = {lanes: source.local("total", lanes, "float32") for lanes in (WIDTH, 1)}
        for lanes in (WIDTH, 1):
            source.line(f"{most[lanes]}[{index('0', lanes)}] = {fill(real(_LOWEST), lanes)}")
            source.line(f"{total[lanes]}[{index('0', lanes)}] = {fill(real(0.0), lanes)}")

        def largest(k: str, lanes: int) -> None:
            at = f"{most[lanes]}[{index('0', lanes)}]"
            source.line(f"{at} = T.max({at}, x[row, {index(k, lanes)}])")

        sweep(source, "vocab", largest)
        vector = intrinsic("float32", "llvm.vector.reduce.fmax", f"{most[WIDTH]}[{index('0', WIDTH)}]")
        peak = source.let("peak", f"T.max({vector}, {most[1]}[0])")
        greedy = source.let("greedy", f"temperature[row] == {real(0.0)}")
        inverse = source.let("inverse", f"T.Select({greedy}, {real(0.0)}, {real(1.0)} / temperature[row])")

        def weight(k: str, lanes: int) -> None:
            x = source.let("x", f"x[row, {index(k, lanes)}]")
            drawn = exp(source, f"({x} - {fill(peak, lanes)}) * {fill(inverse, lanes)}", lanes)
            only = f"T.Select({x} == {fill(peak, lanes)}, {fill(real(1.0), lanes)}, {fill(real(0.0), lanes)})"
            y = source.let("y", f"T.Select({fill(greedy, lanes)}, {only}, {drawn})")
            at = f"{total[lanes]}[{index('0', lanes)}]"
            source.line(f"{at} = {at} + {y}")
            source.line(f"y[row, {index(k, lanes)}] = {y}")

        sweep(source, "vocab", weight)
        vector = intrinsic(
            "float32", "llvm.vector.reduce.fadd", f"{total[1]}[0]", f"{total[WIDTH]}[{index('0', WIDTH)}]"
        )
        share = source.let("share", f"{real(1.0)} / {vector}")

        def scaled(k: str, lanes: int) -> None:
            source.line(f"y[row, {index(k, lanes)}] = y[row, {index(k, lanes)}] * {fill(share, lanes)}")

        sweep(source, "vocab", scaled)
    return source.build()
