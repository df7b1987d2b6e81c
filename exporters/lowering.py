"""Lower the model graph to a Program of CPU kernels: one rule per operator, no knowledge of any instruction set."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from arkinfer.errors import InternalError
from arkinfer.exporters import outline
from arkinfer.exporters.base import BuildOptions
from arkinfer.exporters.kernels.tir import layout, pack
from arkinfer.exporters.program import Argument, Call, Program, Value
from arkinfer.graph import ModelGraph, Node, Weight

aten = torch.ops.aten
ark = torch.ops.arkinfer

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as files name them
_VALUES = {"F32": "float32", "F16": "float16", "BF16": "uint16", "U8": "uint8"}  # as kernels see them


@dataclass(frozen=True)
class Stored:
    """What a parameter of the program is made of: a part of a weight of the graph, or "vector" for a norm or a bias."""

    weight: Weight
    part: str
    gated: bool = False


class Lowering:
    """Walks the graph once and appends kernel calls."""

    def __init__(self, model: ModelGraph, options: BuildOptions) -> None:
        self.model, self.options, self.config = model, options, model.config
        self.program = Program()
        self.stored: dict[str, Stored] = {}  # parameter name -> origin
        self.names: dict[Node, str] = {}
        self.quantised: dict[tuple[Node, layout.Grouping, str], list[str]] = {}
        self.gathered: dict[tuple[Node, str], str] = {}
        self.orders: dict[str, str] = {}  # digest of an order of columns -> parameter name
        self.layer = 0
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
            # These are absorbed by the rule of the attention that reads them.
            ark.rope.default: self._skip,
            aten.slice.Tensor: self._skip,
            aten.unflatten.int: self._skip,
            aten.flatten.using_ints: self._flatten,
            operator.getitem: self._skip,
        }

    def run(self) -> Program:
        """Return the program of the whole graph."""
        program, config = self.program, self.config
        program.inputs = [
            Value("tokens", "int32", ("n",)),
            Value("rotation", "float32", ("n", config.head_dim)),
            Value("rows", "int32", ("r",)),
        ]
        program.scalars = ["position", "dense_len"]
        program.caches = outline.caches(config, self.options.kv)
        for node in self.model.graph.nodes:
            if node.op == "call_function":
                rule = self.rules.get(node.target)
                if rule is None:
                    raise InternalError(f"no lowering for {node.target}", facts={"node": node.name})
                rule(node)
            elif node.op == "output":
                program.result = self.names[node.args[0][0]]
        program.taps = [(public, self.names[node]) for node in self.model.graph.nodes if (public := self._tap(node))]
        return program

    def _tap(self, node: Node) -> str | None:
        return self.model.residuals().get(node.name) if node.target is operator.getitem else None

    # Values and parameters

    def _value(self, name: str, dtype: str, *shape: int | str) -> Value:
        return Value(name, dtype, shape)

    def _call(
        self,
        kernel: str,
        options: Mapping[str, Any],
        inputs: list[Argument],
        *outputs: Value,
        mutates: tuple[str, ...] = (),
    ) -> None:
        self.program.calls.append(Call(kernel, dict(options), tuple(inputs), outputs, mutates))

    def _parameter(self, name: str, dtype: str, shape: tuple[int, ...], origin: Stored) -> str:
        if name not in self.stored:
            self.program.parameters.append(Value(name, dtype, shape))
            self.stored[name] = origin
        return name

    def _vector(self, node: Node) -> str:
        """Return the parameter of a norm weight or bias, stored as float32."""
        weight = self.model.weights[node.name]
        return self._parameter(f"{weight.name}:vector", "float32", tuple(weight.shape), Stored(weight, "vector"))

    def _matrix(self, node: Node, gated: bool = False) -> tuple[list[str], dict[str, Any]]:
        """Return the parameters of a panel-packed matrix and the kernel options that describe it."""
        weight = self.model.weights[node.name]
        stem = f"{weight.name}:{'gated' if gated else 'panels'}"
        dense = weight.format == "dense"
        kind = _DTYPES[node.meta["val"].dtype] if dense else self._scales_dtype(weight)
        rows, width = weight.shape
        matrix = pack.Matrix(weight.format, rows, width, weight.group, gated)
        parts = outline.parameters(matrix, _STORED[kind], weight.zeros)
        parameters = [
            self._parameter(f"{stem}.{part}", _VALUES[spec.dtype], spec.shape, Stored(weight, part, gated))
            for part, spec in parts.items()
        ]
        if dense:
            return parameters, {"format": "dense", "dtype": kind}
        return parameters, {
            "format": weight.format,
            "group": weight.group,
            "width": width,
            "scales": kind,
            "zeros": weight.zeros,
        }

    def _order(self, node: Node | None) -> str:
        """Return the parameter with the order of a weight's columns, empty if there is none; equal orders share it."""
        if node is None:
            return ""
        weight = self.model.weights[node.name]
        if weight.order not in self.orders:
            name = f"{weight.name}:order"
            self.orders[weight.order] = self._parameter(name, "int32", (weight.shape[1],), Stored(weight, "order"))
        return self.orders[weight.order]

    def _scales_dtype(self, weight: Weight) -> str:
        for node in self.model.placeholders():
            other = self.model.weights.get(node.name)
            if other is not None and other.name == weight.name and other.part == "scales":
                return _DTYPES[node.meta["val"].dtype]
        raise InternalError(f"{weight.name} has no scales")

    # Rules

    def _skip(self, node: Node) -> None:
        """Nothing to emit: the value is a view, or a consumer's rule absorbs it."""

    def _flatten(self, node: Node) -> None:
        out = Value(node.name, "float32", ("n", node.meta["val"].shape[1]))
        self._call("reshape", {}, [self.names[node.args[0]]], out)
        self.names[node] = out.name

    def _embedding(self, node: Node) -> None:
        packed = node.target is ark.embedding.default
        table = node.args[1] if packed else node.args[0]
        scale = float(node.args[6]) if packed else 1.0
        parameters, options = self._matrix(table)
        out = self._value(node.name, "float32", "n", self.config.hidden_size)
        self._call("embedding", {**options, "scale": scale}, ["tokens", *parameters], out)
        self.names[node] = out.name

    def _rows(self, node: Node) -> str:
        """Return "n" or "r": whether ``node`` has a row per token or per wanted row."""
        return "r" if node in self._after_take else "n"

    @property
    def _after_take(self) -> set[Node]:
        if not hasattr(self, "_taken"):
            taken: set[Node] = set()
            for node in self.model.graph.nodes:
                if node.target is aten.index_select.default or any(source in taken for source in node.all_input_nodes):
                    taken.add(node)
            self._taken = taken
        return self._taken

    def _gather(self, node: Node, order: str) -> str:
        """Return ``node``'s value with its columns in ``order``, taking them unless that was done."""
        if not order:
            return self.names[node]
        if (node, order) not in self.gathered:
            name = f"{node.name}.{sum(other is node for other, _ in self.gathered)}.columns"
            out = Value(name, "float32", (self._rows(node), node.meta["val"].shape[1]))
            self._call("take_columns", {}, [self.names[node], order], out)
            self.gathered[node, order] = out.name
        return self.gathered[node, order]

    def _quantise(self, node: Node, grouping: layout.Grouping, order: str) -> list[str]:
        """Return the int8 form of ``node``'s value (codes, scales, sums), quantising it unless that was done."""
        if (node, grouping, order) not in self.quantised:
            outputs = self._quantised(node, self._rows(node), grouping, order)
            options = {"groups": asdict(grouping), "order": bool(order)}
            self._call("quantize", options, [self.names[node], *([order] if order else [])], *outputs)
        return self.quantised[node, grouping, order]

    def _quantised(
        self, node: Node, rows: str, grouping: layout.Grouping, order: str = ""
    ) -> tuple[Value, Value, Value]:
        """Declare the int8 form of ``node``'s value: codes (rows, stored width), scales and sums per group."""
        width = node.meta["val"].shape[1]
        # Readers that cut it differently, or want its columns in another order, have forms of their own.
        stem = f"{node.name}.{sum(other is node for other, _, _ in self.quantised)}"
        values = (
            Value(f"{stem}.codes", "int8", (rows, grouping.padded_width(width))),
            Value(f"{stem}.scales", "float32", (rows, width // grouping.activation)),
            Value(f"{stem}.sums", "int32", (rows, grouping.segments(width))),
        )
        self.quantised[node, grouping, order] = [value.name for value in values]
        return values

    def _linear(self, node: Node) -> None:
        x, matrix, _, _, columns, bias = (list(node.args) + [None] * 6)[:6]
        weight = self.model.weights[matrix.name]
        rows = self._rows(node)
        users = list(node.users)
        gated = len(users) == 1 and users[0].target is ark.swiglu.default and bias is None
        parameters, options = self._matrix(matrix, gated)
        width = weight.shape[0] // 2 if gated else weight.shape[0]
        out = self._value(f"{node.name}.gated" if gated else node.name, "float32", rows, width)
        extra = [self._vector(bias)] if bias is not None else []
        options = {**options, "gated": gated, "bias": bias is not None}
        order = self._order(columns)
        integer = len(node.args) > 8 and node.args[8] == "int8"
        if integer:
            inputs = self._quantise(x, layout.activation_cut(weight.format, weight.group, weight.shape[1]), order)
            self._call("linear_int8", options, [*inputs, *parameters, *extra], out)
        else:
            self._call("linear_float", options, [self._gather(x, order), *parameters, *extra], out)
        self.names[node] = out.name

    def _swiglu(self, node: Node) -> None:
        source = node.args[0]
        if self.names[source].endswith(".gated"):
            self.names[node] = self.names[source]
            return
        out = self._value(node.name, "float32", self._rows(node), node.meta["val"].shape[1])
        self._call("swiglu", {}, [self.names[source]], out)
        self.names[node] = out.name

    def _grouping(self, node: Node) -> layout.Grouping | None:
        """Return the grouping if int8 linears that agree on one are all that reads ``node``, in order, else None."""
        found = set()
        for user in node.users:
            if user.target is not ark.linear.default or len(user.args) < 9 or user.args[8] != "int8":
                return None
            if user.args[4] is not None:
                return None
            found.add(layout.activation_cut(user.args[6], user.args[7], node.meta["val"].shape[1]))
        return found.pop() if len(found) == 1 else None

    def _normed(self, node: Node, kernel: str, options: dict[str, Any], inputs: list[Argument], *before: Value) -> None:
        """Emit a norm whose result is ``node``: directly in int8 where that is all its readers want."""
        grouping = self._grouping(node)
        if grouping is not None:
            outputs = self._quantised(node, "n", grouping)
            self._call(kernel, {**options, "groups": asdict(grouping)}, inputs, *before, *outputs)
            return
        out = Value(f"{node.name}.norm", "float32", ("n", self.config.hidden_size))
        self._call(kernel, {**options, "groups": None}, inputs, *before, out)
        self.names[node] = out.name

    def _norm(self, node: Node) -> None:
        x, _, weight, eps = node.args
        if len(node.meta["val"].shape) == 2:  # a norm over heads is absorbed by the attention that reads it
            self._normed(node, "rms_norm", {"eps": float(eps)}, [self.names[x], self._vector(weight)])

    def _add_norm(self, node: Node) -> None:
        residual, delta, weight, scale, eps = node.args
        picked = {user.args[1]: user for user in node.users}
        total = Value(f"{node.name}.sum", "float32", ("n", self.config.hidden_size))
        if 0 in picked:
            self.names[picked[0]] = total.name
        inputs: list[Argument] = [self.names[residual], self.names[delta], self._vector(weight)]
        self._normed(picked[1], "add_rms_norm", {"scale": float(scale), "eps": float(eps)}, inputs, total)

    def _scale(self, node: Node) -> None:
        source, factor = node.args
        out = self._value(node.name, "float32", self._rows(node), node.meta["val"].shape[1])
        self._call("scale", {"factor": float(factor)}, [self.names[source]], out)
        self.names[node] = out.name

    def _concatenate(self, node: Node) -> None:
        pieces = node.args[0]
        out = self._value(node.name, "float32", self._rows(node), node.meta["val"].shape[1])
        widths = [piece.meta["val"].shape[1] for piece in pieces]
        self._call("concatenate", {"widths": widths}, [self.names[piece] for piece in pieces], out)
        self.names[node] = out.name

    def _take(self, node: Node) -> None:
        source = node.args[0]
        out = self._value(node.name, "float32", "r", node.meta["val"].shape[1])
        self._call("take_rows", {}, [self.names[source], "rows"], out)
        self.names[node] = out.name

    def _attention(self, node: Node) -> None:
        config, sparse = self.config, self.config.sparse
        q, k, v = node.args[:3]
        qkv = source_of(v)
        if qkv is not source_of(q) or qkv is not source_of(k):
            raise InternalError("attention does not read one projection", facts={"node": node.name})
        heads, kv_heads, dim, kv = config.heads, config.kv_heads, config.head_dim, outline.KV[self.options.kv]
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "kv": kv}
        norms = head_norms(q, k)
        nope = sparse is not None and sparse.use_nope
        caches = ["k", "v"] + (["k_scale", "v_scale"] if kv == "int8" else [])
        options = {**shape, "norm_eps": float(norms[0].args[3]) if norms else None, "nope": nope}
        rotated = self._value(f"{node.name}.q", "float32", "n", heads, dim)
        plain = [self._value(f"{node.name}.q_nope", "float32", "n", heads, dim)] if nope else []
        inputs: list[Argument] = [
            self.names[qkv],
            "rotation",
            *(self._vector(norm.args[2]) for norm in norms),
            self.layer,
            "position",
        ]
        written = caches + (["nope"] if nope else [])
        self._call("append", options, [*inputs, *written], rotated, *plain, mutates=tuple(written))
        out = self._value(node.name, "float32", "n", heads, dim)
        scale = {"scale": float(node.args[13])}
        if sparse is None:
            self._call("attention_dense", {**shape, **scale}, [rotated.name, self.layer, "position", *caches], out)
        else:
            fields = {name: getattr(sparse, name) for name in ("kernel_size", "kernel_stride", "block_size")}
            keys = ["nope"] if nope else ["k", *caches[2:3]]
            source_kv = {"kv": "float16" if kv == "int8" else kv} if nope else {}
            compress = {**shape, **source_kv, "kernel_size": sparse.kernel_size, "kernel_stride": sparse.kernel_stride}
            self._call(
                "compress",
                compress,
                [rotated.name, self.layer, "position", *keys, "fine", "coarse"],
                mutates=("fine", "coarse"),
            )
            chosen = self._value(f"{node.name}.blocks", "int32", "n", kv_heads, sparse.budget)
            select = {
                **shape,
                **fields,
                **scale,
                "init_blocks": sparse.init_blocks,
                "local_blocks": sparse.local_blocks,
                "budget": sparse.budget,
                "local_rule": sparse.local_rule,
                "lse": sparse.lse,
            }
            query = plain[0].name if nope else rotated.name
            self._call("select", select, [query, self.layer, "position", "dense_len", "fine", "coarse"], chosen)
            attend = {**shape, **scale, "block_size": sparse.block_size, "budget": sparse.budget}
            self._call(
                "attention", attend, [rotated.name, chosen.name, self.layer, "position", "dense_len", *caches], out
            )
        self.names[node] = out.name
        self.layer += 1


def head_norms(q: Node, k: Node) -> list[Node]:
    """Return the norms over heads that a query and a key went through before they were rotated."""
    return [part.args[0] for part in (q, k) if part.args[0].target is aten.rms_norm.default]


def source_of(node: Node) -> Node:
    """Return the merged linear, or the concatenation of several, that a query, key or value was cut from."""
    while node.target not in (ark.linear.default, aten.cat.default):
        node = node.args[0]
    return node
