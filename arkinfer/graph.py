"""The model graph: torch.export's, captured on meta tensors, with its weights named and its state explicit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import fx

import arkinfer.ops.attention
import arkinfer.ops.linear
import arkinfer.ops.rope  # noqa: F401
from arkinfer import models
from arkinfer.config import ModelConfig
from arkinfer.models.decoder import CausalLM
from arkinfer.ops.attention import LayerCache, new_caches
from arkinfer.quant.packed import Packed

# fx types the arguments of a node as a union of twenty types; Any says as much without a cast at every use.
Node: TypeAlias = Any

STEP_INPUTS = ("tokens", "positions", "rows")
_SPARSE, _GEAR = 14, 22  # places of `sparse` and `dense_len` among the arguments of arkinfer::attention
_ACTIVATIONS = 8  # place of `activations` among those of arkinfer::linear


@dataclass(frozen=True)
class Weight:
    """A weight input of the graph: the checkpoint's weights it is made of, stacked along their first axis.

    ``part`` is "weight", "scales", "zeros" or "order". ``dtype`` is that of a dense matrix or of scales as stored
    (None: as the checkpoint has it). ``zeros``: the packed form has zero points.
    ``order``: digest of the order of its columns, or empty.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    format: str = "dense"
    group: int = 0
    part: str = "weight"
    dtype: torch.dtype | None = None
    zeros: bool = False
    order: str = ""

    @property
    def wide(self) -> bool:
        """Whether it is kept as it is, in float32."""
        return self.format == "dense" and self.dtype == torch.float32

    @staticmethod
    def concatenate(parts: Sequence[Weight]) -> Weight:
        """Return the weight that stacks ``parts`` along the output axis, named after all of them."""
        stem, leaves = _common_stem([part.name for part in parts])
        rows = sum(part.shape[0] for part in parts)
        return Weight(
            stem + "_".join(leaves), tuple(s for part in parts for s in part.sources), (rows, *parts[0].shape[1:])
        )


def _common_stem(names: Sequence[str]) -> tuple[str, list[str]]:
    """Split dotted names into what all share in front and the parts that differ; the last part is kept once."""
    split = [name.split(".") for name in names]
    depth = 0
    while all(len(parts) > depth + 1 and parts[depth] == split[0][depth] for parts in split):
        depth += 1
    leaves = [parts[depth] for parts in split]
    tail = split[0][depth + 1 :]
    leaves[-1] = ".".join([leaves[-1], *tail])
    return "".join(part + "." for part in split[0][:depth]), leaves


