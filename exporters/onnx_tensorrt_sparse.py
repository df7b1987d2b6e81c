"""InfLLM-v2 attention as TensorRT takes it: every extent is fixed, or the number of the step's tokens.

TensorRT builds no shapes from values, so nothing here depends on how long the context is: kernels and blocks are those
of the whole capacity, hidden where they lie ahead. Rows choose blocks exactly as elsewhere, and attend to them through
a mask over all keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from arkinfer.exporters.onnx_model import Scope, Value
from arkinfer.exporters.onnx_sparse import Kernels, SparseBodies
from arkinfer.exporters.onnx_tensorrt import TensorrtBodies

_HIDDEN = -65504  # what float16 adds to the score of a key that a row does not see


class TensorrtSparseBodies(SparseBodies, TensorrtBodies):
    """Standard operators of fixed extents."""

    def rotation(self, frequencies: Sequence[float]) -> None:
        """Make cosines and sines, and everything about blocks that does not depend on keys."""
        self.tables = self.angles(frequencies)
        model, sparse, capacity = self.model, self.sparse, self.shape.capacity
        assert isinstance(capacity, int)
        one, blocks = model.constant([1]), capacity // sparse.block_size
        self.row = model.op("Unsqueeze", self.positions, one)  # (n, 1)
        ids = model.constant(list(range(blocks)))
        own = model.op("Div", self.row, model.constant([sparse.block_size]))  # (n, 1)
        exclusive = 1 if sparse.local_rule == "exclusive" else 0
        nearest = model.op("Sub", own, model.constant([sparse.local_blocks - exclusive]))
        self.future = model.op("Greater", ids, own)  # (n, blocks)
        first = model.constant([block < sparse.init_blocks for block in range(blocks)], "BOOL")
        self.forced = model.op("Or", first, model.op("GreaterOrEqual", ids, nearest))
        dense = model.op("Less", model.op("Add", self.row, one), self.gear)
        self.every = model.op("And", dense, model.op("Not", self.future))
        self.budget = model.constant([min(blocks, sparse.budget)])
        self.fine = self._kernels(sparse.kernel_size, sparse.kernel_stride)
        self.coarse = self._kernels(sparse.coarse_size, sparse.coarse_stride)
        self.pads = model.constant([0, 0, 1, 0, 0, 0])

    def _kernels(self, size: int, stride: int) -> Kernels:
        """Make what layers share of the compressed keys of ``size`` tokens every ``stride``."""
        model, capacity = self.model, self.shape.capacity
        assert isinstance(capacity, int)
        count, one = capacity // stride, model.constant([1])

        def complete(length: Value) -> Value:
            """Return how many keys ``length`` tokens complete."""
            above = model.op("Max", model.op("Sub", length, model.constant([size - stride])), model.constant([0]))
            return model.op("Div", above, model.constant([stride]))

        first = complete(self.position)
        # As many as the tokens can complete. What the last ones lack tokens of is hidden, and written again later.
        more = model.op("Add", model.op("Size", self.positions), model.constant(stride - 1))
        steps = model.op("Range", model.constant(0), model.op("Div", more, model.constant(stride)), model.constant(1))
        starts = model.op("Unsqueeze", model.op("Mul", model.op("Add", first, steps), model.constant([stride])), one)
        tokens = model.op("Reshape", model.op("Add", starts, model.constant([list(range(size))])), model.constant([-1]))
        visible = complete(model.op("Add", self.row, one))  # (n, 1)
        hidden = model.op("GreaterOrEqual", model.constant(list(range(count))), visible)
        return Kernels(
            model.constant([count]), first, tokens, hidden, model.op("Greater", visible, model.constant([0]))
        )

    def _attend(self, scope: Scope, q: Value, k: Value, v: Value, member: Value, row: Value, scale: float) -> Value:
        """Return attention (1, n, width) of each row to the tokens of its blocks up to its own."""
        shape, size = self.shape, self.sparse.block_size
        assert isinstance(shape.capacity, int)
        group, width = shape.heads // shape.kv_heads, shape.head_dim
        spread = scope.op("Unsqueeze", member, scope.constant([3]))  # (kv_heads, n, blocks, 1)
        inside = scope.constant([[list(range(start, start + size)) for start in range(0, shape.capacity, size)]])
        apart = scope.op("Unsqueeze", row, scope.constant([2]))  # (n, 1, 1)
        allowed = scope.op("And", spread, scope.op("LessOrEqual", inside, apart))  # (kv_heads, n, blocks, block_size)
        mask = scope.op("Where", allowed, scope.constant(0, "F16"), scope.constant(_HIDDEN, "F16"))
        # A head of keys with its group of queries is one of a batch, so that the mask need not be repeated for each.
        mask = scope.op("Reshape", mask, scope.constant([shape.kv_heads, 1, -1, shape.capacity]))
        queries = scope.op("Reshape", q, scope.constant([shape.kv_heads, group, -1, width]))
        keys, values = (
            scope.op("Reshape", cache, scope.constant([shape.kv_heads, 1, shape.capacity, width])) for cache in (k, v)
        )
        mixed = scope.op("Attention", queries, keys, values, mask, scale=scale)  # (kv_heads, group, n, head_dim)
        mixed = scope.op("Reshape", mixed, scope.constant([1, shape.heads, -1, width]))
        mixed = scope.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return scope.op("Reshape", mixed, scope.constant([1, -1, shape.heads * width]))
