"""The model graph: torch.export's, captured on meta tensors, with its weights named and its state explicit."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

import arkinfer.ops.attention  # noqa: F401  (registers arkinfer::attention)
import arkinfer.ops.linear  # noqa: F401
import arkinfer.ops.rope  # noqa: F401
from arkinfer.config import ModelConfig
from arkinfer.errors import UnsupportedError
from arkinfer.models import FAMILIES
from arkinfer.ops.attention import LayerCache

STEP_INPUTS = ("tokens", "positions", "rows")


@dataclass(frozen=True)
class Weight:
    """A weight input of the graph: the checkpoint tensors it is made of, stacked along their first axis."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    format: str = "dense"
    group: int = 0
    part: str = "weight"  # or "scales"

    @staticmethod
    def concatenate(parts: Sequence[Weight]) -> Weight:
        """Return the weight that stacks ``parts`` along the output axis, named after all of them."""
        stem, leaves = _common_stem([part.name for part in parts])
        rows = sum(part.shape[0] for part in parts)
        return Weight(stem + "_".join(leaves), tuple(s for part in parts for s in part.sources), (rows, *parts[0].shape[1:]))


def _common_stem(names: Sequence[str]) -> tuple[str, list[str]]:
    """Split dotted names into what all share in front and the part that differs, with a shared last part dropped once."""
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
    cache_fields: tuple[str, ...]
    weights: dict[str, Weight] = field(default_factory=dict)  # placeholder name -> weight
    constants: dict[str, torch.Tensor] = field(default_factory=dict)  # placeholder name -> value

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Node:
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
    ) -> fx.Node:
        """Add a weight input of ``dtype`` and ``shape`` (default: the weight's own) and return its placeholder."""
        last = self.placeholders()[-1]
        name = weight.name if weight.part == "weight" else f"{weight.name}_{weight.part}"
        with self.graph.inserting_after(last):
            node = self.graph.placeholder("w_" + "".join(c if c.isalnum() else "_" for c in name))
        with self._fake_mode():
            node.meta["val"] = torch.empty(shape or weight.shape, dtype=dtype, device="meta")
        self.weights[node.name] = weight
        return node

    def weight_of(self, node: fx.Node) -> Weight:
        """Return the weight that a linear or embedding node reads."""
        index = 0 if node.target is torch.ops.aten.embedding.default else 1
        return self.weights[node.args[index].name]

    def _fake_mode(self) -> torch._subclasses.FakeTensorMode:
        values = (node.meta.get("val") for node in self.graph.nodes)
        return next(value.fake_mode for value in values if isinstance(value, torch._subclasses.FakeTensor))

    def uses(self, node: fx.Node) -> int:
        """Return how many nodes read ``node``."""
        return len(node.users)

    def drop_unused_weights(self) -> None:
        """Remove weight inputs that nothing reads any more."""
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and not node.users and (node.name in self.weights or node.name in self.constants):
                self.weights.pop(node.name, None)
                self.constants.pop(node.name, None)
                self.graph.erase_node(node)

    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def dump(self) -> str:
        """Return the graph as text: one line per operator with its inputs, attributes and output shapes."""
        config = self.config
        lines = [
            f"# {config.family}: {config.layers} layers, hidden {config.hidden_size}, heads {config.heads}/{config.kv_heads} x "
            f"{config.head_dim}, vocabulary {config.vocab_size}, context {self.context}"
        ]
        for node in self.graph.nodes:
            if node.op == "placeholder":
                weight = self.weights.get(node.name)
                origin = "" if weight is None else f"  # {weight.format} {' + '.join(weight.sources)}"
                lines.append(f"input {node.name}: {_type(node)}{origin}")
            elif node.op == "call_function":
                arguments = [_text(argument) for argument in node.args]
                arguments += [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
                lines.append(f"{node.name}: {_type(node)} = {_target(node)}({', '.join(arguments)})")
            else:
                lines.append(f"return {_text(node.args[0])}")
        return "\n".join(lines) + "\n"

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


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.name().replace("::", ".")
    return getattr(node.target, "__name__", str(node.target))


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)


def _type(node: fx.Node) -> str:
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

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, caches: list[LayerCache]) -> torch.Tensor:
        hidden = self.model(tokens, positions, caches)
        return self.model.head(hidden.index_select(0, rows))


def build_module(config: ModelConfig, context: int) -> torch.nn.Module:
    """Return the torch module of ``config``'s family, weights on the meta device."""
    location = FAMILIES.get(config.family)
    if location is None:
        raise UnsupportedError(
            f"no model definition for the family {config.family!r}",
            facts={"known": ", ".join(sorted(FAMILIES))},
            hint="add one file to arkinfer/models and one line to its table",
        )
    module, name = location.split(":")
    with torch.device("meta"):
        built: torch.nn.Module = getattr(importlib.import_module(module), name)(config, context)
    return built
