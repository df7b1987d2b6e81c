"""Select: score compressed keys and choose the blocks of the context that a sparse row reads (InfLLM-v2)."""

from __future__ import annotations

from typing import Any

from arkinfer.exporters.kernels.tir.attention_tile import (
    HIDDEN,
    LANES,
    NOTHING,
    highest,
    hold,
    largest,
    register_tile,
    scores,
    total,
)
from arkinfer.exporters.kernels.tir.compress import COARSE
from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.source import Source, bits, cast, exp, fma, integer, intrinsic, ramp, real, splat

LARGEST = 3.4028234663852886e38  # scores stop at the largest float32
FORCED = 0x7F800000  # the key of forced blocks: one above the bits of LARGEST


def select(
    isa: Isa,
    tokens: str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv: str,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    scale: float,
    init_blocks: int,
    local_blocks: int,
    budget: int,
    local_rule: str,
    lse: str,
) -> Any:
    """Return a PrimFunc: q (n, heads, head_dim) float32, layer, position, dense_len, fine, coarse -> blocks.

    fine and coarse (layers, kv_heads, panels, head_dim, 16), float32 or float16 (where the cache is int8); blocks
    (n, kv_heads, budget) int32: ascending ids, then -1. Rows with ``position`` + i + 1 < ``dense_len`` are left as they
    are: nobody reads them. The rules are those of arkinfer.ops.infllm.
    """
    del tokens  # one token is split over its kv heads, many over both: the same loop
    near = local_blocks - (1 if local_rule == "exclusive" else 0)
    shape = (heads, kv_heads, head_dim, "float16" if kv == "int8" else kv)
    return _Select(isa, *shape, kernel_size, kernel_stride, block_size, scale, init_blocks, near, budget, lse).build()


