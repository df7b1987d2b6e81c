"""Lower the model graph to the launches of a GPU plan: one rule per operator, one walk per schedule.

The residual stream is float32 and updated in place; what lies between (inputs of linears, queries, attention, gates) is
float16, written by the kernel that makes it; branches that are added to the residual stream and logits are float32.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from arkinfer.artifact.plan import (
    ALIGNMENT,
    CONTROL_SIZE,
    SAMPLING,
    Argument,
    Buffer,
    Extent,
    Kernel,
    Launch,
    Plan,
    Pointer,
    Schedule,
    Tap,
    whole_blocks,
)
from arkinfer.config import SparseConfig
from arkinfer.errors import InternalError
from arkinfer.exporters import arena, cuda_outline
from arkinfer.exporters.base import BuildOptions
from arkinfer.exporters.cuda_weights import PARTS, Stored
from arkinfer.exporters.kernels import triton as kernels
from arkinfer.exporters.kernels.triton.layout import BLOCK
from arkinfer.exporters.kernels.triton.sampling import STEPS
from arkinfer.exporters.kernels.triton.select import KEYS, Select
from arkinfer.graph import ModelGraph, Node, Weight

aten = torch.ops.aten
ark = torch.ops.arkinfer

# Schedule -> most tokens of a step, most rows of logits at once.
SIZES: Mapping[str, tuple[int, int]] = {"decode": (1, 1), "verify": (8, 8), "prefill": (512, 64)}
CACHES = ("k", "v", "k_scale", "v_scale", "fine", "coarse", "nope")
FEW = 16  # up to so many rows the products compute all that the schedule allows, in one small tile
SPLITS = 256  # blocks that share the keys of a decode step, about two a multiprocessor; guessed
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_KV = {"fp16": "float16", "int8": "int8"}


class Lowering:
    """Collects the parameters, caches and kernels that the schedules share, and makes the plan."""

    def __init__(self, model: ModelGraph, options: BuildOptions, levels: tuple[str, ...]) -> None:
        self.model, self.config, self.kv, self.levels = model, model.config, _KV[options.kv], levels
        self.capacity = whole_blocks(options.context)
        # Whatever the default gear, the plan holds both where the kernels can: an artifact can be opened in either.
        self.sparse = cuda_outline.selects(model.config)
        self.stored: dict[str, Stored] = {}  # parameter name -> origin
        self.buffers: dict[str, Buffer] = {}
        self.kernels: list[Kernel] = []
        self._places: dict[str, int] = {}

    def run(self, facts: Mapping[str, Any]) -> Plan:
        """Return the plan of the whole graph; its kernels are not compiled yet."""
        tokens, rows = (max(sizes) for sizes in zip(*SIZES.values(), strict=True))
        table = (self.capacity, self.config.head_dim // 2)
        for buffer in (
            Buffer("control", "int32", (CONTROL_SIZE,), "control"),
            Buffer("tokens", "int32", (tokens,), "input"),
            Buffer("rows", "int32", (rows,), "input"),
            Buffer("cos", "float32", table, "input"),
            Buffer("sin", "float32", table, "input"),
            Buffer("random", "float32", (self.capacity,), "input"),
            Buffer("logits", "float32", (rows, self.config.vocab_size), "output"),
            Buffer("token", "int32", (1,), "output"),
        ):
            self.buffers[buffer.name] = buffer
        walks = {name: Walk(self, *size).run() for name, size in SIZES.items()}
        sampling = {name: Walk(self, 1, 1).choice(name == "draw") for name in SAMPLING}
        return Plan(
            levels=self.levels,
            buffers=tuple(self.buffers.values()),
            kernels=tuple(self.kernels),
            schedules={name: schedule for name, (schedule, _) in walks.items()},
            sampling={name: schedule for name, (schedule, _) in sampling.items()},
            arena=max(end for _, end in (*walks.values(), *sampling.values())),
            facts={**facts, "capacity": self.capacity},
        )

    def kernel(self, name: str, options: Mapping[str, Any]) -> int:
        """Return the place of a kernel in the table, which holds each pair of name and options once."""
        description = kernels.kernel(name)
        parsed = description.parse(options)
        plain = asdict(parsed)
        key = json.dumps([name, plain], sort_keys=True)
        if key not in self._places:
            self._places[key] = len(self.kernels)
            arguments = tuple(Argument(**vars(each)) for each in description.arguments(parsed))
            self.kernels.append(Kernel(name, plain, arguments))
        return self._places[key]

    def cache(self, layer: int, argument: Argument) -> Pointer:
        """Return one layer's cache of the kind that ``argument`` names."""
        name = f"layers.{layer}.{argument.name}"
        self.buffers.setdefault(name, Buffer(name, argument.dtype, argument.shape, "cache"))
        return Pointer(name)

    def vector(self, node: Node) -> Pointer:
        """Return the parameter of a norm weight or bias, stored as float32."""
        weight = self.model.weights[node.name]
        return self.parameter(weight, "vector", "float32", weight.shape)

    def parameter(self, weight: Weight, part: str, dtype: str, shape: tuple[Extent, ...]) -> Pointer:
        name = f"{weight.name}:{part}"
        self.buffers.setdefault(name, Buffer(name, dtype, tuple(shape), "parameter"))
        self.stored.setdefault(name, Stored(weight, part))
        return Pointer(name)

    def format(self, node: Node) -> dict[str, Any]:
        """Return the kernel options that describe how a matrix is stored."""
        weight = self.model.weights[node.name]
        rows, width = weight.shape
        options = {"format": weight.format, "rows": rows, "width": width}
        part = "weight" if weight.format == "dense" else "scales"
        found = next(
            other
            for other in self.model.placeholders()
            if (item := self.model.weights.get(other.name)) and (item.name, item.part) == (weight.name, part)
        )
        kind = _DTYPES[found.meta["val"].dtype]
        if weight.format == "dense":
            return {**options, "dtype": kind}
        return {**options, "group": weight.group, "scales": kind, "zeros": weight.zeros}