@dataclass
class ModelGraph:
    """One decoder step as a torch.fx graph.

    Inputs, in order: ``tokens`` (n,) int64, ``positions`` (n,) int64, ``rows`` (r,) int64 (the rows whose logits are
    wanted), the cache tensors of every layer (mutated), then the weights. Output: logits (r, vocab) float32.
    """

    config: ModelConfig
    context: int
    graph: fx.Graph
    caches: tuple[str, ...]  # placeholder names, layer by layer, in the order of LayerCache
    weights: dict[str, Weight] = field(default_factory=dict)  # placeholder name -> weight
    constants: dict[str, torch.Tensor] = field(default_factory=dict)  # placeholder name -> value

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Node:
        """Insert a call at the graph's insertion point and infer its output's shape."""
        node = self.graph.call_function(target, args, dict(kwargs or {}))
        values = fx.map_arg(node.args, lambda item: item.meta["val"])
        keywords = fx.map_arg(node.kwargs, lambda item: item.meta["val"])
        with self._fake_mode():
            node.meta["val"] = target(*values, **keywords)
        return node

    def add_weight(
        self,
        weight: Weight,
        dtype: torch.dtype = torch.float32,
        shape: tuple[int, ...] | None = None,
    ) -> Node:
        """Add a weight input of ``dtype`` and ``shape`` (default: the weight's own) and return its placeholder."""
        last = self.placeholders()[-1]
        name = weight.name if weight.part == "weight" else f"{weight.name}_{weight.part}"
        with self.graph.inserting_after(last):
            node = self.graph.placeholder("w_" + "".join(c if c.isalnum() else "_" for c in name))
        with self._fake_mode():
            node.meta["val"] = torch.empty(shape or weight.shape, dtype=dtype, device="meta")
        self.weights[node.name] = weight
        self.__dict__.pop("_shapes", None)  # read again: passes and bindings may take turns
        return node

    def weight_of(self, node: Node) -> Weight:
        """Return the weight that a linear or embedding node reads."""
        index = 0 if node.target is torch.ops.aten.embedding.default else 1
        return self.weights[node.args[index].name]

    def _fake_mode(self) -> torch._subclasses.FakeTensorMode:
        values = (node.meta.get("val") for node in self.graph.nodes)
        return next(value.fake_mode for value in values if isinstance(value, torch._subclasses.FakeTensor))

    def uses(self, node: Node) -> int:
        """Return how many nodes read ``node``."""
        return len(node.users)

    def drop_unused_weights(self) -> None:
        """Remove weight inputs that nothing reads any more."""
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and not node.users and node.name in self.weights:
                del self.weights[node.name]
                self.graph.erase_node(node)

    def placeholders(self) -> list[Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def new_caches(self, capacity: int, dtype: torch.dtype) -> list[LayerCache]:
        """Return empty caches for the graph's cache inputs."""
        return new_caches(self.config, capacity, dtype)

    def bind(
        self, values: Mapping[str, torch.Tensor], caches: Sequence[LayerCache], weights: Any
    ) -> list[torch.Tensor]:
        """Return the arguments of the graph, in order; ``weights.packed(weight)`` gives each weight's tensors."""
        arguments = []
        for name, value in self.arguments(values, caches).items():
            weight = self.weights.get(name)
            arguments.append(
                value if weight is None else self.bound(name, weights.packed(replace(weight, part="weight")))
            )
        return arguments

    def arguments(self, values: Mapping[str, torch.Tensor], caches: Sequence[LayerCache]) -> dict[str, Any]:
        """Return the arguments of the graph by placeholder, in order; those of weights are None."""
        tensors = dict(zip(self.caches, (tensor for cache in caches for tensor in cache), strict=True))
        given = {**values, **tensors, **self.constants}
        return {node.name: None if node.name in self.weights else given[node.name] for node in self.placeholders()}

    def bound(self, name: str, packed: Packed) -> torch.Tensor:
        """Return what the weight input ``name`` is in ``packed``, the canonical form of its weight."""
        weight = self.weights[name]
        part: torch.Tensor = getattr(packed, weight.part)
        part = part.float() if len(weight.shape) == 1 else part  # norms and biases compute in float32
        return part.reshape(self._shapes[name])

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {node.name: node.meta["val"].shape for node in self.placeholders() if node.name in self.weights}

    def weight_bytes(self) -> int:
        """Return the bytes of all weight inputs, as packed."""
        return sum(node.meta["val"].nbytes for node in self.placeholders() if node.name in self.weights)

    def with_attention(self, attention: str) -> ModelGraph:
        """Return a copy whose attention is "dense" or "sparse" throughout; "auto" keeps each row's own gear."""
        mapping: dict[Node, Node] = {}
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, mapping))
        if attention != "auto":
            for node in graph.nodes:
                if node.target is torch.ops.arkinfer.attention.default:
                    # A captured call ends before the arguments that have their defaults.
                    missing = node.target._schema.arguments[len(node.args) :]
                    node.args = (*node.args, *(argument.default_value for argument in missing))
                    if attention == "dense":
                        node.update_arg(_SPARSE, False)
                    else:
                        node.update_arg(_GEAR, 0)
        return replace(self, graph=graph)

    def with_activations(self, rounding: str) -> ModelGraph:
        """Return a copy whose linears round int8 activations as ``rounding`` says, see arkinfer.ops.linear."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        for node in graph.nodes:
            if node.target is torch.ops.arkinfer.linear.default and node.args[_ACTIVATIONS:] == ("int8",):
                node.update_arg(_ACTIVATIONS, rounding)
        return replace(self, graph=graph)

    def residuals(self) -> dict[str, str]:
        """Return the nodes that hold the residual stream after each layer: node name -> ``layer.N``."""
        sums = [node for node in self.graph.nodes if node.target is torch.ops.arkinfer.add_rms_norm.default]
        streams = [
            next(user for user in node.users if user.args[1] == 0) if _first_used(node) else None for node in sums
        ]
        after_mlp = [node for index, node in enumerate(streams) if index % 2 == 1 and node is not None]
        return {node.name: f"layer.{index}" for index, node in enumerate(after_mlp)}

    def dump(self) -> str:
        """Return the graph as text: one line per operator with its inputs, attributes and output shapes."""
        config = self.config
        symbols = self._symbols()

        def described(node: Node) -> str:
            return re.sub(r"\bs\d+\b", lambda match: symbols.get(match.group(), match.group()), _type(node))

        lines = [
            f"# {config.family}: {config.layers} layers, hidden {config.hidden_size}, "
            f"heads {config.heads}/{config.kv_heads} x "
            f"{config.head_dim}, vocabulary {config.vocab_size}, context {self.context}"
        ]
        for node in self.graph.nodes:
            if node.op == "placeholder":
                weight = self.weights.get(node.name)
                origin = "" if weight is None else f"  # {weight.format} {' + '.join(weight.sources)}"
                lines.append(f"input {node.name}: {described(node)}{origin}")
            elif node.op == "call_function":
                arguments = [_text(argument) for argument in node.args]
                arguments += [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
                lines.append(f"{node.name}: {described(node)} = {_target(node)}({', '.join(arguments)})")
            else:
                lines.append(f"return {_text(node.args[0])}")
        return "\n".join(lines) + "\n"

    def _symbols(self) -> dict[str, str]:
        """Return readable names for the symbolic sizes, which torch numbers differently from release to release."""
        names: dict[str, str] = {}
        for node in self.placeholders():
            value = node.meta.get("val")
            for size in map(str, value.shape if isinstance(value, torch.Tensor) else ()):
                if not size.isdigit():
                    names.setdefault(size, {"tokens": "n", "rows": "r"}.get(node.name, f"c{len(names)}"))
        return names

    def digest(self) -> str:
        """Return the SHA-256 of the dump: equal graphs have equal digests, whatever machine captured them."""
        return hashlib.sha256(self.dump().encode()).hexdigest()

    def operators(self) -> dict[str, int]:
        """Return how often each operator occurs."""
        counts: dict[str, int] = {}
        for node in self.graph.nodes:
            if node.op == "call_function":
                counts[_target(node)] = counts.get(_target(node), 0) + 1
        return dict(sorted(counts.items()))


def _first_used(node: Node) -> bool:
    return any(user.args[1] == 0 for user in node.users)


def _target(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)


def _type(node: Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_type_of(item) for item in value) + ")"
    return "none" if value is None else type(value).__name__


def _type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"
    return str(type(value).__name__)


class _Step(torch.nn.Module):
    """One decoder step over explicit state: what is exported."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, caches: list[LayerCache]
    ) -> torch.Tensor:
        hidden: torch.Tensor = self.model(tokens, positions, caches)
        return self.model.head(hidden.index_select(0, rows))


