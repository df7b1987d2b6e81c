"""Kernels of a key and value cache in pages, as TVM's PagedAttentionKVCache, which MLC uses, calls them.

Pages (pages, 2, kv_heads, 16, head_dim) hold keys at 0 and values at 1. Queries, keys, values, pages and results share
one dtype, float32 or float16; sums are float32. A log-sum-exp is to base 2, and -50000 where there was no key: what
TVM's own kernels write, so that its merging and ours agree. Static in a kernel: heads, head_dim, dtype. Symbolic: the
rest.

The order of parameters is that of tvm.relax.frontend.nn.llm.kv_cache (TIRPagedKVCache). TVM's own kernels for CPUs are
scalar, and its paged prefill walks through the whole pool of pages for every query.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.source import Source, cast, exp, fma, intrinsic, load, ramp, real, splat

PAGE = 16  # positions; MLC's default, and the only size that its kernels for copying know
LANES = 16
NOTHING = -5e4  # the log-sum-exp of no keys
_LOWEST = -1e30
_LOG2E = 1.4426950408889634

# (block of 16 keys) -> ((key in the block) -> index of its first element, up to the last axis), for keys and values
Places = Callable[[str], tuple[Callable[[str], str], Callable[[str], str]]]


class _Attention:
    """One kernel in the making: queries over keys that lie somewhere, 16 of them at a time."""

    def __init__(self, name: str, heads: int, kv_heads: int, head_dim: int, dtype: str) -> None:
        self.source = Source(name)
        self.heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, head_dim, dtype

    def tensor(self, name: str, rows: str, heads: int) -> None:
        self.source.buffer(name, (rows, heads, self.dim), self.dtype)

    def indices(self, name: str, extent: str | int) -> None:
        """Declare an int32 array that TVM cuts out of one larger array."""
        self.source.buffer(name, (extent,), "int32", align=4, view=True)

    def pages(self) -> None:
        self.source.buffer("pages", ("pool", 2, self.kv_heads, PAGE, self.dim), self.dtype)
        self.indices("page_starts", "b1")
        self.indices("page_numbers", "numbers")
        self.indices("last_page", "b")

    def results(self, rows: str) -> None:
        self.tensor("out", rows, self.heads)
        self.source.buffer("lse", (rows, self.heads), "float32")

    def constants(self, *flags: str) -> None:
        """Declare the numbers that end every signature; rotation was done when the keys were written."""
        for flag in (*flags, "rotary_mode"):
            self.source.scalar(flag, "int32")
        for number in ("rope_scale", "rope_theta", "sm_scale"):
            self.source.scalar(number, "float32")

    def tree(self) -> None:
        self.indices("tree_starts", "b1")
        self.source.buffer("tree", ("nodes", 2), "int32", align=4, view=True)

    def ancestors(self, sequence: str, own: str, queries: str, keys: str) -> Callable[[str], str]:
        """Bind a query's node and return the condition under which it sees a key."""
        source = self.source
        start, count = _range(source, "tree_starts", sequence)
        node = source.let("node", f"tree[{start} + {own} + {count} - {queries}, 0]")
        before = source.let("before", f"{keys} - {count}")

        def sees(key: str) -> str:
            place = f"{start} + T.max({key} - {before}, T.int64(0))"
            inside = f"T.And({node} >= tree[{place}, 0], {node} < tree[{place}, 1])"
            return f"T.Or({key} < {before}, {inside})"

        return sees

    def paged_length(self, sequence: str) -> tuple[str, str]:
        """Bind and return a sequence's first place in ``page_numbers`` and its number of keys."""
        source = self.source
        first = source.let("first", cast("int64", f"page_starts[{sequence}]"))
        pages = source.let("pages_of", f"{cast('int64', f'page_starts[{sequence} + 1]')} - {first}")
        partial = f"({pages} - 1) * {PAGE} + {cast('int64', f'last_page[{sequence}]')}"
        return first, source.let("keys", f"T.Select({pages} == T.int64(0), T.int64(0), {partial})")

    def paged_places(self, first: str, kv_head: str) -> Places:
        def places(block: str) -> tuple[Callable[[str], str], Callable[[str], str]]:
            page = self.source.let("page", cast("int64", f"page_numbers[{first} + {block}]"))
            return (lambda j: f"{page}, 0, {kv_head}, {j}", lambda j: f"{page}, 1, {kv_head}, {j}")

        return places

    def attend(
        self,
        row: str,
        head: str,
        keys: str,
        buffers: tuple[str, str],
        places: Places,
        sees: Callable[[str], str] | None = None,
    ) -> None:
        """Emit the softmax attention of ``q[row, head]`` over the first ``keys`` keys, one pass with a running maximum.

        ``sees(key)`` is the condition under which one of them counts.
        """
        source, dim = self.source, self.dim
        query, total = source.local("query", dim, "float32"), source.local("total", dim, "float32")
        scores, dot = source.local("scores", LANES, "float32"), source.local("dot", LANES, "float32")
        state = source.local("state", 2, "float32")  # the largest score so far, the sum of weights
        whole = ramp("0", LANES)
        with source.loop("c", dim // LANES):
            at = ramp(f"c * {LANES}", LANES)
            value = load("q", f"{row}, {head}, c * {LANES}", LANES, self.dtype)
            source.line(f"{query}[{at}] = {value} * {splat('sm_scale', LANES)}")
            source.line(f"{total}[{at}] = {real(0.0, LANES)}")
        source.line(f"{state}[0] = {real(_LOWEST)}")
        source.line(f"{state}[1] = {real(0.0)}")
        with source.loop("block", f"({keys} + {LANES - 1}) // {LANES}"):
            used = source.let("used", f"T.min({keys} - block * {LANES}, T.int64({LANES}))")
            key, value_at = places("block")
            source.line(f"{scores}[{whole}] = {real(_LOWEST, LANES)}")
            with source.loop("j", used):
                source.line(f"{dot}[{whole}] = {real(0.0, LANES)}")
                with source.loop("c", dim // LANES):
                    k = load(buffers[0], f"{key('j')}, c * {LANES}", LANES, self.dtype)
                    q = f"{query}[{ramp(f'c * {LANES}', LANES)}]"
                    source.line(f"{dot}[{whole}] = {fma(q, k, f'{dot}[{whole}]', LANES)}")
                score = _sum(source, dot)
                if sees is not None:
                    score = f"T.Select({sees(f'block * {LANES} + j')}, {score}, {real(_LOWEST)})"
                source.line(f"{scores}[j] = {score}")
            highest = intrinsic("float32", "llvm.vector.reduce.fmax", f"{scores}[{whole}]")
            largest = source.let("largest", f"T.max({state}[0], {highest})")
            weights = exp(source, f"{scores}[{whole}] - {splat(largest, LANES)}", LANES)
            counted = f"{scores}[{whole}] > {real(_LOWEST / 2, LANES)}"
            weights = source.let("weights", f"T.Select({counted}, {weights}, {real(0.0, LANES)})")
            kept = exp(source, f"{state}[0] - {largest}", 1)
            source.line(f"{scores}[{whole}] = {weights}")
            source.line(f"{dot}[{whole}] = {weights}")
            source.line(f"{state}[1] = {fma(f'{state}[1]', kept, _sum(source, dot), 1)}")
            source.line(f"{state}[0] = {largest}")
            with source.loop("c", dim // LANES):
                at = ramp(f"c * {LANES}", LANES)
                source.line(f"{total}[{at}] = {total}[{at}] * {splat(kept, LANES)}")
            with source.loop("j", used):
                weight = source.let("weight", splat(f"{scores}[j]", LANES))
                with source.loop("c", dim // LANES):
                    at = ramp(f"c * {LANES}", LANES)
                    v = load(buffers[1], f"{value_at('j')}, c * {LANES}", LANES, self.dtype)
                    source.line(f"{total}[{at}] = {fma(weight, v, f'{total}[{at}]', LANES)}")
        none = source.let("none", f"{state}[1] == {real(0.0)}")
        inverse = source.let(
            "inverse", f"T.Select({none}, {real(0.0)}, {real(1.0)} / T.max({state}[1], {real(1e-30)}))"
        )
        with source.loop("c", dim // LANES):
            at = ramp(f"c * {LANES}", LANES)
            value = f"{total}[{at}] * {splat(inverse, LANES)}"
            source.line(f"out[{row}, {head}, {at}] = {_rounded(value, LANES, self.dtype)}")
        logarithm = f"T.log(T.max({state}[1], {real(1e-30)}))"
        found = f"({state}[0] + {logarithm}) * {real(_LOG2E)}"
        source.line(f"lse[{row}, {head}] = T.Select({none}, {real(NOTHING)}, {found})")

    def kv_head(self, head: str) -> str:
        return f"{head} // {self.heads // self.kv_heads}"


def _sum(source: Source, vector: str) -> str:
    """Emit the sum of a local array of 16 floats, which it destroys, halving it each time; return its text."""
    for half in (8, 4, 2):
        low, high = f"{vector}[{ramp('0', half)}]", f"{vector}[{ramp(str(half), half)}]"
        source.line(f"{low} = {low} + {high}")
    return f"({vector}[0] + {vector}[1])"


def _rounded(value: str, lanes: int, dtype: str) -> str:
    return value if dtype == "float32" else cast(f"{dtype}x{lanes}", value)


def decode(isa: Isa, tokens: str, *, heads: int, kv_heads: int, head_dim: int, dtype: str) -> Any:
    """Return the PrimFunc of attention for one query per sequence over all that its pages hold.

    q, out (b, heads, head_dim), pages, page_starts (b + 1,), page_numbers, last_page (b,): positions used of the last
    page, two arrays of positions that go unread, lse (b, heads) float32, and numbers; of these ``sm_scale`` is used.
    """
    kernel = _Attention("paged_decode", heads, kv_heads, head_dim, dtype)
    source = kernel.source
    kernel.tensor("q", "b", heads)
    kernel.pages()
    kernel.indices("key_start", "b")
    kernel.indices("query_position", "b")
    kernel.results("b")
    kernel.constants()
    with source.loop("item", f"b * {heads}", "parallel"):
        sequence, head = source.let("sequence", f"item // {heads}"), source.let("head", f"item % {heads}")
        first, keys = kernel.paged_length(sequence)
        kv_head = source.let("kv_head", kernel.kv_head(head))
        kernel.attend(sequence, head, keys, ("pages", "pages"), kernel.paged_places(first, kv_head))
    return source.build()


def prefill(isa: Isa, tokens: str, *, heads: int, kv_heads: int, head_dim: int, dtype: str) -> Any:
    """Return the PrimFunc of attention for any number of queries per sequence over what its pages hold.

    As ``decode`` with q, out (n, heads, head_dim) and query_starts (b + 1,); with ``causal`` the last query sees all
    keys, each before it one less.
    """
    kernel = _Attention("paged_prefill", heads, kv_heads, head_dim, dtype)
    source = kernel.source
    kernel.tensor("q", "n", heads)
    kernel.indices("query_starts", "b1")
    kernel.pages()
    kernel.indices("key_start", "b")
    kernel.indices("query_position", "n")
    kernel.results("n")
    kernel.constants("causal")
    with source.loop("sequence", "b"):
        first, keys = kernel.paged_length("sequence")
        start, queries = _range(source, "query_starts", "sequence")
        with source.loop("item", f"{queries} * {heads}", "parallel"):
            own, head = source.let("own", f"item // {heads}"), source.let("head", f"item % {heads}")
            kv_head = source.let("kv_head", kernel.kv_head(head))
            visible = source.let("visible", _visible(keys, queries, own))
            row = source.let("row", f"{start} + {own}")
            kernel.attend(row, head, visible, ("pages", "pages"), kernel.paged_places(first, kv_head))
    return source.build()


def ragged(isa: Isa, tokens: str, *, heads: int, kv_heads: int, head_dim: int, dtype: str) -> Any:
    """Return the PrimFunc of attention among new tokens: sequences lie one after the other, of any length.

    q, out (n, heads, head_dim), query_starts (b + 1,), k, v (m, kv_heads, head_dim), key_starts (b + 1,), two arrays of
    positions that go unread, lse (n, heads) float32; ``causal`` as in ``prefill``.
    """
    kernel = _Attention("ragged_prefill", heads, kv_heads, head_dim, dtype)
    source = kernel.source
    kernel.tensor("q", "n", heads)
    kernel.indices("query_starts", "b1")
    kernel.tensor("k", "m", kv_heads)
    kernel.tensor("v", "m", kv_heads)
    kernel.indices("key_starts", "b1")
    kernel.indices("query_position", "n")
    kernel.indices("key_start", "b")
    kernel.results("n")
    kernel.constants("causal")
    with source.loop("sequence", "b"):
        start, queries = _range(source, "query_starts", "sequence")
        key_start, keys = _range(source, "key_starts", "sequence")
        with source.loop("item", f"{queries} * {heads}", "parallel"):
            own, head = source.let("own", f"item // {heads}"), source.let("head", f"item % {heads}")
            kv_head = source.let("kv_head", kernel.kv_head(head))
            visible = source.let("visible", _visible(keys, queries, own))
            row = source.let("row", f"{start} + {own}")
            kernel.attend(row, head, visible, ("k", "v"), _rows(key_start, kv_head))
    return source.build()


def paged_tree(isa: Isa, tokens: str, *, heads: int, kv_heads: int, head_dim: int, dtype: str) -> Any:
    """Return the PrimFunc of attention for trees of drafted tokens over pages that hold these tokens too.

    As ``prefill`` without ``causal``, then tree_starts (b + 1,) and tree (t, 2): the nodes of each sequence in order of
    a depth-first walk, each with its own number and the first after its descendants. The last nodes are the queries; a
    query sees what came before the tree, its ancestors and itself.
    """
    kernel = _Attention("paged_tree", heads, kv_heads, head_dim, dtype)
    source = kernel.source
    kernel.tensor("q", "n", heads)
    kernel.indices("query_starts", "b1")
    kernel.pages()
    kernel.indices("key_start", "b")
    kernel.indices("query_position", "n")
    kernel.results("n")
    kernel.constants()
    kernel.tree()
    with source.loop("sequence", "b"):
        first, keys = kernel.paged_length("sequence")
        start, queries = _range(source, "query_starts", "sequence")
        with source.loop("item", f"{queries} * {heads}", "parallel"):
            own, head = source.let("own", f"item // {heads}"), source.let("head", f"item % {heads}")
            kv_head = source.let("kv_head", kernel.kv_head(head))
            sees = kernel.ancestors("sequence", own, queries, keys)
            row = source.let("row", f"{start} + {own}")
            kernel.attend(row, head, keys, ("pages", "pages"), kernel.paged_places(first, kv_head), sees)
    return source.build()


def ragged_tree(isa: Isa, tokens: str, *, heads: int, kv_heads: int, head_dim: int, dtype: str) -> Any:
    """Return the PrimFunc of attention among the new tokens of trees: ``ragged`` with the trees of ``paged_tree``.

    q, query_starts, k, v, key_starts, an array that goes unread, tree_starts, tree, out, lse and numbers.
    """
    kernel = _Attention("ragged_tree", heads, kv_heads, head_dim, dtype)
    source = kernel.source
    kernel.tensor("q", "n", heads)
    kernel.indices("query_starts", "b1")
    kernel.tensor("k", "m", kv_heads)
    kernel.tensor("v", "m", kv_heads)
    kernel.indices("key_starts", "b1")
    kernel.indices("query_position", "n")
    kernel.tree()
    kernel.results("n")
    kernel.constants()
    with source.loop("sequence", "b1 - 1"):
        start, queries = _range(source, "query_starts", "sequence")
        key_start, keys = _range(source, "key_starts", "sequence")
        with source.loop("item", f"{queries} * {heads}", "parallel"):
            own, head = source.let("own", f"item // {heads}"), source.let("head", f"item % {heads}")
            kv_head = source.let("kv_head", kernel.kv_head(head))
            sees = kernel.ancestors("sequence", own, queries, keys)
            row = source.let("row", f"{start} + {own}")
            kernel.attend(row, head, keys, ("k", "v"), _rows(key_start, kv_head), sees)
    return source.build()


def _rows(start: str, kv_head: str) -> Places:
    def places(block: str) -> tuple[Callable[[str], str], Callable[[str], str]]:
        def place(j: str) -> str:
            return f"{start} + {block} * {LANES} + {j}, {kv_head}"

        return place, place

    return places


def _range(source: Source, starts: str, sequence: str) -> tuple[str, str]:
    """Bind and return where a sequence's rows begin and how many they are."""
    start = source.let("start", cast("int64", f"{starts}[{sequence}]"))
    return start, source.let("count", f"{cast('int64', f'{starts}[{sequence} + 1]')} - {start}")


def _visible(keys: str, queries: str, own: str) -> str:
    """Return how many keys the query ``own`` of a sequence sees."""
    before = f"T.max({keys} - {queries} + {own} + 1, T.int64(0))"
    return f"T.Select(causal > 0, {before}, {keys})"


def merge(isa: Isa, tokens: str, *, heads: int, head_dim: int, dtype: str) -> Any:
    """Return the PrimFunc ``(v, s, v_other, s_other)``: v, s become the attention over the keys of both.

    v, v_other (n, heads, head_dim), s, s_other (n, heads) float32: the log-sum-exps to base 2.
    """
    source = Source("merge_states")
    for name in ("", "_other"):
        source.buffer(f"v{name}", ("n", heads, head_dim), dtype)
        source.buffer(f"s{name}", ("n", heads), "float32")
    with source.loop("item", f"n * {heads}", "parallel"):
        at = f"{source.let('row', f'item // {heads}')}, {source.let('head', f'item % {heads}')}"
        ours, theirs = source.let("ours", f"s[{at}]"), source.let("theirs", f"s_other[{at}]")
        most = source.let("most", f"T.max({ours}, {theirs})")
        first, second = (
            source.let("first", f"T.exp2({ours} - {most})"),
            source.let("second", f"T.exp2({theirs} - {most})"),
        )
        total = source.let("total", f"{first} + {second}")
        with source.loop("c", head_dim // LANES):
            left = f"{load('v', f'{at}, c * {LANES}', LANES, dtype)} * {splat(f'{first} / {total}', LANES)}"
            right = load("v_other", f"{at}, c * {LANES}", LANES, dtype)
            value = fma(right, splat(f"{second} / {total}", LANES), left, LANES)
            source.line(f"v[{at}, {ramp(f'c * {LANES}', LANES)}] = {_rounded(value, LANES, dtype)}")
        source.line(f"s[{at}] = {most} + T.log2({total})")
    return source.build()


def append(isa: Isa, tokens: str, *, kv_heads: int, head_dim: int, dtype: str) -> Any:
    """Return the PrimFunc ``(pages, k, v, positions)``: token i goes to place positions[i] of the pool, -1 nowhere."""
    source = Source("paged_append")
    source.buffer("pages", ("pool", 2, kv_heads, PAGE, head_dim), dtype)
    source.buffer("k", ("n", kv_heads, head_dim), dtype)
    source.buffer("v", ("n", kv_heads, head_dim), dtype)
    source.buffer("positions", ("n",), "int32", align=4, view=True)
    with source.loop("row", "n", "parallel"):
        place = source.let("place", cast("int64", "positions[row]"))
        with (
            source.block(f"if {place} >= T.int64(0)"),
            source.loop("head", kv_heads),
            source.loop("c", head_dim // LANES),
        ):
            at = ramp(f"c * {LANES}", LANES)
            for which, name in enumerate(("k", "v")):
                source.line(
                    f"pages[{place} // {PAGE}, {which}, head, {place} % {PAGE}, {at}] = {name}[row, head, {at}]"
                )
    return source.build()


def split_rotary(
    isa: Isa, tokens: str, *, heads: int, kv_heads: int, head_dim: int, dtype: str, magnitude: float
) -> Any:
    """Return the PrimFunc ``(qkv, positions, q, k, v, frequencies)``: cuts qkv, and rotates q and k by position.

    qkv (n, heads + 2 kv_heads, head_dim), positions (n,) int32, frequencies (head_dim / 2,) float32: radians per
    position of the pair (j, j + head_dim / 2). The angle is rounded to float32 before its cosine is taken. Cosine and
    sine are multiplied by ``magnitude``.
    """
    source, half = Source("split_rotary"), head_dim // 2
    lanes = LANES if half % LANES == 0 else LANES // 2
    source.buffer("qkv", ("n", heads + 2 * kv_heads, head_dim), dtype)
    source.buffer("positions", ("n",), "int32", align=4, view=True)
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        source.buffer(name, ("n", count, head_dim), dtype)
    source.buffer("frequencies", (half,), "float32")
    with source.loop("row", "n", "parallel"):
        cosines, sines = source.local("cosines", half, "float32"), source.local("sines", half, "float32")
        with source.loop("j", half):
            angle = source.let("angle", f"{cast('float32', 'positions[row]')} * frequencies[j]")
            source.line(f"{cosines}[j] = T.cos({angle}) * {real(magnitude)}")
            source.line(f"{sines}[j] = T.sin({angle}) * {real(magnitude)}")
        for name, start, count in (("q", 0, heads), ("k", heads, kv_heads)):
            with source.loop("head", count), source.loop("c", half // lanes):
                low, high = f"c * {lanes}", f"{half} + c * {lanes}"
                first = source.let("first", load("qkv", f"row, {start} + head, {low}", lanes, dtype))
                second = source.let("second", load("qkv", f"row, {start} + head, {high}", lanes, dtype))
                cosine = source.let("cosine", f"{cosines}[{ramp(low, lanes)}]")
                sine = source.let("sine", f"{sines}[{ramp(low, lanes)}]")
                opposite = source.let("opposite", f"{real(0.0, lanes)} - {second} * {sine}")
                turned = source.let("turned", f"{second} * {cosine}")
                value = _rounded(fma(first, cosine, opposite, lanes), lanes, dtype)
                source.line(f"{name}[row, head, {ramp(low, lanes)}] = {value}")
                value = _rounded(fma(first, sine, turned, lanes), lanes, dtype)
                source.line(f"{name}[row, head, {ramp(high, lanes)}] = {value}")
        with source.loop("head", kv_heads), source.loop("c", head_dim // LANES):
            at = ramp(f"c * {LANES}", LANES)
            source.line(f"v[row, head, {at}] = qkv[row, {heads + kv_heads} + head, {at}]")
    return source.build()


def to_heads(
    isa: Isa, tokens: str, *, heads: int, kv_heads: int, head_dim: int, dtype: str, norm_eps: float | None
) -> Any:
    """Return the PrimFunc ``(qkv[, q_weight, k_weight], y)``: y (n, heads + 2 kv_heads, head_dim) of ``dtype``.

    qkv (n, K) float32. With ``norm_eps`` every head of q and k is divided by its root mean square and multiplied by a
    weight (head_dim,) float32.
    """
    source, fused = Source("to_heads"), heads + 2 * kv_heads
    n = 1 if tokens == "one" else "n"
    source.buffer("qkv", (n, fused * head_dim), "float32")
    weights = ("q_weight", "k_weight") if norm_eps is not None else ()
    for name in weights:
        source.buffer(name, (head_dim,), "float32")
    source.buffer("y", (n, fused, head_dim), dtype)
    with source.loop("row", n, "serial" if tokens == "one" else "parallel"):
        for start, count, weight in (
            (0, heads, "q_weight"),
            (heads, kv_heads, "k_weight"),
            (heads + kv_heads, kv_heads, ""),
        ):
            with source.loop("head", count):
                place = source.let("place", f"{start} + head")
                scale = ""
                if norm_eps is not None and weight:
                    scale = splat(_inverse_root(source, place, head_dim, norm_eps), LANES)
                with source.loop("c", head_dim // LANES):
                    at = ramp(f"c * {LANES}", LANES)
                    value = f"qkv[row, {ramp(f'{place} * {head_dim} + c * {LANES}', LANES)}]"
                    value = f"{value} * {scale} * {weight}[{at}]" if scale else value
                    source.line(f"y[row, {place}, {at}] = {_rounded(value, LANES, dtype)}")
    return source.build()


def _inverse_root(source: Source, place: str, head_dim: int, eps: float) -> str:
    squares = source.local("squares", LANES, "float32")
    whole = ramp("0", LANES)
    source.line(f"{squares}[{whole}] = {real(0.0, LANES)}")
    with source.loop("c", head_dim // LANES):
        x = source.let("x", f"qkv[row, {ramp(f'{place} * {head_dim} + c * {LANES}', LANES)}]")
        source.line(f"{squares}[{whole}] = {fma(x, x, f'{squares}[{whole}]', LANES)}")
    mean = fma(_sum(source, squares), real(1 / head_dim), real(eps), 1)
    return source.let("inverse", f"{real(1.0)} / {intrinsic('float32', 'llvm.sqrt', mean)}")


def from_heads(isa: Isa, tokens: str, *, heads: int, head_dim: int, dtype: str) -> Any:
    """Return the PrimFunc ``(x, y)``: y (n, heads * head_dim) float32 of x (n, heads, head_dim) of ``dtype``."""
    source = Source("from_heads")
    n = 1 if tokens == "one" else "n"
    source.buffer("x", (n, heads, head_dim), dtype)
    source.buffer("y", (n, heads * head_dim), "float32")
    with (
        source.loop("row", n, "serial" if tokens == "one" else "parallel"),
        source.loop("head", heads),
        source.loop("c", head_dim // LANES),
    ):
        value = load("x", f"row, head, c * {LANES}", LANES, dtype)
        source.line(f"y[row, {ramp(f'head * {head_dim} + c * {LANES}', LANES)}] = {value}")
    return source.build()
