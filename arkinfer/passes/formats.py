"""Give every weight of the graph its storage format, and rewrite the operators that read it."""

from __future__ import annotations

from dataclasses import replace

import torch

from arkinfer.errors import UnsupportedError
from arkinfer.graph import ModelGraph, Node, Weight
from arkinfer.quant.packed import DTYPES, PER_BYTE, group_extent
from arkinfer.recipe import Recipe, Storage

aten = torch.ops.aten
ark = torch.ops.arkinfer


def body(model: ModelGraph) -> list[str]:
    """Return the names of the checkpoint's matrices between the embedding table and the output head."""
    return [source for node in linears(model) if not is_head(model, node) for source in model.weight_of(node).sources]


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
            dtype = DTYPES[storage.dtype]
            stored = replace(weight, **{**vars(storage), "dtype": dtype})
            if storage.format == "dense":
                packed[node.name] = stored, [model.add_weight(stored, dtype=dtype), None, None, None]
                return packed[node.name]
            groups = width // group_extent(storage.group, width)

            def part(name: str, kind: torch.dtype, *shape: int) -> Node:
                return model.add_weight(replace(stored, part=name), dtype=kind, shape=shape)

            code = torch.int8 if storage.format == "int8" else torch.uint8
            packed[node.name] = (
                stored,
                [
                    part("weight", code, rows, -(-width // PER_BYTE[storage.format])),
                    part("scales", dtype, rows, groups),
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
        if weight.order:
            raise UnsupportedError(
                "the embedding table is stored with permuted columns",
                facts={"tensor": weight.name},
                hint="--weights fp16 multiplies it out",
                code="ARK-E314",
            )
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
