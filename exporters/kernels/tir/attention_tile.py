"""The inner part of attention: a tile of query rows against one block of cached keys and values.

Rows are query heads; all heads of one group read the same keys, so a tile loads each key once for several rows. What a
row computes does not depend on the tile that it lies in: every score is one chain of fused multiply-adds over the
head's dimensions, every output one chain over the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.source import Source, cast, exp, fma, intrinsic, ramp, real, splat

LANES = 16  # tokens of a panel of keys
NOTHING = -1e30  # the running maximum before any score; finite, so that differences with it are no NaN

HIDDEN = -3e38  # the score of a token after the row's own; its exponential is 0 whatever the maximum

_VECTOR = "float32x16"


def register_tile(isa: Isa, rows: int, vectors: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Return (rows of a tile, vectors of a tile for each count in ``vectors``) whose sums fit into the registers.

    ``vectors`` are numbers of 16-lane vectors that the tile's loop must divide.
    """
    room = 16 if isa.lanes == 16 else 6  # AVX2 and NEON: 12 and 24 registers of sums
    most = min(8, room)
    height = rows
    if rows > most:
        # A tile that divides the rows wastes none; below half the height the loads would dominate.
        height = min(range(most, most // 2 - 1, -1), key=lambda size: (-(-rows // size) * size, -size))
    widths = tuple(
        max(w for w in range(1, max(1, room // height) + 1) if count % w == 0 and w <= 4) for count in vectors
    )
    return height, widths


@dataclass(frozen=True)
class Caches:
    """Flat views of one layer's caches for one kv head, as names and offsets in the kernel's text."""

    kv: str
    head_dim: int
    k: str
    v: str
    k_scale: str
    v_scale: str
    k_base: str
    v_base: str
    scale_base: str

    @staticmethod
    def declare(source: Source, kv: str, kv_heads: int, head_dim: int) -> None:
        """Declare the cache parameters: k, v and, for int8, their scales."""
        source.buffer("k", ("layers", kv_heads, "k_panels", head_dim, LANES), kv)
        source.buffer("v", ("layers", kv_heads, "capacity", head_dim), kv)
        if kv == "int8":
            source.buffer("k_scale", ("layers", kv_heads, "capacity"), "float32")
            source.buffer("v_scale", ("layers", kv_heads, "capacity"), "float32")

    @staticmethod
    def flatten(source: Source, kv: str, kv_heads: int, head_dim: int) -> None:
        """Emit flat views, which keep the index arithmetic in our hands."""
        source.line(
            f'k_flat = T.decl_buffer((layers * {kv_heads} * k_panels * {head_dim * LANES},), "{kv}", data=k.data)'
        )
        source.line(f'v_flat = T.decl_buffer((layers * {kv_heads} * capacity * {head_dim},), "{kv}", data=v.data)')
        if kv == "int8":
            for name in ("k_scale", "v_scale"):
                source.line(
                    f'{name}_flat = T.decl_buffer((layers * {kv_heads} * capacity,), "float32", data={name}.data)'
                )

    @classmethod
    def at(cls, source: Source, kv: str, kv_heads: int, head_dim: int, head: str) -> Caches:
        """Bind the offsets of kv head ``head`` of ``layer``."""
        plane = hold(source, "plane", f"layer * {kv_heads} + {head}")
        return cls(
            kv,
            head_dim,
            "k_flat",
            "v_flat",
            "k_scale_flat",
            "v_scale_flat",
            hold(source, "k_base", f"{plane} * k_panels * {head_dim * LANES}"),
            hold(source, "v_base", f"{plane} * capacity * {head_dim}"),
            hold(source, "scale_base", f"{plane} * capacity"),
        )


def hold(source: Source, name: str, value: str) -> str:
    """Bind an int64 ``value`` to a name that TVM does not look through, and return it.

    Its simplifier would substitute a plain binding into every index and prove things about the result for seconds.
    """
    cell = source.local(name, 1, "int64")
    source.line(f"{cell}[0] = {value}")
    return f"{cell}[0]"


def prefetch(source: Source, buffer: str, start: str, count: int, dtype: str) -> None:
    """Emit a hint to load ``count`` elements of ``buffer`` soon; it may point beyond the buffer's end."""
    item = {"float32": 4, "float16": 2, "int8": 1}[dtype]
    for line in range(max(1, count * item // 64)):
        address = f"T.address_of({buffer}[{start} + {line * 64 // item}])"
        hint = f'"llvm.prefetch.p0", {address}, T.int32(0), T.int32(3), T.int32(1)'
        source.line(f'T.evaluate(T.call_llvm_intrin("void", {hint}))')


def widened(buffer: str, start: str, dtype: str) -> str:
    """Return 16 consecutive elements of ``buffer`` as float32."""
    value = f"{buffer}[{ramp(start, LANES)}]"
    return value if dtype == "float32" else cast(_VECTOR, value)


def scores(
    source: Source,
    rows: int,
    head_dim: int,
    keys: str,
    dtype: str,
    panels: Sequence[str],
    query: str,
    query_base: str,
    ahead: tuple[str, str] | None = None,
) -> list[list[str]]:
    """Emit q . k for ``rows`` query rows and some panels of 16 keys; return the names of the sums [row][panel].

    ``panels``: where each starts in ``keys``. Row r starts at ``query_base`` + r * head_dim of ``query``. ``ahead``: a
    buffer of the same dtype and an offset in it, from where as much as is read here should be fetched meanwhile.
    """
    sums = [[source.local("sum", LANES, "float32") for _ in panels] for _ in range(rows)]
    whole = ramp("0", LANES)
    for row in sums:
        for name in row:
            source.line(f"{name}[{whole}] = {real(0.0, LANES)}")
    with source.loop("j", head_dim):
        columns = [source.let("key", widened(keys, f"{panel} + j * {LANES}", dtype)) for panel in panels]
        if ahead is not None:
            prefetch(source, ahead[0], f"{ahead[1]} + j * {len(panels) * LANES}", len(panels) * LANES, dtype)
        for r, row in enumerate(sums):
            q = source.let("q", splat(f"{query}[{query_base} + {r * head_dim} + j]", LANES))
            for name, column in zip(row, columns, strict=True):
                source.line(f"{name}[{whole}] = {fma(column, q, f'{name}[{whole}]', LANES)}")
    return sums


def highest(source: Source, vector: str) -> str:
    """Emit the largest of 16 lanes and return it in every lane."""
    for step in (8, 4, 2, 1):
        swapped = ", ".join(str(lane ^ step) for lane in range(LANES))
        vector = source.let("high", f"T.max({vector}, T.Shuffle([{vector}], [{swapped}]))")
    return vector


def total(vector: str) -> str:
    """Return the sum of 16 lanes, first to last."""
    return intrinsic("float32", "llvm.vector.reduce.fadd", "T.float32(0)", vector)


@dataclass(frozen=True)
class Rows:
    """Online-softmax state of query rows, as buffer names and the offset of its first row in each.

    query and output hold head_dim floats a row, maximum one, weight (the sum of exponentials) 16.
    """

    query: str
    query_row: str
    output: str
    maximum: str
    weight: str
    row: str

    def shifted(self, offset: str) -> Rows:
        """Return the same buffers from ``offset`` rows on."""
        return Rows(
            self.query,
            f"({self.query_row} + {offset})",
            self.output,
            self.maximum,
            self.weight,
            f"({self.row} + {offset})",
        )

    def reset(self, source: Source, count: str, head_dim: int) -> None:
        """Emit the state before any score for ``count`` rows."""
        with source.loop("r0", count):
            source.line(f"{self.maximum}[{self.row} + r0] = T.float32({NOTHING})")
            source.line(f"{self.weight}[{ramp(f'({self.row} + r0) * {LANES}', LANES)}] = {real(0.0, LANES)}")
            with source.loop("c0", head_dim // LANES):
                at = ramp(f"({self.row} + r0) * {head_dim} + c0 * {LANES}", LANES)
                source.line(f"{self.output}[{at}] = {real(0.0, LANES)}")


def attend_block(
    source: Source,
    isa: Isa,
    caches: Caches,
    block_size: int,
    rows: int,
    state: Rows,
    block: str,
    following: str,
    positions: Sequence[str],
    scratch: tuple[str, str],
) -> None:
    """Emit ``rows`` rows of ``state``, one register tile, attending to the tokens of ``block`` up to their positions.

    ``positions``: one int64 name a row. ``following``: the block that comes next, whose keys are fetched meanwhile: the
    processor's own prefetching does not foresee the jumps between keys, values and chosen blocks. scratch: buffers of
    rows * block_size and of 16 floats.
    """
    dim, panels = caches.head_dim, block_size // LANES
    _, (key_width, value_width) = register_tile(isa, rows, (panels, dim // LANES))
    weights, decay = scratch
    whole = ramp("0", LANES)
    first = hold(source, "first", f"{block} * {block_size}")
    with source.loop("pg", panels // key_width):
        base = hold(source, "key_base", f"{caches.k_base} + ({block} * {panels} + pg * {key_width}) * {dim * LANES}")
        query_base = hold(source, "query_base", f"{state.query_row} * {dim}")
        bases = [f"{base} + {i * dim * LANES}" for i in range(key_width)]
        ahead = hold(source, "ahead", f"{caches.v_base} + {first} * {dim} + pg * {key_width * dim * LANES}")
        sums = scores(source, rows, dim, caches.k, caches.kv, bases, state.query, query_base, (caches.v, ahead))
        for i in range(key_width):
            scale = ""
            if caches.kv == "int8":
                at = f"{caches.scale_base} + {first} + (pg * {key_width} + {i}) * {LANES}"
                scale = " * " + source.let("scale", f"{caches.k_scale}[{ramp(at, LANES)}]")
            for r in range(rows):
                at = ramp(f"{r * block_size} + (pg * {key_width} + {i}) * {LANES}", LANES)
                source.line(f"{weights}[{at}] = {sums[r][i]}[{whole}]{scale}")
    distinct = list(dict.fromkeys(positions))
    furthest = hold(source, "furthest", distinct[0] if len(distinct) == 1 else largest(distinct))
    nearest = hold(source, "nearest", distinct[0] if len(distinct) == 1 else largest(distinct, "T.min"))
    with source.block(f"if {first} + {block_size - 1} > {nearest}"):
        shared = rows // len(distinct)  # rows of one token
        for token, position in enumerate(distinct):
            last = source.let(
                "last", splat(cast("int32", f"T.min({position} - {first}, T.int64({block_size}))"), LANES)
            )
            with source.loop("r0", shared), source.loop("x", panels):
                at = f"{weights}[{ramp(f'({token * shared} + r0) * {block_size} + x * {LANES}', LANES)}]"
                lanes = f'T.Ramp(T.Cast("int32", x) * {LANES}, T.int32(1), {LANES})'
                source.line(f"{at} = T.Select({lanes} <= {last}, {at}, {real(HIDDEN, LANES)})")
    with source.loop("r1", rows):
        parts = [
            source.let("s", f"{weights}[{ramp(f'r1 * {block_size} + {i * LANES}', LANES)}]") for i in range(panels)
        ]
        peak = highest(source, source.let("peak", largest(parts)))
        old = source.let("old", f"{state.maximum}[{state.row} + r1]")
        new = source.let("new", f"T.max({old}, T.Shuffle([{peak}], [0]))")
        source.line(f"{decay}[r1] = {old} - {new}")
        source.line(f"{state.maximum}[{state.row} + r1] = {new}")
    source.line(f"{decay}[{whole}] = {exp(source, f'{decay}[{whole}]', LANES)}")
    with source.loop("r2", rows):
        new = source.let("new", splat(f"{state.maximum}[{state.row} + r2]", LANES))
        weight = f"{state.weight}[{ramp(f'({state.row} + r2) * {LANES}', LANES)}]"
        source.line(f"{weight} = {fma(weight, splat(f'{decay}[r2]', LANES), real(0.0, LANES), LANES)}")
        with source.loop("x", panels):
            at = f"{weights}[{ramp(f'r2 * {block_size} + x * {LANES}', LANES)}]"
            value = exp(source, f"{at} - {new}", LANES)
            source.line(f"{weight} = {weight} + {value}")
            if caches.kv == "int8":
                value += f" * {caches.v_scale}[{ramp(f'{caches.scale_base} + {first} + x * {LANES}', LANES)}]"
            source.line(f"{at} = {value}")
    count = hold(source, "count", f"T.min({furthest} - {first} + 1, T.int64({block_size}))")
    next_keys = hold(source, "next_keys", f"{caches.k_base} + {following} * {block_size * dim}")
    with source.loop("cg", dim // LANES // value_width):
        column = hold(source, "column", f"cg * {value_width * LANES}")
        sums = [[source.local("out", LANES, "float32") for _ in range(value_width)] for _ in range(rows)]

        def output(r: int, i: int) -> str:
            return f"{state.output}[{ramp(f'({state.row} + {r}) * {dim} + {column} + {i * LANES}', LANES)}]"

        for r in range(rows):
            for i in range(value_width):
                source.line(f"{sums[r][i]}[{whole}] = {output(r, i)} * {splat(f'{decay}[{r}]', LANES)}")
        with source.loop("t", count):
            at = hold(source, "at", f"{caches.v_base} + ({first} + t) * {dim} + {column}")
            values = [
                source.let("value", widened(caches.v, f"{at} + {i * LANES}", caches.kv)) for i in range(value_width)
            ]
            fetch = f"{next_keys} + (cg * {block_size} + t) * {value_width * LANES}"
            prefetch(source, caches.k, fetch, value_width * LANES, caches.kv)
            for r in range(rows):
                p = source.let("p", splat(f"{weights}[{r * block_size} + t]", LANES))
                for i in range(value_width):
                    name = f"{sums[r][i]}[{whole}]"
                    source.line(f"{name} = {fma(values[i], p, name, LANES)}")
        for r in range(rows):
            for i in range(value_width):
                source.line(f"{output(r, i)} = {sums[r][i]}[{whole}]")


def fold(source: Source, part: Rows, whole: Rows, rows: str, head_dim: int) -> None:
    """Emit the merge of ``part``, one split of the context, into ``whole``; there ``weight`` has one float in lane 0.

    Splits without a score leave no trace. Their order is that of the context, in every form of the kernel.
    """
    with source.loop("r3", rows):
        ours, theirs = f"({whole.row} + r3)", f"({part.row} + r3)"
        with source.block(f"if {part.maximum}[{theirs}] > T.float32({NOTHING})"):
            old = source.let("old", f"{whole.maximum}[{ours}]")
            new = source.let("new", f"T.max({old}, {part.maximum}[{theirs}])")
            whole_lanes = ramp("0", LANES)
            factors = source.local("factors", LANES, "float32")
            source.line(f"{factors}[{whole_lanes}] = {real(0.0, LANES)}")
            source.line(f"{factors}[0] = {old} - {new}")
            source.line(f"{factors}[1] = {part.maximum}[{theirs}] - {new}")
            source.line(f"{factors}[{whole_lanes}] = {exp(source, f'{factors}[{whole_lanes}]', LANES)}")
            keep, take = splat(f"{factors}[0]", LANES), splat(f"{factors}[1]", LANES)
            source.line(f"{whole.maximum}[{ours}] = {new}")
            mine = f"{whole.weight}[{ramp(f'{ours} * {LANES}', LANES)}]"
            more = splat(total(f"{part.weight}[{ramp(f'{theirs} * {LANES}', LANES)}]"), LANES)
            source.line(f"{mine} = {fma(more, take, f'{mine} * {keep}', LANES)}")
            with source.loop("c3", head_dim // LANES):
                mine = f"{whole.output}[{ramp(f'{ours} * {head_dim} + c3 * {LANES}', LANES)}]"
                more = f"{part.output}[{ramp(f'{theirs} * {head_dim} + c3 * {LANES}', LANES)}]"
                source.line(f"{mine} = {fma(more, take, f'{mine} * {keep}', LANES)}")


def largest(terms: Sequence[str], function: str = "T.max") -> str:
    if len(terms) == 1:
        return terms[0]
    middle = len(terms) // 2
    return f"{function}({largest(terms[:middle], function)}, {largest(terms[middle:], function)})"
