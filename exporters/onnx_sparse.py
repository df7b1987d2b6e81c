"""InfLLM-v2 attention in standard ONNX operators, row by row: arkinfer.ops.{attention,infllm} say what it is.

The new keys and values are scattered into the caches, and the compressed keys that they complete are computed. Then
every row chooses blocks: a dense row all up to its own, a sparse one those that it scores highest. For each kv head the
blocks that any row of the step wants are gathered once, and each row masks those that it did not choose, so that one
token reads the blocks that it chose alone, and many tokens read each block once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arkinfer.config import SparseConfig
from arkinfer.exporters.onnx_bodies import Bodies, Shape
from arkinfer.exporters.onnx_contrib import ContribBodies
from arkinfer.exporters.onnx_model import CONTRIB, Model, Scope, Value

_MASKED = -1e30
_LOWEST, _LARGEST = -3.4028234663852886e38, 3.4028234663852886e38  # of float32


@dataclass(frozen=True)
class Kernels:
    """What all layers share of one size of compressed keys.

    ``count`` (1,) int64 is how many there are and ``first`` (1,) the first that the step completes; ``tokens``
    (new * size,) are the tokens that new keys are means of, ``hidden`` (n, count) the keys that end after a row,
    ``seen`` (n, 1) whether a row sees any.
    """

    count: Value
    first: Value
    tokens: Value
    hidden: Value
    seen: Value


class SparseBodies(Bodies):
    """Standard operators, with the caches `fine` and `coarse` of compressed keys.

    ``gear`` (1,) int64 is the length from which rows attend sparsely.
    """

    def __init__(self, model: Model, shape: Shape, sparse: SparseConfig, gear: int | None = None) -> None:
        """``gear`` None makes it an input."""
        self.sparse, self._gear = sparse, gear
        super().__init__(model, shape)

    def step_inputs(self) -> None:
        """Add the inputs that say where the step begins, and make what all layers share of it."""
        Bodies.step_inputs(self)
        model = self.model
        self.gear = model.input("gear", "I64", (1,)) if self._gear is None else model.constant([self._gear])

    def rotation(self, frequencies: Sequence[float]) -> None:
        """Make cosines and sines, and everything about blocks that does not depend on keys."""
        self.tables = self.angles(frequencies)
        model, sparse = self.model, self.sparse
        one = model.constant([1])
        self.total = model.op("Add", self.position, model.op("Size", self.positions))  # (1,)
        self.row = model.op("Unsqueeze", self.positions, one)  # (n, 1)
        last = model.op("Sub", self.total, one)
        self.blocks = model.op("Add", model.op("Div", last, model.constant([sparse.block_size])), one)  # (1,)
        ids = self._count_up(self.blocks)  # (blocks,)
        own = model.op("Div", self.row, model.constant([sparse.block_size]))  # (n, 1)
        exclusive = 1 if sparse.local_rule == "exclusive" else 0
        nearest = model.op("Sub", own, model.constant([sparse.local_blocks - exclusive]))
        self.future = model.op("Greater", ids, own)  # (n, blocks)
        first = model.op("Less", ids, model.constant([sparse.init_blocks]))
        self.forced = model.op("Or", first, model.op("GreaterOrEqual", ids, nearest))
        dense = model.op("Less", model.op("Add", self.row, one), self.gear)
        self.every = model.op("And", dense, model.op("Not", self.future))
        self.budget = model.op("Min", self.blocks, model.constant([sparse.budget]))
        self.fine = self._kernels(sparse.kernel_size, sparse.kernel_stride)
        self.coarse = self._kernels(sparse.coarse_size, sparse.coarse_stride)
        # Scores of kernels are padded to whole blocks: one before the first, as many as are missing after the last.
        stride = sparse.block_size // sparse.kernel_stride
        missing = model.op("Sub", model.op("Mul", self.blocks, model.constant([stride])), self.fine.count)
        before, none = model.constant([0, 0, 1]), model.constant([0, 0])
        self.pads = model.op("Concat", before, none, missing, axis=0)

    def _count_up(self, count: Value) -> Value:
        """Return 0, 1, ... below ``count`` (1,)."""
        model = self.model
        return model.op("Range", model.constant(0), model.op("Squeeze", count), model.constant(1))

    def _kernels(self, size: int, stride: int) -> Kernels:
        """Make what layers share of the compressed keys of ``size`` tokens every ``stride``."""
        model = self.model
        reach = model.constant([size - stride])

        def complete(length: Value) -> Value:
            """Return how many keys ``length`` tokens complete."""
            above = model.op("Max", model.op("Sub", length, reach), model.constant([0]))
            return model.op("Div", above, model.constant([stride]))

        one = model.constant([1])
        count = model.op("Max", complete(self.total), one)  # no key at all would leave axes without extent
        first = complete(self.position)
        steps = model.op("Size", self.positions)
        # As many as the tokens can complete. What the last ones lack tokens of is hidden, and written again later.
        more = model.op("Add", model.op("Unsqueeze", steps, model.constant([0])), model.constant([stride - 1]))
        new = model.op("Add", first, self._count_up(model.op("Div", more, model.constant([stride]))))
        starts = model.op("Unsqueeze", model.op("Mul", new, model.constant([stride])), one)
        tokens = model.op("Add", starts, model.constant([list(range(size))]))
        tokens = model.op("Reshape", tokens, model.constant([-1]))
        visible = complete(model.op("Add", self.row, one))  # (n, 1)
        hidden = model.op("GreaterOrEqual", self._count_up(count), visible)
        return Kernels(count, first, tokens, hidden, model.op("Greater", visible, model.constant([0])))

    def extent(self, stride: int) -> int | str:
        """Return the extent of a cache of compressed keys every ``stride`` tokens."""
        capacity = self.shape.capacity
        return f"{capacity}_{stride}" if isinstance(capacity, str) else capacity // stride + 1

    def attention(
        self, qkv: Value, norms: Sequence[Value], eps: float, caches: Sequence[Value], scale: float
    ) -> tuple[Value, ...]:
        """Append to the caches k, v, fine and coarse (and nope, if there is one) and attend; return all of them."""
        cos, sin = self.tables
        nope = len(caches) > 4
        shared = (
            self.position, self.row, self.future, self.forced, self.every, self.budget, self.pads, cos, sin,
        )  # fmt: skip
        kernels = [value for each in (self.fine, self.coarse) for value in vars(each).values()]

        def body(scope: Scope, qkv: Value, *given: Value) -> tuple[Value, ...]:
            caches, rest = list(given[: 4 + nope]), given[4 + nope :]
            position, row, future, forced, every, budget, pads, cos, sin = rest[:9]
            fine, coarse, norms = Kernels(*rest[9:14]), Kernels(*rest[14:19]), rest[19:]
            q, new_k, new_v = (self.heads(scope, part, count) for part, count in self.split(scope, qkv))
            if norms:
                q, new_k = (self.head_norm(scope, *pair, eps) for pair in zip((q, new_k), norms, strict=True))
            plain_q, plain_k = q, new_k
            q, new_k = (scope.op("RotaryEmbedding", part, cos, sin) for part in (q, new_k))
            added = [new_k, new_v, plain_k] if nope else [new_k, new_v]
            places = [0, 1, 4] if nope else [0, 1]
            for place, new in zip(places, added, strict=True):
                caches[place] = scope.op("TensorScatter", caches[place], new, position, axis=2, mode="linear")
            keys = caches[4] if nope else caches[0]
            sizes = (self.sparse.kernel_size, self.sparse.coarse_size)
            for place, (kernel, size) in enumerate(zip((fine, coarse), sizes, strict=True), 2):
                caches[place] = self._compress(scope, keys, caches[place], kernel, size)
            scores = self._scores(scope, plain_q if nope else q, caches[2:4], (fine, coarse), pads, scale)
            member = self._members(scope, scores, future, forced, every, budget)
            return self._attend(scope, q, caches[0], caches[1], member, row, scale), *caches

        inputs = (qkv, *caches, *shared, *kernels, *norms)
        return self.model.calls("attention", body, *inputs, key=(scale, eps, len(norms)))

    def _compress(self, scope: Scope, keys: Value, cache: Value, kernels: Kernels, size: int) -> Value:
        """Write the compressed keys that the step may complete to their cache (1, kv_heads, extent, head_dim)."""
        shape = self.shape
        longest = scope.op("Sub", scope.op("Shape", keys, start=2, end=3), scope.constant([1]))
        tokens = scope.op("Min", kernels.tokens, longest)
        spans = self.wide(scope, scope.op("Gather", keys, tokens, axis=2))
        spans = scope.op("Reshape", spans, scope.constant([1, shape.kv_heads, -1, size, shape.head_dim]))
        total = scope.op("ReduceSum", spans, scope.constant([3]), keepdims=0)
        means = self.narrow(scope, scope.op("Div", total, scope.constant(size, "F32")))
        return scope.op("TensorScatter", cache, means, kernels.first, axis=2, mode="linear")

    def _logits(self, scope: Scope, q: Value, cache: Value, kernels: Kernels, scale: float) -> Value:
        """Return q . keys of the kernels (kv_heads, group, n, count), the lowest number where a row sees none."""
        shape = self.shape
        keys = scope.op("Slice", cache, scope.constant([0]), kernels.count, scope.constant([2]))
        keys = scope.op("Reshape", self.wide(scope, keys), scope.constant([shape.kv_heads, -1, shape.head_dim]))
        products = self.batched(scope, q, keys, scale)  # (kv_heads, group * n, count)
        group = shape.heads // shape.kv_heads
        extents = scope.op("Concat", scope.constant([shape.kv_heads, group, -1]), kernels.count, axis=0)
        products = scope.op("Reshape", products, extents)
        return scope.op("Where", kernels.hidden, scope.constant(_LOWEST, "F32"), products)

    def batched(self, scope: Scope, q: Value, keys: Value, scale: float) -> Value:
        """Return scale * q @ keys.T, (kv_heads, rows, keys)."""
        scaled = scope.op("Mul", q, scope.constant(scale, "F32"))
        return scope.op("MatMul", scaled, scope.op("Transpose", keys, perm=[0, 2, 1]))

    def single(self, scope: Scope, q: Value, keys: Value, scale: float) -> Value:
        """Return scale * q @ keys.T, (rows, keys)."""
        scaled = scope.op("Mul", q, scope.constant(scale, "F32"))
        return scope.op("MatMul", scaled, scope.op("Transpose", keys, perm=[1, 0]))

    def _scores(
        self, scope: Scope, q: Value, caches: Sequence[Value], kernels: Sequence[Kernels], pads: Value, scale: float
    ) -> Value:
        """Return every block's score for every row, (kv_heads, n, blocks) float32, at least 0."""
        shape, sparse, (fine, coarse), (small, large) = self.shape, self.sparse, caches, kernels
        queries = scope.op("Reshape", self.wide(scope, q), scope.constant([shape.kv_heads, -1, shape.head_dim]))
        logits = self._logits(scope, queries, fine, small, scale)
        exact = sparse.lse == "exact"
        norm, seen = (logits, small.seen) if exact else (self._logits(scope, queries, coarse, large, scale), large.seen)
        axis = scope.constant([3])
        most = scope.op("ReduceMax", norm, axis, keepdims=1)
        # Hidden kernels are the lowest number: their share is 0 wherever a row sees one.
        sums = scope.op("ReduceSum", scope.op("Exp", scope.op("Sub", norm, most)), axis, keepdims=1)
        lse = scope.op("Add", most, scope.op("Log", sums))  # (kv_heads, group, n, 1)
        weights = scope.op("Exp", scope.op("Sub", logits, lse))
        nothing = scope.op("Or", small.hidden, scope.op("Not", seen))  # (n, count)
        weights = scope.op("Where", nothing, scope.constant(0, "F32"), weights)
        summed = scope.op("ReduceSum", weights, scope.constant([1]), keepdims=0)  # (kv_heads, n, count)
        summed = scope.op("Min", summed, scope.constant(_LARGEST, "F32"))
        stride = sparse.block_size // sparse.kernel_stride
        padded = scope.op("Pad", summed, pads, scope.constant(0, "F32"))
        return scope.op("MaxPool", padded, kernel_shape=[stride + 1], strides=[stride])

    def _members(self, scope: Scope, scores: Value, future: Value, forced: Value, every: Value, budget: Value) -> Value:
        """Return which blocks each row attends to, (kv_heads, n, blocks) bool.

        TopK takes the lower id first where scores are equal, as ONNX defines it.
        """
        ranked = scope.op("Where", forced, scope.constant(float("inf"), "F32"), scores)
        ranked = scope.op("Where", future, scope.constant(-1, "F32"), ranked)
        best, ids = scope.ops("TopK", ranked, budget, count=2, axis=2, largest=1, sorted=1)
        taken = scope.cast(scope.op("GreaterOrEqual", best, scope.constant(0, "F32")), "F32")
        nothing = scope.op("Expand", scope.constant(0, "F32"), scope.op("Shape", ranked))
        marked = scope.op("ScatterElements", nothing, ids, taken, axis=2)
        return scope.op("Or", scope.op("Greater", marked, scope.constant(0, "F32")), every)

    def _attend(self, scope: Scope, q: Value, k: Value, v: Value, member: Value, row: Value, scale: float) -> Value:
        """Return attention (1, n, width) of each row to the tokens of its blocks up to its own."""
        shape, size = self.shape, self.sparse.block_size
        group, width = shape.heads // shape.kv_heads, shape.head_dim
        queries = scope.op("Reshape", self.wide(scope, q), scope.constant([shape.kv_heads, -1, width]))
        lines = scope.constant([-1, size * width])
        tables = [scope.op("Reshape", cache, lines) for cache in (k, v)]  # (kv_heads * blocks, block_size * head_dim)
        room = scope.op("Div", scope.op("Shape", k, start=2, end=3), scope.constant([size]))
        rows = scope.op("Shape", row, start=0, end=1)
        parts = []
        for head in range(shape.kv_heads):
            own = scope.op("Gather", member, scope.constant(head), axis=0)  # (n, blocks)
            any_row = scope.op("ReduceMax", scope.cast(own, "I32"), scope.constant([0]), keepdims=0)
            wanted = scope.op("Reshape", scope.op("NonZero", any_row), scope.constant([-1]))  # ascending
            place = scope.op("Add", wanted, scope.op("Mul", room, scope.constant([head])))
            keys, values = (
                scope.op("Reshape", self.wide(scope, scope.op("Gather", table, place)), scope.constant([-1, width]))
                for table in tables
            )
            logits = self.single(scope, scope.op("Gather", queries, scope.constant(head), axis=0), keys, scale)
            starts = scope.op("Unsqueeze", scope.op("Mul", wanted, scope.constant([size])), scope.constant([1]))
            tokens = scope.op("Add", starts, scope.constant([list(range(size))]))  # (blocks wanted, block_size)
            apart = scope.op("Unsqueeze", row, scope.constant([2]))  # (n, 1, 1)
            chosen = scope.op("Unsqueeze", scope.op("Gather", own, wanted, axis=1), scope.constant([2]))
            allowed = scope.op("And", scope.op("LessOrEqual", tokens, apart), chosen)  # (n, blocks wanted, block_size)
            flat = scope.op("Concat", rows, scope.constant([-1]), axis=0)
            allowed = scope.op("Reshape", allowed, flat)
            grouped = scope.op("Concat", scope.constant([group]), rows, scope.constant([-1]), axis=0)
            logits = scope.op("Reshape", logits, grouped)
            # Added, not chosen: onnxruntime adds over a broadcast axis many times faster than it chooses.
            bias = scope.op("Where", allowed, scope.constant(0, "F32"), scope.constant(_MASKED, "F32"))
            logits = scope.op("Add", logits, bias)
            weights = scope.op("Softmax", logits, axis=-1)  # (group, n, keys)
            parts.append(scope.op("MatMul", weights, values))  # (group, n, head_dim)
        mixed = scope.op("Transpose", scope.op("Concat", *parts, axis=0), perm=[1, 0, 2])  # (n, heads, head_dim)
        return self.narrow(scope, scope.op("Reshape", mixed, scope.constant([1, -1, shape.heads * width])))


class ContribSparseBodies(SparseBodies, ContribBodies):
    """The same with onnxruntime's own operators beside it, and products that transpose nothing."""

    def batched(self, scope: Scope, q: Value, keys: Value, scale: float) -> Value:
        """Return scale * q @ keys.T in one kernel."""
        return scope.op("FusedMatMul", q, keys, domain=CONTRIB, transB=1, alpha=scale)

    def single(self, scope: Scope, q: Value, keys: Value, scale: float) -> Value:
        """Return scale * q @ keys.T in one kernel."""
        return scope.op("FusedMatMul", q, keys, domain=CONTRIB, transB=1, alpha=scale)