class Walk:
    """Walks the graph once, for steps of one size, and appends launches."""

    def __init__(self, lowering: Lowering, tokens: int, rows: int) -> None:
        self.shared, self.tokens, self.rows = lowering, tokens, rows
        self.model, self.config = lowering.model, lowering.config
        self.scratch: dict[str, Buffer] = {}
        self.launches: list[Launch] = []
        self.head = 0
        self.places: dict[Node, Pointer] = {}
        self.factors: dict[Node, float] = {}  # multiplications that the next linear does
        self.taps: list[Tap] = []
        self.layer = 0
        nodes = list(self.model.graph.nodes)
        self.order = {node: index for index, node in enumerate(nodes)}
        self.residuals = self.model.residuals()
        # Linear -> the concatenation that its output is a part of, and its first column there.
        self.joined: dict[Node, tuple[Node, int]] = {}
        self.after_take: set[Node] = set()
        for node in nodes:
            if node.target is aten.cat.default:
                column = 0
                for piece in node.args[0]:
                    self.joined[piece] = node, column
                    column += piece.meta["val"].shape[1]
            if node.target is aten.index_select.default or self.after_take.intersection(node.all_input_nodes):
                self.after_take.add(node)
        self.rules: Mapping[Any, Callable[[Node], None]] = {
            ark.embedding.default: self._embedding,
            ark.linear.default: self._linear,
            ark.attention.default: self._attention,
            ark.add_rms_norm.default: self._add_norm,
            ark.swiglu.default: self._swiglu,
            aten.rms_norm.default: self._norm,
            aten.mul.Tensor: self._scale,
            aten.index_select.default: self._take,
            aten.flatten.using_ints: self._flatten,
            # Linears write into what aten.cat would make; the others are absorbed by the attention that reads them.
            aten.cat.default: self._skip,
            ark.rope.default: self._skip,
            aten.slice.Tensor: self._skip,
            aten.unflatten.int: self._skip,
            operator.getitem: self._skip,
        }

    def run(self) -> tuple[Schedule, int]:
        """Return the schedule and the bytes of arena that it needs."""
        for node in self.model.graph.nodes:
            if node.op == "call_function":
                rule = self.rules.get(node.target)
                if rule is None:
                    raise InternalError(f"no lowering for {node.target}", facts={"node": node.name})
                rule(node)
        scratch, end = self._placed()
        return Schedule(self.tokens, self.rows, scratch, tuple(self.launches), self.head, tuple(self.taps)), end

    def choice(self, draw: bool) -> tuple[Schedule, int]:
        """Return what chooses a token from the first row of logits, by the fields of control where it is a ``draw``."""
        vocab = {"vocab": self.config.vocab_size}
        self._launch("argmax_partial", vocab, "largest", {})
        found = {name: Pointer(f"largest.{name}") for name in ("values", "ids")}
        if draw:
            options = {**vocab, "context": self.shared.capacity}
            steps = [("sample_narrow", {**options, "step": step}) for step in range(STEPS)]
            for kernel, given in (*steps, ("sample_mass", options), ("sample", options)):
                for argument in self.shared.kernels[self.shared.kernel(kernel, given)].pointed:
                    if argument.name not in (*found, *self.shared.buffers):
                        found[argument.name] = self._scratch(argument.name, argument.dtype, *argument.shape)
                self._launch(kernel, given, kernel, found)
        else:
            self._launch("argmax", vocab, "argmax", found)
        scratch, end = self._placed()
        return Schedule(1, 1, scratch, tuple(self.launches), 0), end

    def _placed(self) -> tuple[tuple[Buffer, ...], int]:
        """Give every scratch buffer its place. What the head reads stays alive: the head may run again and again."""
        seen: dict[str, list[int]] = {name: [] for name in self.scratch}
        for index, launch in enumerate(self.launches):
            for pointer in launch.pointers:
                seen.get(pointer.buffer, []).append(index)
        values = []
        for name, buffer in self.scratch.items():
            first, last = min(seen[name]), max(seen[name])
            if first < self.head <= last:
                last = len(self.launches)
            values.append(arena.Lifetime(buffer.nbytes({"n": self.tokens, "r": self.rows}), first, last))
        offsets, end = arena.place(values, ALIGNMENT)
        buffers = zip(self.scratch.values(), offsets, strict=True)
        return tuple(replace(buffer, offset=offset) for buffer, offset in buffers), end

    def _launch(
        self,
        kernel: str,
        options: Mapping[str, Any],
        label: str,
        given: Mapping[str, Pointer],
        weight: Weight | None = None,
    ) -> Pointer:
        """Append a launch and return where its last output goes.

        An argument's pointer is ``given`` by name, else a part of ``weight``, a cache of this layer or a buffer of the
        plan that has its name; what remains must be outputs, which become scratch buffers called after ``label``.
        """
        place = self.shared.kernel(kernel, options)
        pointers = []
        for argument in self.shared.kernels[place].pointed:
            name = argument.name
            if name in given:
                pointer = given[name]
            elif weight is not None and name in PARTS:
                pointer = self.shared.parameter(weight, name, argument.dtype, argument.shape)
            elif name in CACHES:
                pointer = self.shared.cache(self.layer, argument)
            elif name in self.shared.buffers:
                pointer = Pointer(name)
            elif argument.role == "out":
                pointer = self._scratch(label if name == "out" else f"{label}.{name}", argument.dtype, *argument.shape)
            else:
                raise InternalError(f"nothing to give {kernel} as {name}", facts={"value": label})
            pointers.append(pointer)
        self.launches.append(Launch(place, tuple(pointers)))
        return pointers[-1]

    def _scratch(self, name: str, dtype: str, *shape: Extent) -> Pointer:
        self.scratch.setdefault(name, Buffer(name, dtype, shape, "scratch"))
        return Pointer(name)

    # Rules

    def _skip(self, node: Node) -> None:
        """Nothing to launch: the value is a view, or a consumer's rule absorbs it."""

    def _flatten(self, node: Node) -> None:
        self.places[node] = self.places[node.args[0]]

    def _embedding(self, node: Node) -> None:
        weight = self.model.weights[node.args[1].name]
        options = {**self.shared.format(node.args[1]), "scale": float(node.args[6])}
        self.places[node] = self._launch("embedding", options, node.name, {}, weight)

    def _norm(self, node: Node) -> None:
        x, _, weight, eps = node.args
        if len(node.meta["val"].shape) == 2:  # a norm over heads is absorbed by the attention that reads it
            options = {"width": node.meta["val"].shape[1], "eps": float(eps)}
            given = {"x": self.places[x], "weight": self.shared.vector(weight)}
            self.places[node] = self._launch("rms_norm", options, node.name, given)

    def _add_norm(self, node: Node) -> None:
        residual, delta, weight, scale, eps = node.args
        if any(self.order[user] > self.order[node] for user in residual.users):
            raise InternalError("the residual stream is read after it was updated", facts={"node": node.name})
        picked = {user.args[1]: user for user in node.users}
        stream = self.places[residual]
        options = {"width": self.config.hidden_size, "eps": float(eps), "scale": float(scale)}
        given = {"residual": stream, "delta": self.places[delta], "weight": self.shared.vector(weight)}
        self.places[picked[1]] = self._launch("add_rms_norm", options, picked[1].name, given)
        if 0 in picked:
            self.places[picked[0]] = stream
            if picked[0].name in self.residuals:
                self.taps.append(Tap(self.residuals[picked[0].name], stream.buffer, len(self.launches) - 1))

    def _linear(self, node: Node) -> None:
        x, matrix, _, _, _, bias = (list(node.args) + [None] * 6)[:6]
        weight = self.model.weights[matrix.name]
        reader = next(iter(node.users))
        gated = len(node.users) == 1 and reader.target is ark.swiglu.default and bias is None
        count, limit = ("r", self.rows) if node in self.after_take else ("n", self.tokens)
        options = {
            **self.shared.format(matrix),
            "bias": bias is not None,
            "order": bool(weight.order),
            "gated": gated,
            "out": "float32" if reader.op == "output" or reader.target is ark.add_rms_norm.default else "float16",
            "factor": self.factors.get(x, 1.0),
            "count": str(limit) if limit <= FEW else count,
        }
        given = {"x": self.places[x]}
        if bias is not None:
            given["bias"] = self.shared.vector(bias)
        if node in self.joined:
            whole, column = self.joined[node]
            options["out_stride"] = stride = whole.meta["val"].shape[1]
            self._scratch(whole.name, "float16", count, stride)
            self.places[whole] = Pointer(whole.name)
            given["out"] = Pointer(whole.name, 2 * column)
        elif reader.op == "output":
            given["out"] = Pointer("logits")
        kernel = "linear_gemv" if limit == 1 else "linear_gemm"
        self.places[node] = self._launch(kernel, options, node.name, given, weight)
        if gated:
            self.places[reader] = self.places[node]

    def _swiglu(self, node: Node) -> None:
        if node not in self.places:  # else the linear has done it
            options = {"width": node.meta["val"].shape[1]}
            self.places[node] = self._launch("swiglu", options, node.name, {"gate_up": self.places[node.args[0]]})

    def _scale(self, node: Node) -> None:
        """Leave the multiplication of a linear's input to the linear, which multiplies its float32 sums."""
        source, factor = node.args
        biased = any(len(user.args) > 5 and user.args[5] is not None for user in node.users)
        if biased or any(user.target is not ark.linear.default for user in node.users):
            raise InternalError("a multiplication that no linear can take over", facts={"node": node.name})
        self.places[node] = self.places[source]
        self.factors[node] = float(factor)

    def _take(self, node: Node) -> None:
        source = self.places[node.args[0]]
        self.head = len(self.launches)
        if self.tokens > 1:
            source = self._launch("take_rows", {"width": node.meta["val"].shape[1]}, node.name, {"x": source})
        self.places[node] = source

    def _attention(self, node: Node) -> None:
        config = self.config
        q, k, v = node.args[:3]
        qkv = _source(v)
        if qkv is not _source(q) or qkv is not _source(k):
            raise InternalError("attention does not read one projection", facts={"node": node.name})
        shape = {
            "heads": config.heads,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "context": self.shared.capacity,
            "kv": self.shared.kv,
        }
        sparse, scale = self.shared.sparse, float(node.args[13])
        norms = [part.args[0] for part in (q, k) if part.args[0].target is aten.rms_norm.default]
        append = {
            **shape,
            "norm_eps": float(norms[0].args[3]) if norms else None,
            "nope": sparse is not None and sparse.use_nope,
        }
        given = {"qkv": self.places[qkv]}
        if norms:
            given |= {"q_norm": self.shared.vector(norms[0].args[2]), "k_norm": self.shared.vector(norms[1].args[2])}
        self._launch("rope_append", append, node.name, given)
        attend: dict[str, Any] = {**shape, "scale": scale}
        query = {"q": Pointer(f"{node.name}.q")}
        if sparse is not None:
            attend |= {"budget": sparse.budget, "block": sparse.block_size}
            query |= self._select(node, sparse, scale)
        if self.tokens > 1:
            self.places[node] = self._launch("attention_prefill", {**attend, "block": BLOCK}, node.name, query)
            if sparse is not None:  # writes the rows that the dense kernel leaves alone
                self._launch("attention_sparse", attend, node.name, {**query, "out": self.places[node]})
        else:
            attend["splits"] = _splits(config.kv_heads, self.shared.capacity, 4 * BLOCK)
            self._launch("attention_decode", attend, node.name, query)
            parts = {name: Pointer(f"{node.name}.{name}") for name in ("partial", "lse")}
            self.places[node] = self._launch("attention_combine", attend, node.name, parts)
        self.layer += 1

    def _select(self, node: Node, sparse: SparseConfig, scale: float) -> dict[str, Pointer]:
        """Launch what updates the compressed keys and chooses every row's blocks; return where these and counts go.

        Which rows are sparse is known on the device alone: the launches are the same for all.
        """
        config, label = self.config, f"{node.name}.select"
        shape = {"kv_heads": config.kv_heads, "head_dim": config.head_dim, "context": self.shared.capacity}
        windows = {"kernel_size": sparse.kernel_size, "kernel_stride": sparse.kernel_stride}
        query = Pointer(f"{node.name}.q_nope" if sparse.use_nope else f"{node.name}.q")
        keys = {"k": Pointer(f"layers.{self.layer}.nope")} if sparse.use_nope else {}
        stored = "float16" if sparse.use_nope else self.shared.kv
        self._launch("compress", {**shape, **windows, "kv": stored}, label, keys)
        select: dict[str, Any] = {
            **shape,
            **windows,
            "heads": config.heads,
            "scale": scale,
            "block_size": sparse.block_size,
            "init_blocks": sparse.init_blocks,
            "local_blocks": sparse.local_blocks,
            "budget": sparse.budget,
            "local_rule": sparse.local_rule,
            "lse": sparse.lse,
        }
        if self.tokens <= FEW:  # more rows fill the device by themselves
            select["splits"] = _splits(config.kv_heads, self.shared.capacity // Select(**select).normaliser[1], KEYS)
        normaliser = Pointer(f"layers.{self.layer}.{'fine' if sparse.lse == 'exact' else 'coarse'}")
        lse = self._launch("select_lse", select, label, {"q": query, "keys": normaliser})
        scores = self._launch("select_scores", select, label, {"q": query, "lse": lse})
        self._launch("select_blocks", select, label, {"scores": scores})
        return {name: Pointer(f"{label}.{name}") for name in ("blocks", "counts")}


def _splits(kv_heads: int, keys: int, least: int) -> int:
    """Return into how many parts of at least ``least`` the keys are split for few rows: enough to fill the device."""
    splits = 1
    while splits < 64 and 2 * splits * kv_heads <= SPLITS and 2 * splits * least <= keys:
        splits *= 2
    return splits


def _source(node: Node) -> Node:
    """Return the merged linear, or the concatenation of several, that a query, key or value was cut from."""
    while node.target not in (ark.linear.default, aten.cat.default):
        node = node.args[0]
    return node
