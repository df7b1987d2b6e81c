"""What the CPU kernels cannot run, said before anything is built."""

from __future__ import annotations

from arkinfer.exporters.base import BuildOptions
from arkinfer.graph import ModelGraph
from arkinfer.ops.linear import activation_group
from arkinfer.passes.formats import linears
from arkinfer.targets import Target

LANES = 16  # the kernels work on vectors of 16 values along every inner axis


def reasons(model: ModelGraph, target: Target, options: BuildOptions) -> list[str]:
    """Return one sentence per obstacle; empty if ``model`` can be lowered."""
    from arkinfer.exporters.kernels.tir.isa import ISAS

    config = model.config
    found = [f"no kernels are generated for the level {level}" for level in target.arch if level not in ISAS]
    for name, value in (
        ("head_dim", config.head_dim),
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
    ):
        if value % LANES:
            found.append(f"{name} {value} is not a multiple of {LANES}")
    sparse = config.sparse
    if sparse is not None and options.attention != "dense" and sparse.block_size % LANES:
        found.append(f"sparse_config.block_size {sparse.block_size} is not a multiple of {LANES}")
    for node in linears(model):
        weight = model.weight_of(node)
        group = activation_group(weight.group, weight.shape[1]) if weight.format != "dense" else LANES
        if group % LANES:
            found.append(
                f"{weight.name}: groups of {group} inputs are not a multiple of {LANES}; --weights fp16 avoids them"
            )
            break
    return found
