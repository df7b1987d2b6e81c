"""Give every weight of the graph its storage format, and rewrite the operators that read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd

import torch

from arkinfer.errors import UserError, nearest
from arkinfer.graph import ModelGraph, Node, Weight
from arkinfer.quant import ternary
from arkinfer.quant.integer import group_size
from arkinfer.quant.packed import group_extent

aten = torch.ops.aten
ark = torch.ops.arkinfer

WEIGHTS = ("auto", "fp32", "fp16", "int8", "int4", "ternary")
INT8_GROUP = 128
INT4_GROUP = 64
_DENSE = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Recipe:
    """How weights are stored and activations computed.

    ``weights`` is one of WEIGHTS but never auto. ``activations`` is "int8" (quantised per token and group, see
    ops.linear) or "float" (exact). ``groups`` maps the checkpoint tensors that are ternary to their group size.
    """

    weights: str
    activations: str
    groups: Mapping[str, int]

    def linear(self, weight: Weight, dtype: torch.dtype) -> tuple[str, int, torch.dtype]:
        """Return (format, group, dtype of a dense weight) for the matrix of one linear layer."""
        width = weight.shape[1]
        sizes = [self.groups.get(source) for source in weight.sources]
        if self.weights in ("ternary", "auto") and all(size is not None for size in sizes):
            extent = gcd(*(group_extent(size or 0, width) for size in sizes))
            return "ternary", 0 if extent == width else extent, dtype
        if self.weights == "int4" and width % 2 == 0:
            return "int4", group_size(width, INT4_GROUP), dtype
        if self.weights in ("int8", "int4", "ternary"):
            return "int8", group_size(width, INT8_GROUP), dtype
        # A bfloat16 weight widens to float32 exactly, so storing it wider would only cost bytes.
        return "dense", 0, dtype if self.weights == "fp32" else _DENSE[self.weights]

    def table(self, weight: Weight, dtype: torch.dtype) -> tuple[str, int, torch.dtype]:
        """Return the same for the embedding table and the output head, which stay at 8 bits in every integer recipe."""
        if self.weights in _DENSE:
            return self.linear(weight, dtype)
        return "int8", group_size(weight.shape[1], INT8_GROUP), dtype


def choose(
    weights: str, default: str, model: ModelGraph, tensors: Mapping[str, torch.Tensor], activations: str = "auto"
) -> Recipe:
    """Resolve the user's ``weights`` against what the checkpoint holds.

    ``auto`` keeps a ternary checkpoint ternary and takes ``default`` otherwise. Raises UserError for unknown names and
    for ``ternary`` on weights that were not trained ternary.
    """
    if weights not in WEIGHTS:
        raise UserError(f"unknown weights {weights!r}", hint=nearest(weights, WEIGHTS), code="ARK-E130")
    if activations not in ("auto", "int8", "float"):
        raise UserError(f"activations are auto, int8 or float, not {activations!r}", code="ARK-E131")
    groups: dict[str, int] = {}
    if weights in ("auto", "ternary"):
        body = [
            source for node in linears(model) if not is_head(model, node) for source in model.weight_of(node).sources
        ]
        for source in body:
            group = ternary.detect(tensors[source])
            if group is None and (weights == "auto" or not groups):
                groups.clear()
                break
            if group is not None:
                groups[source] = group
        missing = [source for source in body if source not in groups]
        if weights == "ternary" and missing:
            raise UserError(
                "these weights are not ternary, and rounding them to three values would destroy the model",
                facts={"not ternary": f"{len(missing)} of {len(body)} matrices, first {missing[0]}"},
                hint="--weights int4",
                code="ARK-E132",
            )
        weights = "ternary" if groups and not missing else default
    integer = weights in ("int8", "int4", "ternary")
    if activations == "int8" and not integer:
        raise UserError(f"int8 activations need integer weights, not {weights}", hint="--weights int8", code="ARK-E131")
    return Recipe(weights, ("int8" if integer else "float") if activations == "auto" else activations, groups)


def linears(model: ModelGraph) -> list[Node]:
    """Return the linear nodes in execution order."""
    return [node for node in model.graph.nodes if node.target is ark.linear.default]


def is_head(model: ModelGraph, node: Node) -> bool:
    """Tell whether ``node`` is the output head: the linear whose width is the vocabulary."""
    return model.weight_of(node).shape[0] == model.config.vocab_size and node is linears(model)[-1]


def assign(model: ModelGraph, recipe: Recipe, dtypes: Mapping[str, torch.dtype]) -> ModelGraph:
    """Rewrite linears and embeddings to read packed weights as ``recipe`` says; ``dtypes`` are the checkpoint's."""
    graph = model.graph
    packed: dict[str, list[Node | None]] = {}  # weight placeholder -> weight, scales

    def placeholders(node: Node, choice: tuple[str, int, torch.dtype]) -> list[Node | None]:
        if node.name not in packed:
            weight = model.weights[node.name]
            form, group, dtype = choice
            stored = replace(weight, format=form, group=group)
            rows, width = weight.shape
            if form == "dense":
                packed[node.name] = [model.add_weight(replace(stored, dtype=dtype), dtype=dtype), None]
            else:
                bytes_per_row = {"int8": width, "int4": width // 2, "ternary": -(-width // 4)}[form]
                kind = torch.int8 if form == "int8" else torch.uint8
                matrix = model.add_weight(stored, dtype=kind, shape=(rows, bytes_per_row))
                scale_dtype = dtypes[weight.sources[0]] if form == "ternary" else torch.float16
                count = width // group_extent(group, width)
                scales = model.add_weight(replace(stored, part="scales"), dtype=scale_dtype, shape=(rows, count))
                packed[node.name] = [matrix, scales]
        return packed[node.name]

    for node in linears(model):
        weight = model.weight_of(node)
        dtype = dtypes[weight.sources[0]]
        choice = recipe.table(weight, dtype) if is_head(model, node) else recipe.linear(weight, dtype)
        matrix, scales = placeholders(node.args[1], choice)
        form, group, _ = choice
        with graph.inserting_before(node):
            activations = "float" if form == "dense" else recipe.activations
            bias = node.args[5] if len(node.args) > 5 else node.kwargs.get("bias")
            arguments = (node.args[0], matrix, scales, None, None, bias, form, group, activations)
            replacement = model.call(ark.linear.default, arguments)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    for node in [node for node in graph.nodes if node.target is aten.embedding.default]:
        table, tokens = node.args[:2]
        weight = model.weights[table.name]
        choice = recipe.table(weight, dtypes[weight.sources[0]])
        matrix, scales = placeholders(table, choice)
        with graph.inserting_before(node):
            replacement = model.call(ark.embedding.default, (tokens, matrix, scales, choice[0], choice[1], 1.0))
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
            node.args = (*node.args[:5], node.args[5] * scale)
            users[0].replace_all_uses_with(node)
            graph.erase_node(users[0])
    return model