_CAPACITY = 1024
_KV = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}


def capture(config: ModelConfig, context: int, kv: str = "fp16") -> ModelGraph:
    """Export one step of ``config``'s model for up to ``context`` tokens and ``kv`` caches; no weight is read."""
    with torch.device("meta"):
        module = models.create(config)
    count, rows, room = torch.export.Dim("n"), torch.export.Dim("r"), torch.export.Dim("capacity", min=256)
    tokens = torch.empty(37, dtype=torch.int64, device="meta")  # torch.export specialises on sizes 0 and 1
    wanted = torch.empty(11, dtype=torch.int64, device="meta")
    caches = new_caches(config, _CAPACITY, _KV[kv], "meta")

    def growing(tensor: torch.Tensor | None) -> dict[int, Any] | None:
        if tensor is None or tensor.numel() == 0:
            return None if tensor is None else {}
        return {1: room if tensor.shape[1] == _CAPACITY else torch.export.Dim.AUTO}

    # A tree of the inputs' shape with the growing axes in the places of the tensors.
    dynamic: list[Any] = [LayerCache._make(map(growing, cache)) for cache in caches]
    shapes = ({0: count}, {0: count}, {0: rows}, dynamic)
    exported = torch.export.export(
        _Step(module), (tokens, torch.empty_like(tokens), wanted, caches), dynamic_shapes=shapes, strict=False
    )
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tied = {"model.lm_head.weight": "model.model.embed_tokens.weight"} if config.tie_embeddings else {}
    inputs = [node.name for node in exported.graph.nodes if node.op == "placeholder" and node.name not in names]
    weights, constants = {}, {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in signature.inputs_to_buffers:
            name = names[node.name]
            constants[node.name] = exported.constants[name] if name in exported.constants else exported.state_dict[name]
        elif node.op == "placeholder" and node.name in names:
            source = tied.get(names[node.name], names[node.name]).removeprefix("model.")
            weights[node.name] = Weight(source, (source,), tuple(node.meta["val"].shape))
    model = ModelGraph(config, context, exported.graph, tuple(inputs[len(STEP_INPUTS) :]), weights, constants)
    _merge_tied(model)
    return model


def _merge_tied(model: ModelGraph) -> None:
    """Let every reader of a tied weight read one input."""
    first: dict[tuple[str, ...], Node] = {}
    for node in model.placeholders():
        weight = model.weights.get(node.name)
        if weight is None:
            continue
        kept = first.setdefault(weight.sources, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
    model.drop_unused_weights()
