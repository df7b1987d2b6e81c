"""Give every weight of the graph its storage format, and rewrite the operators that read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import gcd
from typing import Any

import torch

from arkinfer.checkpoint import Checkpoint
from arkinfer.checkpoint.stored import Layout
from arkinfer.errors import UserError, nearest
from arkinfer.graph import ModelGraph, Node, Weight
from arkinfer.quant import ternary
from arkinfer.quant.integer import group_size
from arkinfer.quant.packed import DTYPES, PER_BYTE, group_extent

aten = torch.ops.aten
ark = torch.ops.arkinfer

WEIGHTS = ("auto", "fp32", "fp16", "int8", "int4", "ternary")
HEADS = ("int8", "int4")
INT8_GROUP = 128
INT4_GROUP = 64
_DENSE = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Storage:
    """How one weight is stored: see Weight for the meaning of the fields."""

    format: str
    group: int
    dtype: torch.dtype
    zeros: bool = False
    order: str = ""


@dataclass(frozen=True)
class Rule:
    """Store the weights whose name matches ``pattern`` as ``weights``, in groups of ``group`` inputs (0: the default).

    Patterns are those of shells; "layers.0.*" and "model.layers.0.*" mean the same.
    """

    pattern: str
    weights: str
    group: int = 0

    def matches(self, source: str) -> bool:
        return any(fnmatchcase(name, self.pattern) for name in (source, source.removeprefix("model.")))


@dataclass(frozen=True)
class Recipe:
    """How weights are stored and activations computed.

    ``weights`` is one of WEIGHTS but never auto. ``activations`` is "int8" (quantised per token and group, see
    ops.linear) or "float" (exact). ``layouts`` says how the checkpoint holds each weight, ternary ones recognised.
    ``rules`` overrule ``weights``, the first that matches. ``head`` is the format of the embedding table and the output
    head in integer recipes; ``group`` the inputs that share an int4 scale.
    """

    weights: str
    activations: str
    layouts: Mapping[str, Layout]
    rules: tuple[Rule, ...] = ()
    head: str = "int8"
    group: int = INT4_GROUP

    def storage(self, weight: Weight, table: bool = False) -> Storage:
        """Return how ``weight`` is stored; ``table``: it is the embedding table or the output head."""
        found = [self._one(source, table) for source in weight.sources]
        if all(item.format == "ternary" for item in found):
            extent = gcd(*(group_extent(item.group, weight.shape[1]) for item in found))
            return replace(found[0], group=0 if extent == weight.shape[1] else extent)
        return found[0]

    def joinable(self, weights: Sequence[Weight]) -> bool:
        """Tell whether ``weights`` can be stored as one: in the same format, with the same order of columns."""
        found = {self._one(source, False) for weight in weights for source in weight.sources}
        if all(item.format == "ternary" for item in found):
            return len({item.dtype for item in found}) == 1
        return len(found) == 1

    def _one(self, source: str, table: bool) -> Storage:
        layout = self.layouts[source]
        width, dtype = layout.shape[-1], DTYPES[layout.dtype]
        rule = next((rule for rule in self.rules if rule.matches(source)), None)
        wanted = rule.weights if rule else self.weights
        if wanted in _DENSE:
            exact = torch.float32 if layout.quantised else dtype
            # A bfloat16 weight widens to float32 exactly, so storing it wider would only cost bytes.
            return Storage("dense", 0, exact if wanted == "fp32" else _DENSE[wanted])
        if layout.quantised:
            return Storage(layout.format, layout.group, dtype, layout.zeros, layout.order)
        if table and not rule and wanted != "int8":
            wanted = self.head
        if wanted == "int4" and width % 2 == 0:
            group = (rule.group if rule else 0) or self.group
            return Storage("int4", group_size(width, group), torch.float16)
        return Storage("int8", group_size(width, INT8_GROUP), torch.float16)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, from which ``from_dict`` makes an equal recipe."""
        return {
            "layouts": {name: layout.to_dict() for name, layout in self.layouts.items()},
            "rules": [[rule.pattern, rule.weights, rule.group] for rule in self.rules],
            "head": self.head,
            "group": self.group,
        }

    @classmethod
    def from_dict(cls, weights: str, activations: str, values: Mapping[str, Any]) -> Recipe:
        return cls(
            weights,
            activations,
            {name: Layout.from_dict(layout) for name, layout in values["layouts"].items()},
            tuple(Rule(*rule) for rule in values["rules"]),
            values["head"],
            values["group"],
        )


