"""The operators as TensorRT takes them: standard ones, with quantised weights in front of a DequantizeLinear alone."""

from __future__ import annotations

from collections.abc import Sequence

from arkinfer.errors import InternalError
from arkinfer.exporters.onnx_bodies import Bodies, Matrix
from arkinfer.exporters.onnx_model import Scope, Value


class TensorrtBodies(Bodies):
    """Standard operators, but for the rows of a quantised table."""

    def embedding(self, table: Matrix, scale: float) -> Value:
        """Return ``scale`` times the table's rows, (1, n, hidden) float32.

        TensorRT gathers no quantised weights: its bytes are read as a table of int32, whose rows are taken apart by
        division with remainder, since it has no shifts either.
        """
        layout = table.layout
        if layout.kind == "dense":
            return super().embedding(table, scale)
        if "zeros" in table.parts:
            raise InternalError("TensorRT takes no zero points")
        base, count = 1 << layout.bits, 32 // layout.bits
        blocks = table.width // layout.block

        def body(scope: Scope, tokens: Value, words: Value, scales: Value) -> Value:
            rest = scope.op("Gather", words, tokens, axis=0)  # (1, n, width / count) int32, the first code lowest
            codes = []
            divisor = scope.constant(base, "I32")
            for _ in range(count):
                code = scope.op("Mod", rest, divisor)
                codes.append(scope.op("Unsqueeze", code, scope.constant([3])))
                rest = scope.op("Div", scope.op("Sub", rest, code), divisor)  # without remainder, whatever the sign
            apart = scope.op("Concat", *codes, axis=3)
            # Two's complement: the upper half of the codes is negative.
            half = scope.constant(base // 2, "I32")
            signed = scope.op("Sub", scope.op("Mod", scope.op("Add", apart, half), divisor), half)
            values = scope.cast(signed, "F32")
            values = scope.op("Reshape", values, scope.constant([1, -1, blocks, layout.block]))
            factors = scope.cast(scope.op("Gather", scales, tokens, axis=0), "F32")
            values = scope.op("Mul", values, scope.op("Unsqueeze", factors, scope.constant([3])))
            rows = scope.op("Reshape", values, scope.constant([1, -1, table.width]))
            return rows if scale == 1 else scope.op("Mul", rows, scope.constant(scale, "F32"))

        return self.model.call(f"embedding_{table.name}", body, self.tokens, *table.parts.values(), key=scale)

    def rotation(self, frequencies: Sequence[float]) -> None:
        """Make cosines and sines, and a mask of float16 to be added, over as many keys as the input ``span`` has.

        ``span`` (m,) holds 0, 1, ...: a step at a short length need not read the caches to their end. With a mask of
        booleans TensorRT for RTX 1.7.1 names two operators alike, and fails, where a profile is of a few tokens.
        """
        self.tables = self.angles(frequencies)
        model = self.model
        span = model.input("span", "I64", ("m",))
        causal = model.op("LessOrEqual", span, model.op("Unsqueeze", self.positions, model.constant([1])))  # (n, m)
        mask = model.op("Where", causal, model.constant(0, "F16"), model.constant(-65504, "F16"))
        self.mask = model.op("Unsqueeze", mask, model.constant([0, 1]))

    def seen(self, scope: Scope, cache: Value, mask: Value) -> Value:
        """Return the start of a cache, as long as the mask (1, 1, n, m)."""
        span = scope.op("Shape", mask, start=3, end=4)
        return scope.op("Slice", cache, scope.constant([0]), span, scope.constant([2]))
