"""The pass pipeline: one visible list, run in order over the captured graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from arkinfer.graph import ModelGraph
from arkinfer.passes import formats, fuse

FUSE: tuple[Callable[[ModelGraph], ModelGraph], ...] = (
    fuse.simplify,
    fuse.shared_input_linears,
    fuse.swiglu,
    fuse.add_rms_norm,
)


def run(
    model: ModelGraph,
    recipe: formats.Recipe,
    dtypes: Mapping[str, torch.dtype],
    observe: Callable[[str, ModelGraph], None] | None = None,
) -> ModelGraph:
    """Run every pass over ``model`` in place and return it; ``observe(pass name, graph)`` is called after each."""
    passes: list[tuple[str, Callable[[ModelGraph], ModelGraph]]] = [(step.__name__, step) for step in FUSE]
    passes.append(("assign formats", lambda graph: formats.assign(graph, recipe, dtypes)))
    passes.append(("embedding scale", formats.embedding_scale))
    for name, step in passes:
        model = step(model)
        model.graph.lint()
        if observe is not None:
            observe(name, model)
    return model
