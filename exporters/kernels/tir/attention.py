"""Attention over the cache: dense rows read every block up to their position, sparse rows the blocks chosen for them.

The context is cut into splits of SPLIT tokens at fixed positions. A row runs an online softmax within each split and
folds the splits in order; the decode form computes splits in parallel, the prefill form one after the other, with the
same bits. A sparse row whose every block is chosen equals the dense row, since blocks are visited in ascending order.
"""

from __future__ import annotations

from typing import Any

from arkinfer.exporters.kernels.tir.attention_tile import (
    LANES,
    NOTHING,
    Caches,
    Rows,
    attend_block,
    fold,
    hold,
    register_tile,
)
from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.source import Source, ramp, real, splat

SPLIT = 1024  # tokens; partial results add about 2 % to what is read of a float16 cache
DENSE_BLOCK = 64  # tokens of a block where no sparse configuration says otherwise
_LANES = 8  # classes of splits, by their number's remainder, that the decode form runs in parallel
TILE_ROWS = 32  # rows of a prefill tile: their state should stay in the first-level cache


def unsupported(head_dim: int, block_size: int = DENSE_BLOCK, kernel_stride: int = LANES) -> list[str]:
    """Return one sentence for each number that the attention kernels cannot handle."""
    reasons = []
    for name, value in (("head_dim", head_dim), ("sparse_config.block_size", block_size)):
        if value % LANES:
            reasons.append(f"{name} {value} is not a multiple of {LANES}")
    if block_size % kernel_stride:
        reasons.append(f"sparse_config.block_size {block_size} is not a multiple of kernel_stride {kernel_stride}")
    return reasons


def attention_dense(isa: Isa, tokens: str, *, heads: int, kv_heads: int, head_dim: int, kv: str, scale: float) -> Any:
    """Return a PrimFunc: q (n, heads, head_dim) float32, layer, position, caches -> out (n, heads, head_dim) float32.

    Token i lies at ``position`` + i and attends to itself and everything before. Caches: k (layers, kv_heads, panels,
    head_dim, 16), v (layers, kv_heads, capacity, head_dim), for int8 also their scales (layers, kv_heads, capacity).
    """
    return _Attention(isa, heads, kv_heads, head_dim, kv, scale, DENSE_BLOCK, 0).build(tokens)


def attention(
    isa: Isa,
    tokens: str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv: str,
    scale: float,
    block_size: int,
    budget: int,
) -> Any:
    """Return a PrimFunc: q, blocks (n, kv_heads, budget) int32, layer, position, dense_len, caches -> out.

    As attention_dense, but token i is sparse iff ``position`` + i + 1 >= ``dense_len``; then it reads only ``blocks``:
    ascending ids, -1 for none.
    """
    return _Attention(isa, heads, kv_heads, head_dim, kv, scale, block_size, budget).build(tokens)


