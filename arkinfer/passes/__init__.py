"""The pass pipeline: one visible list, run in order over the captured graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from arkinfer.graph import ModelGraph, Weight
from arkinfer.passes import formats, fuse
from arkinfer.recipe import Recipe

Pass: TypeAlias = tuple[str, Callable[[ModelGraph], ModelGraph]]


def fusions(joinable: Callable[[Sequence[Weight]], bool]) -> list[Pass]:
    """Return the passes that merge operators; ``joinable`` tells which weights can be stored as one."""
    return [
        ("simplify", fuse.simplify),
        ("shared_input_linears", lambda graph: fuse.shared_input_linears(graph, joinable)),
        ("swiglu", fuse.swiglu),
        ("add_rms_norm", fuse.add_rms_norm),
    ]


def run(model: ModelGraph, recipe: Recipe, observe: Callable[[str, ModelGraph], None] | None = None) -> ModelGraph:
    """Run every pass over ``model`` in place and return it; ``observe(pass name, graph)`` is called after each."""
    assignments: list[Pass] = [
        ("assign formats", lambda graph: formats.assign(graph, recipe)),
        ("embedding scale", formats.embedding_scale),
    ]
    for name, step in [*fusions(recipe.joinable), *assignments]:
        model = step(model)
        model.graph.lint()
        if observe is not None:
            observe(name, model)
    return model
