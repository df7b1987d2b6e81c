"""The operators of the model graph as functions of standard ONNX operators: what any runtime of opset 24 can run.

Each operator is a node of the domain `arkinfer` whose function says in standard operators what it computes; a
consumer that has something better is a subclass (onnx_contrib.py). Values between operators are (1, n, width) in
``shape.activations``; the residual stream is float32. Norms and sums of branches are computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arkinfer.exporters.onnx_model import Extent, Model, Scope, Value
from arkinfer.exporters.onnx_outline import Layout


@dataclass(frozen=True)
class Shape:
    """What the bodies need to know of a model; ``activations`` and ``kv`` are safetensors' names of dtypes.

    ``capacity`` is the extent of the caches: a number, or a name where each run may choose it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    activations: str
    capacity: Extent
    context: int
    magnitude: float


@dataclass(frozen=True)
class Matrix:
    """A weight matrix (rows, width) as values of the graph, by part; ``dtype`` is that of floats and scales."""

    rows: int
    width: int
    dtype: str
    layout: Layout
    parts: Mapping[str, Value]
    integer: bool  # its product rounds activations to int8, block by block
    rounding: int  # inputs that share a scale where activations are rounded before the product; 0: they are not

    @property
    def name(self) -> str:
        """Return what tells its functions from those of other layouts."""
        layout = self.layout
        if layout.kind == "dense":
            return self.dtype.lower()
        zeros = "z" if "zeros" in self.parts else ""
        return f"{layout.kind}{layout.bits}_{layout.block}{zeros}_{self.dtype.lower()}"


