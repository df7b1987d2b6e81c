"""Lower the model graph to an ONNX model: one rule per operator, for one of three consumers.

"onnxruntime" uses that runtime's own operators, "portable" and "tensorrt" standard ones alone. Every cache is an input
and, updated, an output; a consumer that binds both to one address updates it in place.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from arkinfer.config import SparseConfig
from arkinfer.errors import InternalError
from arkinfer.exporters.base import BuildOptions
from arkinfer.exporters.onnx_bodies import Bodies, Matrix, Shape
from arkinfer.exporters.onnx_contrib import ContribBodies
from arkinfer.exporters.onnx_layout import rounds
from arkinfer.exporters.onnx_model import Model, Value
from arkinfer.exporters.onnx_outline import Layout, Tensor, layout_of, tensors, words
from arkinfer.exporters.onnx_sparse import ContribSparseBodies, SparseBodies
from arkinfer.exporters.onnx_tensorrt import TensorrtBodies
from arkinfer.exporters.onnx_tensorrt_sparse import TensorrtSparseBodies
from arkinfer.exporters.onnx_weights import Stored
from arkinfer.graph import ModelGraph, Node, Weight
from arkinfer.quant.groups import activation_group

aten = torch.ops.aten
ark = torch.ops.arkinfer

BLOCK = 64  # caches of a fixed extent hold whole attention blocks
_SPARSE = {"portable": SparseBodies, "onnxruntime": ContribSparseBodies, "tensorrt": TensorrtSparseBodies}
_BODIES = {"portable": Bodies, "onnxruntime": ContribBodies, "tensorrt": TensorrtBodies}
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
KV = {"fp32": "F32", "fp16": "F16"}


class Lowering:
    """Walks the graph once and appends nodes."""

    def __init__(
        self,
        model: ModelGraph,
        options: BuildOptions,
        weights: str,
        form: str = "onnxruntime",
        activations: str = "F32",
        taps: bool = True,
    ) -> None:
        """``weights`` is the name of the file beside the model, ``activations`` the dtype of values between operators
        (safetensors' name); ``taps`` adds the residual stream after each layer as outputs ``layer.N``.
        """
        if form not in _BODIES:
            raise InternalError(f"unknown form {form!r} of an ONNX model")
        config = model.config
        self.source, self.config, self.options, self.taps, self.form = model, config, options, taps, form
        self.model = Model(config.family, weights)
        self.products = "int8" if rounds(model) else activations
        self.stored: dict[str, Stored] = {}  # tensor of the weight file -> origin
        own = form == "onnxruntime"
        self.kv = KV[options.kv]
        self.sparse = None if options.attention == "dense" else config.sparse
        self.block = block = BLOCK if self.sparse is None else math.lcm(BLOCK, self.sparse.block_size)
        self.shape = Shape(
            config.heads,
            config.kv_heads,
            config.head_dim,
            activations,
            "capacity" if own else -(-options.context // block) * block,
            options.context,
            float(config.rope.magnitude(config.max_context)),
        )
        if self.sparse is None:
            self.bodies = _BODIES[form](self.model, self.shape)
        else:
            gear = None if own else threshold(self.sparse, options.attention)
            self.bodies = _SPARSE[form](self.model, self.shape, self.sparse, gear)
        self.values: dict[Node, Value] = {}
        self.orders: dict[str, Value] = {}  # digest of an order of columns -> its value
        self.layer = 0
        self.caches: list[tuple[str, Value, tuple[int | str, ...]]] = []  # updated ones
        self.rules: Mapping[Any, Callable[[Node], None]] = {
            ark.embedding.default: self._embedding,
            aten.embedding.default: self._embedding,
            ark.linear.default: self._linear,
            ark.attention.default: self._attention,
            ark.add_rms_norm.default: self._add_norm,
            ark.swiglu.default: self._swiglu,
            aten.rms_norm.default: self._norm,
            aten.mul.Tensor: self._scale,
            aten.index_select.default: self._take,
            aten.cat.default: self._concatenate,
            aten.flatten.using_ints: self._flatten,
            # These are absorbed by the rule of the attention that reads them.
            ark.rope.default: self._skip,
            aten.slice.Tensor: self._skip,
            aten.unflatten.int: self._skip,
            operator.getitem: self._skip,
        }

    def run(self) -> Model:
        """Return the model of the whole graph; ``stored`` then lists the tensors of its weight file in order."""
        self.bodies.rotation(next(iter(self.source.constants.values())).float().tolist())
        residuals = self.source.residuals()
        taps = []
        for node in self.source.graph.nodes:
            if node.op == "call_function":
                rule = self.rules.get(node.target)
                if rule is None:
                    raise InternalError(f"no lowering for {node.target}", facts={"node": node.name})
                rule(node)
                if node.name in residuals:
                    taps.append((residuals[node.name], self.values[node]))
            elif node.op == "output":
                logits = self.bodies.wide(self.model, self.values[node.args[0][0]])
        vocabulary, hidden = self.config.vocab_size, self.config.hidden_size
        logits = self.model.op("Squeeze", logits, self.model.constant([0]))
        self.model.output("logits", logits, "F32", ("r", vocabulary))
        for name, value, shape in self.caches:
            self.model.output(f"{name}.out", value, self.kv, shape)
        if self.taps:
            for name, value in taps:
                self.model.output(name, value, "F32", (1, "n", hidden))
        return self.model

    def _cache_shapes(self) -> dict[str, tuple[int | str, ...]]:
        """Return the shapes of one layer's caches by name, in the order that the attention takes them."""
        heads, width = self.config.kv_heads, self.config.head_dim
        found: dict[str, tuple[int | str, ...]] = dict.fromkeys("kv", (1, heads, self.shape.capacity, width))
        if isinstance(self.bodies, SparseBodies) and self.sparse is not None:
            found["fine"] = (1, heads, self.bodies.extent(self.sparse.kernel_stride), width)
            found["coarse"] = (1, heads, self.bodies.extent(self.sparse.coarse_stride), width)
            if self.sparse.use_nope:
                found["nope"] = found["k"]
        return found

    # Weights

    def layout(self, weight: Weight) -> Layout:
        """Return how a matrix lies in the weight file."""
        return layout_of(weight, self.form, self.products)

    def _weight(self, weight: Weight, part: str, tensor: Tensor) -> Value:
        name = f"{weight.name}:{part}"
        self.stored.setdefault(name, Stored(name, tensor.spec, weight, part))
        return self.model.weight(name, tensor.dtype, tensor.shape)

    def _vector(self, node: Node) -> Value:
        """Return the weight of a norm, or a bias, stored as float32."""
        weight = self.source.weights[node.name]
        return self._weight(weight, "vector", Tensor.plain("F32", *weight.shape))

    def _matrix(self, node: Node, table: bool = False) -> Matrix:
        """Return a matrix; ``table``: its rows are looked up, for which TensorRT wants a copy as words of 32 bits."""
        weight = replace(self.source.weights[node.name], part="weight")
        kind, layout = self._dtype(weight), self.layout(weight)
        found = tensors(layout, weight.shape, kind, weight.zeros)
        if table and self.form == "tensorrt" and layout.kind != "dense":
            found = {"words": words(found.pop("weight")), **found}
        parts = {part: self._weight(weight, part, tensor) for part, tensor in found.items()}
        extent = activation_group(weight.group, weight.shape[1])
        rounds = self.products == "int8" and weight.format != "dense"
        integer = rounds and layout.kind == "blocks" and layout.block == extent
        rounding = extent if rounds and not integer else 0
        return Matrix(weight.shape[0], weight.shape[1], kind, layout, parts, integer, rounding)

    def _dtype(self, weight: Weight) -> str:
        """Return the dtype of a dense matrix, or of the scales of another."""
        part = "weight" if weight.format == "dense" else "scales"
        for node in self.source.placeholders():
            other = self.source.weights.get(node.name)
            if other is not None and (other.name, other.part) == (weight.name, part):
                return _STORED[node.meta["val"].dtype]
        raise InternalError(f"{weight.name} has no {part}")

    # Rules

    def _skip(self, node: Node) -> None:
        """Nothing to emit: the value is a view, or a consumer's rule absorbs it."""

    def _flatten(self, node: Node) -> None:
        self.values[node] = self.values[node.args[0]]

    def _embedding(self, node: Node) -> None:
        packed = node.target is ark.embedding.default
        table = self._matrix(node.args[1] if packed else node.args[0], table=True)
        self.values[node] = self.bodies.embedding(table, float(node.args[6]) if packed else 1.0)

    def _linear(self, node: Node) -> None:
        x, matrix, _, _, order, bias = (list(node.args) + [None] * 6)[:6]
        self.values[node] = self.bodies.linear(
            self.values[x],
            self._matrix(matrix),
            None if order is None else self._order(matrix),
            None if bias is None else self._vector(bias),
        )

    def _order(self, matrix: Node) -> Value:
        """Return the order of a matrix's columns; equal ones are stored once."""
        weight = self.source.weights[matrix.name]
        if weight.order not in self.orders:
            self.orders[weight.order] = self._weight(weight, "order", Tensor.plain("I32", weight.shape[1]))
        return self.orders[weight.order]

    def _norm(self, node: Node) -> None:
        x, _, weight, eps = node.args
        if len(node.meta["val"].shape) == 2:  # a norm over heads is absorbed by the attention that reads it
            self.values[node] = self.bodies.norm(self.values[x], self._vector(weight), float(eps))

    def _add_norm(self, node: Node) -> None:
        residual, delta, weight, scale, eps = node.args
        results = self.bodies.add_norm(
            self.values[residual], self.values[delta], self._vector(weight), float(scale), float(eps)
        )
        for user in node.users:
            self.values[user] = results[user.args[1]]

    def _swiglu(self, node: Node) -> None:
        self.values[node] = self.bodies.swiglu(self.values[node.args[0]])

    def _scale(self, node: Node) -> None:
        source, factor = node.args
        self.values[node] = self.bodies.multiply(self.values[source], float(factor))

    def _take(self, node: Node) -> None:
        self.values[node] = self.bodies.take(self.values[node.args[0]])

    def _concatenate(self, node: Node) -> None:
        self.values[node] = self.model.op("Concat", *(self.values[piece] for piece in node.args[0]), axis=2)

    def _attention(self, node: Node) -> None:
        q, k, v = node.args[:3]
        qkv = _source(v)
        if qkv is not _source(q) or qkv is not _source(k):
            raise InternalError("attention does not read one projection", facts={"node": node.name})
        norms = [part.args[0] for part in (q, k) if part.args[0].target is aten.rms_norm.default]
        eps = float(norms[0].args[3]) if norms else 0.0
        weights = [self._vector(norm.args[2]) for norm in norms]
        shapes = {f"layers.{self.layer}.{name}": shape for name, shape in self._cache_shapes().items()}
        caches = [self.model.input(name, self.kv, shape) for name, shape in shapes.items()]
        mixed, *updated = self.bodies.attention(self.values[qkv], weights, eps, caches, float(node.args[13]))
        self.values[node] = mixed
        self.caches += [(name, value, shapes[name]) for name, value in zip(shapes, updated, strict=True)]
        self.layer += 1


def threshold(sparse: SparseConfig, attention: str) -> int:
    """Return the length from which rows attend sparsely."""
    return 0 if attention == "sparse" else max(0, sparse.dense_len)


def _source(node: Node) -> Node:
    """Return the merged linear, or the concatenation of several, that a query, key or value was cut from."""
    while node.target not in (ark.linear.default, aten.cat.default):
        node = node.args[0]
    return node