class _Attention:
    def __init__(
        self, isa: Isa, heads: int, kv_heads: int, head_dim: int, kv: str, scale: float, block: int, budget: int
    ) -> None:
        self.isa, self.kv_heads, self.dim, self.kv, self.scale = isa, kv_heads, head_dim, kv, scale
        self.heads, self.group = heads, heads // kv_heads
        self.block, self.budget = block, budget
        self.blocks_per_split = max(1, SPLIT // block)
        counts = (block // LANES, head_dim // LANES)
        self.height, _ = register_tile(isa, self.group, counts)
        self.rows = -(-self.group // self.height) * self.height  # rows of a token, with idle ones that fill the tile
        most, _ = register_tile(isa, 1024, counts)
        self.joined = max(1, most // self.group) if self.rows == self.group else 1  # tokens that share a register tile
        self.source = Source("attention" if budget else "attention_dense")

    def build(self, tokens: str) -> Any:
        source = self.source
        source.buffer("q", ("n", self.heads, self.dim), "float32")
        if self.budget:
            source.buffer("blocks", ("n", self.kv_heads, self.budget), "int32")
        source.scalar("layer")
        source.scalar("position")
        if self.budget:
            source.scalar("dense_len")
        Caches.declare(source, self.kv, self.kv_heads, self.dim)
        source.buffer("out", ("n", self.heads, self.dim), "float32")
        Caches.flatten(source, self.kv, self.kv_heads, self.dim)
        source.line(f'q_flat = T.decl_buffer((n * {self.heads * self.dim},), "float32", data=q.data)')
        source.line(f'out_flat = T.decl_buffer((n * {self.heads * self.dim},), "float32", data=out.data)')
        if self.budget:
            source.line(f'blocks_flat = T.decl_buffer((n * {self.kv_heads * self.budget},), "int32", data=blocks.data)')
        if tokens == "one":
            self._decode()
        else:
            self._prefill()
        return source.build()

    def _buffer(self, name: str, size: int | str) -> None:
        self.source.line(f'{name} = T.alloc_buffer(({size},), "float32", scope="global", align=64)')

    def _load_query(self, token: str, head: str, row: str) -> None:
        """Copy the scaled query rows of one token to ``query`` from ``row`` on; idle rows become 0."""
        source, dim = self.source, self.dim
        with source.loop("g", self.group), source.loop("c", dim // LANES):
            at = ramp(f"(({token}) * {self.heads} + {head} * {self.group} + g) * {dim} + c * {LANES}", LANES)
            source.line(
                f"query[{ramp(f'({row} + g) * {dim} + c * {LANES}', LANES)}] = q_flat[{at}] * {real(self.scale, LANES)}"
            )
        if self.rows > self.group:
            with source.loop("g", self.rows - self.group), source.loop("c", dim // LANES):
                source.line(
                    f"query[{ramp(f'({row} + {self.group} + g) * {dim} + c * {LANES}', LANES)}] = {real(0.0, LANES)}"
                )

    def _store(self, token: str, head: str, state: Rows) -> None:
        """Write the output of one token: the folded rows divided by their weight."""
        source, dim = self.source, self.dim
        with source.loop("g", self.group):
            share = source.let("share", splat(f"T.float32(1) / {state.weight}[({state.row} + g) * {LANES}]", LANES))
            with source.loop("c", dim // LANES):
                at = ramp(f"(({token}) * {self.heads} + {head} * {self.group} + g) * {dim} + c * {LANES}", LANES)
                value = f"{state.output}[{ramp(f'({state.row} + g) * {dim} + c * {LANES}', LANES)}]"
                source.line(f"out_flat[{at}] = {value} * {share}")

    def _token_block(self, caches: Caches, state: Rows, block: str, following: str, position: str) -> None:
        """Let the rows of one token attend to one block, a register tile at a time."""
        source = self.source
        scratch = ("weights", "decay")
        with source.loop("tile", self.rows // self.height):
            part = state.shifted(hold(source, "offset", f"tile * {self.height}"))
            positions = [position] * self.height
            attend_block(source, self.isa, caches, self.block, self.height, part, block, following, positions, scratch)

    def _decode(self) -> None:
        source, dim, step = self.source, self.dim, self.blocks_per_split
        splits = source.let("splits", f"(position + n - 1) // {step * self.block} + 1")
        eighth = source.let("eighth", f"(({splits}) + {_LANES - 1}) // {_LANES}")
        states = f"n * {self.kv_heads} * {splits} * {self.rows}"
        self._buffer("part_output", f"{states} * {dim}")
        self._buffer("part_maximum", states)
        self._buffer("part_weight", f"{states} * {LANES}")
        # Threads take runs of items. Counting with the bits reversed spreads each run over the whole context, so that
        # the local window of a sparse row does not fall to one thread.
        with source.loop("item", f"n * {self.kv_heads * _LANES}", "parallel"):
            self._buffer("query", self.rows * dim)
            self._buffer("weights", self.height * self.block)
            source.line(f'decay = T.alloc_buffer(({LANES},), "float32", scope="local", align=64)')
            plane = hold(source, "plane", f"item // {_LANES}")
            lane = hold(source, "lane", "item % 2 * 4 + item // 2 % 2 * 2 + item // 4 % 2")
            token = hold(source, "token", f"{plane} // {self.kv_heads}")
            head = hold(source, "head", f"{plane} % {self.kv_heads}")
            place = hold(source, "place", f"position + {token}")
            source.line(f"decay[{ramp('0', LANES)}] = {real(0.0, LANES)}")
            with source.loop("e", eighth):
                split = hold(source, "split", f"e * {_LANES} + {lane}")
                with source.block(f"if {split} < {splits}"):
                    row = hold(source, "row", f"({plane} * {splits} + {split}) * {self.rows}")
                    state = Rows("", "", "part_output", "part_maximum", "part_weight", row)
                    state.reset(source, str(self.rows), dim)
            self._load_query(token, head, "0")
            caches = Caches.at(source, self.kv, self.kv_heads, dim, head)
            self._decode_blocks(caches, token, head, place, lane, plane, splits, eighth)
        with source.block(f"if {splits} > 4"):
            self._decode_fold(splits, "parallel")
        with source.block("else"):
            self._decode_fold(splits, "serial")

    def _decode_blocks(
        self, caches: Caches, token: str, head: str, place: str, lane: str, plane: str, splits: str, eighth: str
    ) -> None:
        """Visit the blocks of those splits whose number ends in ``lane``."""
        source, step = self.source, self.blocks_per_split

        def every(b: str) -> str:
            return f"({b} // {step} * {_LANES} + {lane}) * {step} + {b} % {step}"

        def chosen(b: str) -> str:
            return f'T.Cast("int64", blocks_flat[({token} * {self.kv_heads} + {head}) * {self.budget} + {b}])'

        count, block, following = f"{eighth} * {step}", every("b"), every("(b + 1)")
        if self.budget:
            dense = source.let("dense", f"{place} + 1 < dense_len")
            count = hold(source, "count", f"T.Select({dense}, {count}, T.int64({self.budget}))")
            block = f"T.if_then_else({dense}, {block}, {chosen('b')})"
            after = chosen(f"T.min(b + 1, T.int64({self.budget - 1}))")
            following = f"T.if_then_else({dense}, {following}, {after})"
        with source.loop("b", count):
            block = hold(source, "block", block)
            split = hold(source, "split", f"{block} // {step}")
            inside = f"{block} >= 0 and {block} * {self.block} <= {place}"
            with source.block(f"if {split} % {_LANES} == {lane} and {inside}"):
                row = hold(source, "row", f"({plane} * {splits} + {split}) * {self.rows}")
                state = Rows("query", "T.int64(0)", "part_output", "part_maximum", "part_weight", row)
                self._token_block(caches, state, block, hold(source, "following", following), place)

    def _decode_fold(self, splits: str, kind: str) -> None:
        source, dim = self.source, self.dim
        with source.loop("plane", f"n * {self.kv_heads}", kind):
            self._buffer("whole_output", self.rows * dim)
            self._buffer("whole_maximum", self.rows)
            self._buffer("whole_weight", self.rows * LANES)
            whole = Rows("", "", "whole_output", "whole_maximum", "whole_weight", "0")
            whole.reset(source, str(self.rows), dim)
            with source.loop("split", splits):
                row = hold(source, "row", f"(plane * {splits} + split) * {self.rows}")
                fold(
                    source, Rows("", "", "part_output", "part_maximum", "part_weight", row), whole, str(self.group), dim
                )
            self._store(f"plane // {self.kv_heads}", f"(plane % {self.kv_heads})", whole)

    def _prefill(self) -> None:
        source, dim, step = self.source, self.dim, self.blocks_per_split
        size = max(1, TILE_ROWS // self.rows // self.joined) * self.joined  # tokens of a tile
        tiles = source.let("tiles", f"(n + {size - 1}) // {size}")
        with source.loop("item", f"{tiles} * {self.kv_heads}", "parallel"):
            for name, width in (
                ("query", dim),
                ("output", dim),
                ("whole_output", dim),
                ("maximum", 1),
                ("whole_maximum", 1),
            ):
                self._buffer(name, size * self.rows * width)
            self._buffer("weight", size * self.rows * LANES)
            self._buffer("whole_weight", size * self.rows * LANES)
            self._buffer("weights", self.height * self.joined * self.block)
            self._buffer("decay", LANES)
            source.line(f'cursor = T.alloc_buffer(({size},), "int32", scope="local")')
            source.line(f'wanted = T.alloc_buffer(({size},), "int32", scope="local")')
            turn = hold(source, "turn", f"item // {self.kv_heads}")
            head = hold(source, "head", f"item % {self.kv_heads}")
            # Later tokens see more: pairing the first tile with the last gives every run of items the same work.
            tile = hold(source, "tile", f"T.Select({turn} % 2 == 0, {turn} // 2, {tiles} - 1 - {turn} // 2)")
            start = hold(source, "start", f"{tile} * {size}")
            count = hold(source, "count", f"T.min(T.int64({size}), n - {start})")
            state = Rows("query", "T.int64(0)", "output", "maximum", "weight", "T.int64(0)")
            whole = Rows("", "", "whole_output", "whole_maximum", "whole_weight", "T.int64(0)")
            state.reset(source, str(size * self.rows), dim)
            whole.reset(source, str(size * self.rows), dim)
            source.line(f"decay[{ramp('0', LANES)}] = {real(0.0, LANES)}")
            with source.loop("t", count):
                self._load_query(f"{start} + t", head, f"t * {self.rows}")
                source.line("cursor[t] = 0")
            caches = Caches.at(source, self.kv, self.kv_heads, dim, head)
            last = hold(source, "last", f"(position + {start} + {count} - 1) // {self.block}")
            with source.loop("split", f"{last} // {step} + 1"):
                with source.loop("b", f"T.min(T.int64({step}), {last} + 1 - split * {step})"):
                    self._prefill_block(
                        caches, state, size, start, count, head, hold(source, "block", f"split * {step} + b")
                    )
                fold(source, state, whole, f"{count} * {self.rows}", dim)
                state.reset(source, f"{count} * {self.rows}", dim)
            with source.loop("t", count):
                self._store(f"{start} + t", head, whole.shifted(f"t * {self.rows}"))

    def _prefill_block(
        self, caches: Caches, state: Rows, size: int, start: str, count: str, head: str, block: str
    ) -> None:
        """Let every token of the tile that wants ``block`` attend; neighbours that all do share register tiles."""
        source = self.source
        with source.loop("t", size):
            source.line("wanted[t] = 0")
        with source.loop("t", count):
            place = hold(source, "place", f"position + {start} + t")
            if self.budget:
                with source.block(f"if {place} + 1 < dense_len"):
                    source.line(f'wanted[t] = T.Cast("int32", {block} * {self.block} <= {place})')
                with source.block("else"), source.block(f"if cursor[t] < {self.budget}"):
                    at = f"(({start} + t) * {self.kv_heads} + {head}) * {self.budget} + cursor[t]"
                    with source.block(f'if blocks_flat[{at}] == T.Cast("int32", {block})'):
                        source.line("wanted[t] = 1")
                        source.line("cursor[t] = cursor[t] + 1")
            else:
                source.line(f'wanted[t] = T.Cast("int32", {block} * {self.block} <= {place})')
        following = hold(source, "following", f"{block} + 1")
        if self.joined == 1:
            with source.loop("t", count), source.block("if wanted[t] == 1"):
                place = hold(source, "place", f"position + {start} + t")
                self._token_block(caches, state.shifted(f"t * {self.rows}"), block, following, place)
            return
        with source.loop("u", size // self.joined):
            together = " + ".join(f"wanted[u * {self.joined} + {i}]" for i in range(self.joined))
            with source.block(f"if {together} == {self.joined}"):
                places = [
                    hold(source, "place", f"position + {start} + u * {self.joined} + {i}") for i in range(self.joined)
                ]
                part = state.shifted(f"u * {self.joined * self.rows}")
                positions = [place for place in places for _ in range(self.group)]
                scratch = ("weights", "decay")
                attend_block(
                    source, self.isa, caches, self.block, len(positions), part, block, following, positions, scratch
                )
            with source.block("else"), source.loop("i", self.joined):
                t = hold(source, "t", f"u * {self.joined} + i")
                with source.block(f"if wanted[{t}] == 1"):
                    place = hold(source, "place", f"position + {start} + {t}")
                    self._token_block(caches, state.shifted(f"{t} * {self.rows}"), block, following, place)


__all__ = ["NOTHING", "attention", "attention_dense", "unsupported"]