class Bodies:
    """Standard operators only."""

    def __init__(self, model: Model, shape: Shape) -> None:
        self.model, self.shape = model, shape
        self.kind = shape.activations
        model.input("tokens", "I64", ("n",))
        self.tokens = model.op("Unsqueeze", model.inputs[0], model.constant([0]))
        self.step_inputs()

    def step_inputs(self) -> None:
        """Add the inputs that say where the step begins, and make what all layers share of it."""
        model, _shape = self.model, self.shape
        self.position = model.input("position", "I64", (1,))
        self.rows = model.input("rows", "I64", ("r",))
        count = model.op("Size", self.tokens)
        steps = model.op("Range", model.constant(0), count, model.constant(1))
        self.positions = model.op("Add", steps, self.position)  # (n,)

    def rotation(self, frequencies: Sequence[float]) -> None:
        """Make the rotation tables and the mask (1, 1, n, capacity) of what a row may attend to."""
        model = self.model
        self.tables = self.angles(frequencies)
        keys = model.op("Range", model.constant(0), model.constant(self.shape.capacity), model.constant(1))
        row = model.op("Unsqueeze", self.positions, model.constant([1]))
        causal = model.op("LessOrEqual", keys, row)  # (n, capacity)
        self.mask = model.op("Unsqueeze", causal, model.constant([0, 1]))

    def angles(self, frequencies: Sequence[float]) -> list[Value]:
        """Return cosines and sines (1, n, head_dim / 2) of the step's positions; angles are float32."""
        model = self.model
        column = model.op("Unsqueeze", model.cast(self.positions, "F32"), model.constant([1]))
        angles = model.op("Mul", column, model.constant([list(frequencies)], "F32"))
        magnitude = model.constant(self.shape.magnitude, "F32")
        tables = [model.op("Mul", model.op(kind, angles), magnitude) for kind in ("Cos", "Sin")]
        return [self.narrow(model, model.op("Unsqueeze", table, model.constant([0]))) for table in tables]

    def narrow(self, scope: Scope, value: Value) -> Value:
        """Return a float32 value as activations are."""
        return value if self.kind == "F32" else scope.cast(value, self.kind)

    def wide(self, scope: Scope, value: Value) -> Value:
        """Return an activation as float32."""
        return value if self.kind == "F32" else scope.cast(value, "F32")

    # Operators

    def embedding(self, table: Matrix, scale: float) -> Value:
        """Return ``scale`` times the table's rows, (1, n, hidden) float32."""

        def body(scope: Scope, tokens: Value, *parts: Value) -> Value:
            picked = [scope.op("Gather", part, tokens, axis=0) for part in parts]
            rows = self.floats(scope, table, picked, "F32")
            return rows if scale == 1 else scope.op("Mul", rows, scope.constant(scale, "F32"))

        return self.model.call(f"embedding_{table.name}", body, self.tokens, *table.parts.values(), key=scale)

    def floats(self, scope: Scope, matrix: Matrix, parts: Sequence[Value], dtype: str) -> Value:
        """Return rows of a matrix multiplied out; ``parts`` hold them in any number of axes before the last."""
        if matrix.layout.kind == "dense":
            return parts[0] if matrix.dtype == dtype else scope.cast(parts[0], dtype)
        scales = parts[1] if matrix.dtype == dtype else scope.cast(parts[1], dtype)
        inputs = (parts[0], scales, *parts[2:])
        return scope.op("DequantizeLinear", *inputs, axis=-1, block_size=matrix.layout.block)

    def linear(self, x: Value, matrix: Matrix, order: Value | None, bias: Value | None) -> Value:
        """Return x @ W.T + bias; column j of the packed matrix multiplies x[order[j]]."""
        if order is not None:
            x = self.model.op("Gather", x, order, axis=2)
        if matrix.rounding:
            x = self.rounded(x, matrix.width, matrix.rounding)
        product = self.product(x, matrix)
        return product if bias is None else self.model.op("Add", product, self.narrow(self.model, bias))

    def rounded(self, x: Value, width: int, extent: int) -> Value:
        """Return ``x`` as int8 activations are worth: ops.linear.quantise_activations, multiplied out again."""

        def body(scope: Scope, x: Value) -> Value:
            groups = scope.op("Reshape", self.wide(scope, x), scope.constant([1, -1, width // extent, extent]))
            largest = scope.op("ReduceMax", scope.op("Abs", groups), scope.constant([3]), keepdims=1)
            steps = scope.constant(127, "F32")
            scale = scope.op("Div", largest, steps)
            empty = scope.op("Equal", largest, scope.constant(0, "F32"))
            factor = scope.op("Div", steps, scope.op("Where", empty, scope.constant(1, "F32"), largest))
            codes = scope.op("Round", scope.op("Mul", groups, factor))  # as onnxruntime's own kernels round
            values = scope.op("Reshape", scope.op("Mul", codes, scale), scope.constant([1, -1, width]))
            return self.narrow(scope, values)

        return self.model.call("round_int8", body, x, key=(width, extent))

    def product(self, x: Value, matrix: Matrix) -> Value:
        """Return x @ W.T. The matrix is multiplied out before the call: TensorRT takes the names of a function's nodes
        over into each call, and refuses two DequantizeLinear of one name.
        """

        def body(scope: Scope, x: Value, weight: Value) -> Value:
            return scope.op("MatMul", x, scope.op("Transpose", weight, perm=[1, 0]))

        return self.model.call(
            "linear", body, x, self.floats(self.model, matrix, list(matrix.parts.values()), self.kind)
        )

    def norm(self, x: Value, weight: Value, eps: float) -> Value:
        """Return RMSNorm(x) * weight of the residual stream ``x``."""

        def body(scope: Scope, x: Value, weight: Value) -> Value:
            return self.narrow(scope, scope.op("RMSNormalization", x, weight, axis=-1, epsilon=eps))

        return self.model.call("rms_norm", body, x, weight, key=eps)

    def add_norm(self, residual: Value, delta: Value, weight: Value, scale: float, eps: float) -> tuple[Value, Value]:
        """Return the new residual stream ``residual + scale * delta``, and its norm."""

        def body(scope: Scope, residual: Value, delta: Value, weight: Value) -> tuple[Value, Value]:
            total = scope.op("Add", residual, self.scaled(scope, delta, scale))
            return total, self.narrow(scope, scope.op("RMSNormalization", total, weight, axis=-1, epsilon=eps))

        total, normed = self.model.calls("add_rms_norm", body, residual, delta, weight, key=(scale, eps))
        return total, normed

    def scaled(self, scope: Scope, delta: Value, scale: float) -> Value:
        """Return ``scale * delta`` in float32."""
        delta = self.wide(scope, delta)
        return delta if scale == 1 else scope.op("Mul", delta, scope.constant(scale, "F32"))

    def swiglu(self, gate_up: Value) -> Value:
        """Return silu(gate) * up of (1, n, 2 * width), gate first."""

        def body(scope: Scope, gate_up: Value) -> Value:
            gate, up = scope.ops("Split", gate_up, count=2, axis=2, num_outputs=2)
            return scope.op("Mul", scope.op("Mul", gate, scope.op("Sigmoid", gate)), up)

        return self.model.call("swiglu", body, gate_up)

    def multiply(self, x: Value, factor: float) -> Value:
        """Return ``factor * x``."""
        return self.model.op("Mul", x, self.model.constant(factor, self.kind))

    def take(self, x: Value) -> Value:
        """Return the wanted rows, (1, r, width)."""
        return self.model.op("Gather", x, self.rows, axis=1)

    def attention(
        self, qkv: Value, norms: Sequence[Value], eps: float, caches: Sequence[Value], scale: float
    ) -> tuple[Value, ...]:
        """Append to the caches k and v (1, kv_heads, capacity, head_dim) and attend; return (1, n, width) and both.

        ``norms``: the weights of the norms over the heads of q and k, or none.
        """
        shape = self.shape
        cos, sin = self.tables

        def body(
            scope: Scope, qkv: Value, k: Value, v: Value, position: Value, cos: Value, sin: Value, mask: Value,
            *norms: Value,
        ) -> tuple[Value, Value, Value]:  # fmt: skip
            q, new_k, new_v = (self.heads(scope, part, count) for part, count in self.split(scope, qkv))
            if norms:
                q, new_k = (
                    self.head_norm(scope, part, norm, eps) for part, norm in zip((q, new_k), norms, strict=True)
                )
            q, new_k = (scope.op("RotaryEmbedding", part, cos, sin) for part in (q, new_k))
            k = scope.op("TensorScatter", k, new_k, position, axis=2, mode="linear")
            v = scope.op("TensorScatter", v, new_v, position, axis=2, mode="linear")
            keys, values = (self.seen(scope, cache, mask) for cache in (k, v))
            mixed = scope.op("Attention", q, keys, values, mask, scale=scale)  # (1, heads, n, head_dim)
            mixed = scope.op("Transpose", mixed, perm=[0, 2, 1, 3])
            return scope.op("Reshape", mixed, scope.constant([1, -1, shape.heads * shape.head_dim])), k, v

        inputs = (qkv, *caches, self.position, cos, sin, self.mask, *norms)
        return self.model.calls("attention", body, *inputs, key=(scale, eps))

    def seen(self, scope: Scope, cache: Value, mask: Value) -> Value:
        """Return what of a cache the ``mask`` (1, 1, n, keys) is about."""
        return cache

    def split(self, scope: Scope, qkv: Value) -> list[tuple[Value, int]]:
        """Return queries, keys and values, (1, n, heads * head_dim), and how many heads each has."""
        counts = [self.shape.heads, self.shape.kv_heads, self.shape.kv_heads]
        widths = scope.constant([count * self.shape.head_dim for count in counts])
        return list(zip(scope.ops("Split", qkv, widths, count=3, axis=2), counts, strict=True))

    def heads(self, scope: Scope, x: Value, count: int) -> Value:
        """Return (1, n, heads * head_dim) as (1, heads, n, head_dim)."""
        x = scope.op("Reshape", x, scope.constant([1, -1, count, self.shape.head_dim]))
        return scope.op("Transpose", x, perm=[0, 2, 1, 3])

    def head_norm(self, scope: Scope, x: Value, weight: Value, eps: float) -> Value:
        """Return RMSNorm(x) * weight over the last axis."""
        normed = scope.op("RMSNormalization", self.wide(scope, x), weight, axis=-1, epsilon=eps)
        return self.narrow(scope, normed)