def choose(
    weights: str,
    default: str,
    model: ModelGraph,
    checkpoint: Checkpoint,
    activations: str = "auto",
    rules: Sequence[Rule] = (),
    head: str = "int8",
    group: int = INT4_GROUP,
) -> Recipe:
    """Resolve the user's ``weights`` against what the checkpoint holds.

    ``auto`` keeps quantised and ternary weights as they are, tensor by tensor, and takes ``default`` for the others.
    Raises UserError for unknown names, for ``ternary`` on weights that were not trained ternary, and for an integer
    format on weights that are already quantised to another one.
    """
    if weights not in WEIGHTS:
        raise UserError(f"unknown weights {weights!r}", hint=nearest(weights, WEIGHTS), code="ARK-E130")
    if activations not in ("auto", "int8", "float"):
        raise UserError(f"activations are auto, int8 or float, not {activations!r}", code="ARK-E131")
    layouts = checkpoint.layouts()
    body = [source for node in linears(model) if not is_head(model, node) for source in model.weight_of(node).sources]
    quantised = {layouts[source].format for source in body if layouts[source].quantised}
    if weights in ("auto", "ternary"):
        for source in body:
            if not layouts[source].quantised and (group_found := ternary.detect(checkpoint.weight(source))) is not None:
                layouts[source] = replace(layouts[source], format="ternary", group=group_found, scheme="ternary")
        found = [source for source in body if layouts[source].format == "ternary"]
        if weights == "ternary" and not found:
            raise UserError(
                "these weights are not ternary, and rounding them to three values would destroy the model",
                facts={"ternary": f"none of {len(body)} matrices"},
                hint="--weights int4",
                code="ARK-E132",
            )
        weights = "ternary" if found else sorted(quantised)[0] if quantised else default
    elif weights not in _DENSE and quantised - {weights}:
        raise UserError(
            f"the checkpoint is quantised already, and rounding its integers again to {weights} would lose more",
            facts={"stored as": ", ".join(sorted(quantised))},
            hint="--weights auto keeps its integers; --weights fp16 multiplies them out",
            code="ARK-E129",
        )
    integer = weights not in _DENSE
    if activations == "int8" and not integer:
        raise UserError(f"int8 activations need integer weights, not {weights}", hint="--weights int8", code="ARK-E131")
    used = {source for weight in model.weights.values() for source in weight.sources}
    return Recipe(
        weights,
        ("int8" if integer else "float") if activations == "auto" else activations,
        {name: layouts[name] for name in sorted(used)},
        tuple(rules),
        head,
        group,
    )


def linears(model: ModelGraph) -> list[Node]:
    """Return the linear nodes in execution order."""
    return [node for node in model.graph.nodes if node.target is ark.linear.default]


def is_head(model: ModelGraph, node: Node) -> bool:
    """Tell whether ``node`` is the output head: the linear whose width is the vocabulary."""
    return model.weight_of(node).shape[0] == model.config.vocab_size and node is linears(model)[-1]


def assign(model: ModelGraph, recipe: Recipe) -> ModelGraph:
    """Rewrite linears and embeddings to read packed weights as ``recipe`` says."""
    graph = model.graph
    packed: dict[
        str, tuple[Weight, list[Node | None]]
    ] = {}  # placeholder -> stored weight; weight, scales, zeros, order

    def placeholders(node: Node, storage: Storage) -> tuple[Weight, list[Node | None]]:
        if node.name not in packed:
            weight = model.weights[node.name]
            rows, width = weight.shape
            stored = replace(weight, **vars(storage))
            if storage.format == "dense":
                packed[node.name] = stored, [model.add_weight(stored, dtype=storage.dtype), None, None, None]
                return packed[node.name]
            groups = width // group_extent(storage.group, width)

            def part(name: str, dtype: torch.dtype, *shape: int) -> Node:
                return model.add_weight(replace(stored, part=name), dtype=dtype, shape=shape)

            code = torch.int8 if storage.format == "int8" else torch.uint8
            packed[node.name] = (
                stored,
                [
                    part("weight", code, rows, -(-width // PER_BYTE[storage.format])),
                    part("scales", storage.dtype, rows, groups),
                    part("zeros", torch.uint8, rows, groups) if storage.zeros else None,
                    part("order", torch.int32, width) if storage.order else None,
                ],
            )
        return packed[node.name]

    for node in linears(model):
        storage = recipe.storage(model.weight_of(node), is_head(model, node))
        weight, parts = placeholders(node.args[1], storage)
        with graph.inserting_before(node):
            activations = "float" if weight.format == "dense" else recipe.activations
            bias = node.args[5] if len(node.args) > 5 else node.kwargs.get("bias")
            arguments = (node.args[0], *parts, bias, weight.format, weight.group, activations)
            replacement = model.call(ark.linear.default, arguments)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    for node in [node for node in graph.nodes if node.target is aten.embedding.default]:
        table, tokens = node.args[:2]
        weight, parts = placeholders(table, recipe.storage(model.weights[table.name], table=True))
        with graph.inserting_before(node):
            replacement = model.call(ark.embedding.default, (tokens, *parts[:3], weight.format, weight.group, 1.0))
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    model.drop_unused_weights()
    return model


def embedding_scale(model: ModelGraph) -> ModelGraph:
    """Fold a scalar multiplication of the embedding's output into the operator."""
    graph = model.graph
    for node in [node for node in graph.nodes if node.target is ark.embedding.default]:
        users = list(node.users)
        if len(users) == 1 and users[0].target is aten.mul.Tensor and isinstance(users[0].args[1], (int, float)):
            scale = float(users[0].args[1])
            node.args = (*node.args[:6], node.args[6] * scale)
            users[0].replace_all_uses_with(node)
            graph.erase_node(users[0])
    return model
