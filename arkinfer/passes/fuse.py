"""Fusions that every backend profits from: fewer, wider operators; the arithmetic of each stays what it was."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

import arkinfer.ops.fused  # noqa: F401  (registers the operators that these passes create)
from arkinfer.graph import ModelGraph, Node, Weight

aten = torch.ops.aten
ark = torch.ops.arkinfer


def _users(graph: fx.Graph, target: Any) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target is target]


def simplify(model: ModelGraph) -> ModelGraph:
    """Drop what export leaves behind: metadata assertions and casts to the dtype that a value already has."""
    for node in list(model.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            model.graph.erase_node(node)
        elif node.target is aten.to.dtype and node.args[1] == node.args[0].meta["val"].dtype:
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
    return model


def shared_input_linears(model: ModelGraph, joinable: Callable[[Sequence[Weight]], bool]) -> ModelGraph:
    """Merge linears that read the same tensor (q, k, v; gate, up) into one, and slice its output.

    One wider matrix streams from memory in one run and quantises its input once. Where ``joinable`` says that the
    weights cannot be stored as one, the linears stay and their outputs are concatenated: readers see the same value.
    """
    graph = model.graph
    siblings: dict[Node, list[Node]] = {}
    for node in _users(graph, ark.linear.default):
        siblings.setdefault(node.args[0], []).append(node)
    for shared, linears in siblings.items():
        if len(linears) < 2 or any(model.uses(linear.args[1]) > 1 for linear in linears):
            continue
        parts = [model.weights[linear.args[1].name] for linear in linears]
        biases = [linear.args[5] if len(linear.args) > 5 else linear.kwargs.get("bias") for linear in linears]
        if any(bias is None for bias in biases) != all(bias is None for bias in biases):
            continue
        with graph.inserting_before(linears[0]):
            if joinable(parts):
                merged, keywords = model.add_weight(Weight.concatenate(parts)), {}
                if biases[0] is not None:
                    keywords["bias"] = model.add_weight(
                        Weight.concatenate([model.weights[item.name] for item in biases])
                    )
                fused = model.call(ark.linear.default, (shared, merged), keywords)
            else:
                again = [model.call(ark.linear.default, linear.args, linear.kwargs) for linear in linears]
                fused = model.call(aten.cat.default, (again, 1))
        start = 0
        for linear, part in zip(linears, parts, strict=True):
            with graph.inserting_before(linear):
                piece = model.call(aten.slice.Tensor, (fused, 1, start, start + part.shape[0]))
            linear.replace_all_uses_with(piece)
            graph.erase_node(linear)
            start += part.shape[0]
    model.drop_unused_weights()
    return model


def swiglu(model: ModelGraph) -> ModelGraph:
    """Replace ``silu(gate) * up``, both halves of one merged linear, by one operator."""
    graph = model.graph
    for product in _users(graph, aten.mul.Tensor):
        gate, up = product.args[:2]
        if (
            getattr(gate, "target", None) is not aten.silu.default
            or getattr(up, "target", None) is not aten.slice.Tensor
        ):
            continue
        first = gate.args[0]
        if first.target is not aten.slice.Tensor or first.args[0] is not up.args[0]:
            continue
        merged = first.args[0]
        width = merged.meta["val"].shape[1]
        if first.args[1:] != (1, 0, width // 2) or up.args[1:] != (1, width // 2, width):
            continue
        with graph.inserting_before(product):
            fused = model.call(ark.swiglu.default, (merged,))
        product.replace_all_uses_with(fused)
    graph.eliminate_dead_code()
    return model


def add_rms_norm(model: ModelGraph) -> ModelGraph:
    """Replace ``residual + scale * delta`` followed by RMSNorm by one operator that returns both."""
    graph = model.graph
    for norm in _users(graph, aten.rms_norm.default):
        total, _, weight, eps = norm.args
        if total.target is not aten.add.Tensor:
            continue
        residual, delta = total.args
        scale = 1.0
        if delta.target is aten.mul.Tensor and isinstance(delta.args[1], float):
            delta, scale = delta.args
        with graph.inserting_before(total):
            pair = model.call(ark.add_rms_norm.default, (residual, delta, weight, scale, eps))
            added = model.call(operator.getitem, (pair, 0))
            normed = model.call(operator.getitem, (pair, 1))
        norm.replace_all_uses_with(normed)
        total.replace_all_uses_with(added)
        graph.erase_node(norm)
        graph.erase_node(total)
    graph.eliminate_dead_code()
    return model