class _Select:
    def __init__(
        self, isa: Isa, heads: int, kv_heads: int, head_dim: int, kv: str, size: int, stride: int, block: int,
        scale: float, init_blocks: int, near: int, budget: int, lse: str,
    ) -> None:  # fmt: skip
        self.isa, self.heads, self.kv_heads, self.dim, self.kv = isa, heads, kv_heads, head_dim, kv
        self.group = heads // kv_heads
        self.size, self.stride, self.block, self.scale = size, stride, block, scale
        self.init_blocks, self.near, self.budget, self.lse = init_blocks, near, budget, lse
        self.height, (self.width,) = register_tile(isa, self.group, (4,))
        self.rows = -(-self.group // self.height) * self.height
        self.step = self.width * LANES  # kernels of one tile
        self.source = Source("select")

    def build(self) -> Any:
        source, dim = self.source, self.dim
        source.buffer("q", ("n", self.heads, dim), "float32")
        for name in ("layer", "position", "dense_len"):
            source.scalar(name)
        for name in ("fine", "coarse"):
            source.buffer(name, ("layers", self.kv_heads, f"{name}_panels", dim, LANES), self.kv)
        source.buffer("blocks", ("n", self.kv_heads, self.budget), "int32")
        source.line(f'q_flat = T.decl_buffer((n * {self.heads * dim},), "float32", data=q.data)')
        for name in ("fine", "coarse"):
            extent = f"layers * {self.kv_heads} * {name}_panels * {dim * LANES}"
            source.line(f'{name}_flat = T.decl_buffer(({extent},), "{self.kv}", data={name}.data)')
        source.line(f'blocks_flat = T.decl_buffer((n * {self.kv_heads * self.budget},), "int32", data=blocks.data)')
        room = source.let("room", f"(position + n) // {self.block} + 17")  # blocks, rounded up to vectors and one more
        kernels = source.let("kernels", f"(position + n) // {self.stride} + {2 * self.step}")
        first = source.let("first", "T.max(T.int64(0), dense_len - 1 - position)")  # rows before it are dense
        with source.loop("item", f"T.max(T.int64(0), n - {first}) * {self.kv_heads}", "parallel"):
            self._item(room, kernels, first)
        return source.build()

    def _buffer(self, name: str, size: int | str, dtype: str = "float32") -> None:
        self.source.line(f'{name} = T.alloc_buffer(({size},), "{dtype}", scope="global", align=64)')

    def _item(self, room: str, kernels: str, first: str) -> None:
        source, dim = self.source, self.dim
        self._buffer("query", self.rows * dim)
        self._buffer("logits", f"{self.rows} * {kernels}")
        self._buffer("merged", f"{kernels} + {2 * LANES + 2 * self.block // self.stride}")
        self._buffer("keys", f"{room} + {LANES}", "int32")
        self._buffer("chosen", self.budget + 1, "int32")
        self._buffer("peak", self.rows)
        self._buffer("share", self.rows)
        token = hold(source, "token", f"{first} + item // {self.kv_heads}")
        head = hold(source, "head", f"item % {self.kv_heads}")
        place = hold(source, "place", f"position + {token}")
        with source.loop("g", self.rows), source.loop("c", dim // LANES):
            at = ramp(f"({token} * {self.heads} + {head} * {self.group} + g) * {dim} + c * {LANES}", LANES)
            value = f"q_flat[{at}] * {real(self.scale, LANES)}"
            target = f"query[{ramp(f'g * {dim} + c * {LANES}', LANES)}]"
            if self.rows == self.group:
                source.line(f"{target} = {value}")
            else:
                with source.block(f"if g < {self.group}"):
                    source.line(f"{target} = {value}")
                with source.block("else"):
                    source.line(f"{target} = {real(0.0, LANES)}")
        fine = hold(source, "fine", self._visible(place, 1))
        length = hold(source, "length", f"({fine} + {self.step - 1}) // {self.step} * {self.step}")
        if self.lse == "coarse":
            coarse = hold(source, "coarse", self._visible(place, COARSE))
            self._logits("coarse", head, coarse, kernels)
            self._normalisers(coarse, kernels)
            self._logits("fine", head, fine, kernels)
        else:
            self._logits("fine", head, fine, kernels)
            self._normalisers(fine, kernels)
        self._merge(fine, length, kernels)
        own = hold(source, "own", f"{place} // {self.block}")
        self._pool(own, fine)
        self._choose(own, f"({token} * {self.kv_heads} + {head}) * {self.budget}")

    def _visible(self, place: str, factor: int) -> str:
        """Return the number of kernels that end at or before ``place``."""
        size, stride = self.size * factor, self.stride * factor
        return f"T.max(T.int64(0), ({place} + 1 - {size} + {stride}) // {stride})"

    def _logits(self, name: str, head: str, count: str, kernels: str) -> None:
        """Store q . k of all rows for the first ``count`` kernels; those that share the last panels are stored too."""
        source, dim = self.source, self.dim
        base = hold(source, "base", f"(layer * {self.kv_heads} + {head}) * {name}_panels * {dim * LANES}")
        with source.loop("tile", f"({count} + {self.step - 1}) // {self.step}"):
            # The last tile may reach over the end of the cache; it reads the last panel again, and a mask hides it.
            panels = [
                hold(source, "panel", f"{base} + T.min(tile * {self.width} + {i}, {name}_panels - 1) * {dim * LANES}")
                for i in range(self.width)
            ]
            with source.loop("row", self.rows // self.height):
                query = hold(source, "query", f"row * {self.height * dim}")
                ahead = (f"{name}_flat", f"{panels[0]} + {self.step * dim}")
                sums = scores(source, self.height, dim, f"{name}_flat", self.kv, panels, "query", query, ahead)
                for r in range(self.height):
                    for i in range(self.width):
                        at = f"(row * {self.height} + {r}) * {kernels} + tile * {self.step} + {i * LANES}"
                        source.line(f"logits[{ramp(at, LANES)}] = {sums[r][i]}[{ramp('0', LANES)}]")
            # Lanes beyond the visible kernels get no weight.
            partial = source.block(f"if (tile + 1) * {self.step} > {count}")
            with partial, source.loop("g", self.group), source.loop("x", self.width):
                at = f"logits[{ramp(f'g * {kernels} + tile * {self.step} + x * {LANES}', LANES)}]"
                left = splat(cast("int32", f"{count} - tile * {self.step} - x * {LANES}"), LANES)
                lanes = f"T.Ramp(T.int32(0), T.int32(1), {LANES})"
                source.line(f"{at} = T.Select({lanes} < {left}, {at}, {real(HIDDEN, LANES)})")

    def _normalisers(self, count: str, kernels: str) -> None:
        """Find for each row the largest logit and the inverse of the sum of exponentials, 0 if there is no kernel."""
        source = self.source
        whole = ramp("0", LANES)
        with source.loop("g", self.group):
            cell = source.local("cell", LANES, "float32")
            vectors = hold(source, "vectors", f"({count} + {LANES - 1}) // {LANES}")
            source.line(f"{cell}[{whole}] = {real(NOTHING, LANES)}")
            with source.loop("x", vectors):
                source.line(
                    f"{cell}[{whole}] = T.max({cell}[{whole}], logits[{ramp(f'g * {kernels} + x * {LANES}', LANES)}])"
                )
            top = source.let("top", highest(source, source.let("most", f"{cell}[{whole}]")))
            source.line(f"peak[g] = T.Shuffle([{top}], [0])")
            source.line(f"{cell}[{whole}] = {real(0.0, LANES)}")
            with source.loop("x", vectors):
                weight = exp(
                    source, f"logits[{ramp(f'g * {kernels} + x * {LANES}', LANES)}] - {splat('peak[g]', LANES)}", LANES
                )
                source.line(f"{cell}[{whole}] = {cell}[{whole}] + {weight}")
            amount = source.let("amount", total(f"{cell}[{whole}]"))
            source.line(f"share[g] = T.Select({amount} > T.float32(0), T.float32(1) / {amount}, T.float32(0))")

    def _merge(self, fine: str, length: str, kernels: str) -> None:
        """Sum the weights of the group's heads for every kernel; ``merged`` starts LANES places in, after zeros."""
        source = self.source
        source.line(f"merged[{ramp('0', LANES)}] = {real(0.0, LANES)}")
        with source.loop("x", f"{length} // {LANES}"):
            cell = source.local("cell", LANES, "float32")
            whole = ramp("0", LANES)
            source.line(f"{cell}[{whole}] = {real(0.0, LANES)}")
            with source.loop("g", self.group):
                logit = f"logits[{ramp(f'g * {kernels} + x * {LANES}', LANES)}]"
                weight = exp(source, f"{logit} - {splat('peak[g]', LANES)}", LANES)
                source.line(f"{cell}[{whole}] = {fma(weight, splat('share[g]', LANES), f'{cell}[{whole}]', LANES)}")
            left = splat(cast("int32", f"{fine} - x * {LANES}"), LANES)
            lanes = f"T.Ramp(T.int32(0), T.int32(1), {LANES})"
            value = f"T.min({cell}[{whole}], {real(LARGEST, LANES)})"
            kept = f"T.Select({lanes} < {left}, {value}, {real(0.0, LANES)})"
            source.line(f"merged[{ramp(f'{LANES} + x * {LANES}', LANES)}] = {kept}")

    def _pool(self, own: str, length: str) -> None:
        """Max-pool kernels to blocks; scores are not negative, so their bits order like integers."""
        source, ratio = self.source, self.block // self.stride
        with source.loop("x", f"T.max(T.int64(0), ({own} + 1) * {ratio} - {length})"):
            source.line(f"merged[{LANES} + {length} + x] = T.float32(0)")
        near = hold(source, "near", f"{own} - {self.near}")
        with source.loop("b", f"{own} + 1"):
            base = hold(source, "base", f"b * {ratio} + {LANES - 1}")
            best = largest([f"merged[{base} + {i}]" for i in range(ratio + 1)])
            source.line(
                f"keys[b] = T.Select(b < {self.init_blocks} or b >= {near}, T.int32({FORCED}), {bits('int32', best)})"
            )
        with source.loop("x", LANES):
            source.line(f"keys[{own} + 1 + x] = -1")

    def _count(self, vectors: str, test: str) -> str:
        """Return the number of keys that pass ``test``, a comparison with a scalar."""
        source = self.source
        cell = source.local("cell", LANES, "int32")
        whole = ramp("0", LANES)
        source.line(f"{cell}[{whole}] = {integer(0, LANES)}")
        with source.loop("x", vectors):
            operator, value = test.split(" ", 1)
            passed = f"keys[{ramp(f'x * {LANES}', LANES)}] {operator} {splat(value, LANES)}"
            source.line(
                f"{cell}[{whole}] = {cell}[{whole}] + T.Select({passed}, {integer(1, LANES)}, {integer(0, LANES)})"
            )
        return source.let("passed", intrinsic("int32", "llvm.vector.reduce.add", f"{cell}[{whole}]"))

    def _choose(self, own: str, target: str) -> None:
        """Write the best ``budget`` of the blocks 0..own in ascending order; of equal ones the lower id goes first."""
        source = self.source
        vectors = hold(source, "vectors", f"({own} + {LANES}) // {LANES}")
        low, high = source.local("low", 1, "int32"), source.local("high", 1, "int32")
        ties = source.local("ties", 1, "int32")
        source.line(f"{low}[0] = 0")
        source.line(f"{ties}[0] = {self.budget}")
        with source.block(f"if {own} + 1 > {self.budget}"):
            # The largest key that at least ``budget`` blocks reach.
            source.line(f"{high}[0] = {FORCED + 1}")
            with source.loop("round", 31):
                middle = source.let("middle", f"{low}[0] + ({high}[0] - {low}[0]) // 2")
                reached = self._count(vectors, f">= {middle}")
                with source.block(f"if {reached} >= {self.budget}"):
                    source.line(f"{low}[0] = {middle}")
                with source.block("else"):
                    source.line(f"{high}[0] = {middle}")
            above = self._count(vectors, f"> {low}[0]")
            source.line(f"{ties}[0] = {self.budget} - {above}")
        used = source.local("used", 1, "int32")
        source.line(f"{used}[0] = 0")
        with source.block(f"if {own} + 1 > {self.budget}"):
            with source.loop("b", f"{own} + 1"):
                # Without branches: an untaken block is overwritten by the next.
                tie = source.let("tie", f'T.Cast("int32", keys[b] == {low}[0] and {ties}[0] > 0)')
                source.line(f'chosen[{used}[0]] = T.Cast("int32", b)')
                source.line(f'{used}[0] = {used}[0] + T.Cast("int32", keys[b] > {low}[0]) + {tie}')
                source.line(f"{ties}[0] = {ties}[0] - {tie}")
            with source.loop("x", self.budget):
                source.line(f"blocks_flat[{target} + x] = chosen[x]")
        with source.block("else"), source.loop("x", self.budget):
            source.line(f'blocks_flat[{target} + x] = T.Select(x <= {own}, T.Cast("int32", x), -1)')
