"""The operators as onnxruntime computes them fastest: its own operators of the domain com.microsoft.

GroupQueryAttention rotates, appends and attends in one kernel, in place where a cache's input and output are bound to
one address, and reads as much of the caches as is filled.
"""

from __future__ import annotations

from collections.abc import Sequence

from arkinfer.exporters.onnx_bodies import Bodies, Matrix
from arkinfer.exporters.onnx_model import CONTRIB, Scope, Value


class ContribBodies(Bodies):
    """Operators of onnxruntime where it has them, standard ones elsewhere.

    Its inputs are those of its kernels: ``last`` (1,) and ``total`` () int32 are the position of the step's last token
    and one more; ``cos`` and ``sin`` (context, head_dim / 2) are the rotation tables.
    """

    def step_inputs(self) -> None:
        """Add the inputs that say where the step begins."""
        model, shape = self.model, self.shape
        self.rows = model.input("rows", "I64", ("r",))
        self.last = model.input("last", "I32", (1,))
        self.total = model.input("total", "I32", ())
        table = (shape.context, shape.head_dim // 2)
        self.tables = [model.input(name, self.kind, table) for name in ("cos", "sin")]

    def rotation(self, frequencies: Sequence[float]) -> None:
        """Nothing to make: the tables are inputs."""

    def embedding(self, table: Matrix, scale: float) -> Value:
        """Return ``scale`` times the table's rows; only these are multiplied out."""
        layout = table.layout
        if layout.kind != "blocks":
            return super().embedding(table, scale)

        def body(scope: Scope, tokens: Value, codes: Value, scales: Value, *zeros: Value) -> Value:
            rows = scope.op(
                "GatherBlockQuantized", codes, tokens, self._scales(scope, table, scales, "F32"), *zeros,
                domain=CONTRIB, gather_axis=0, quantize_axis=1, block_size=layout.block, bits=layout.bits,
            )  # fmt: skip
            return rows if scale == 1 else scope.op("Mul", rows, scope.constant(scale, "F32"))

        # Another shape than that of products, which a tied table serves as well.
        codes = self.model.seen_as(table.parts["weight"], (table.rows, table.width * layout.bits // 8), "U8")
        rest = list(table.parts.values())[1:]
        return self.model.call(f"embedding_{table.name}", body, self.tokens, codes, *rest, key=scale)

    def product(self, x: Value, matrix: Matrix) -> Value:
        """Return x @ W.T of codes in blocks; accuracy level 4 rounds x to int8 in each block."""
        layout = matrix.layout
        if layout.kind != "blocks":
            return super().product(x, matrix)

        def body(scope: Scope, x: Value, codes: Value, scales: Value, *zeros: Value) -> Value:
            return scope.op(
                "MatMulNBits", x, codes, self._scales(scope, matrix, scales, self.kind), *zeros, domain=CONTRIB,
                N=matrix.rows, K=matrix.width, bits=layout.bits, block_size=layout.block,
                accuracy_level=4 if matrix.integer else 1 if self.kind == "F32" else 0,
            )  # fmt: skip

        shape = matrix.rows, matrix.width
        return self.model.call(f"linear_{matrix.name}", body, x, *matrix.parts.values(), key=shape)

    def _scales(self, scope: Scope, matrix: Matrix, scales: Value, dtype: str) -> Value:
        """Return scales as a kernel wants them; the file holds them as the weight has them."""
        return scales if matrix.dtype == dtype else scope.cast(scales, dtype)

    def add_norm(self, residual: Value, delta: Value, weight: Value, scale: float, eps: float) -> tuple[Value, Value]:
        """Return the new residual stream, and its norm: one kernel."""

        def body(scope: Scope, residual: Value, delta: Value, weight: Value) -> tuple[Value, Value]:
            kind = "SkipSimplifiedLayerNormalization"
            delta = self.scaled(scope, delta, scale)
            normed, _, _, total = scope.ops(
                kind, residual, delta, weight, count=4, skipped=(1, 2), domain=CONTRIB, epsilon=eps
            )
            return total, self.narrow(scope, normed)

        total, normed = self.model.calls("add_rms_norm", body, residual, delta, weight, key=(scale, eps))
        return total, normed

    def swiglu(self, gate_up: Value) -> Value:
        """Return silu(gate) * up; QuickGelu with alpha 1 is silu."""

        def body(scope: Scope, gate_up: Value) -> Value:
            gate, up = scope.ops("Split", gate_up, count=2, axis=2, num_outputs=2)
            return scope.op("Mul", scope.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)

        return self.model.call("swiglu", body, gate_up)

    def attention(
        self, qkv: Value, norms: Sequence[Value], eps: float, caches: Sequence[Value], scale: float
    ) -> tuple[Value, ...]:
        """Append to the caches and attend: one kernel, after the norms where there are any."""
        shape = self.shape

        def body(
            scope: Scope, qkv: Value, k: Value, v: Value, last: Value, total: Value, cos: Value, sin: Value,
            *norms: Value,
        ) -> tuple[Value, ...]:  # fmt: skip
            parts: list[Value | None] = [qkv, None, None]
            if norms:  # onnxruntime's kernel for processors has no norms of its own
                (q, heads), (new_k, kv_heads), (new_v, _) = self.split(scope, qkv)
                q = self._normed(scope, q, heads, norms[0], eps)
                parts = [q, self._normed(scope, new_k, kv_heads, norms[1], eps), new_v]
            return scope.ops(
                "GroupQueryAttention", *parts, k, v, last, total, cos, sin, count=3, domain=CONTRIB,
                num_heads=shape.heads, kv_num_heads=shape.kv_heads, scale=scale, do_rotary=1,
            )  # fmt: skip

        inputs = (qkv, *caches, self.last, self.total, *self.tables, *norms)
        return self.model.calls("attention", body, *inputs, key=(scale, eps))

    def _normed(self, scope: Scope, x: Value, count: int, weight: Value, eps: float) -> Value:
        """Return (1, n, heads * head_dim) with each head normed."""
        shape = self.shape
        x = scope.op("Reshape", x, scope.constant([1, -1, count, shape.head_dim]))
        x = self.head_norm(scope, x, weight, eps)
        return scope.op("Reshape", x, scope.constant([1, -1, count * shape.head_dim]))
