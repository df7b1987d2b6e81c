"""What the CPU kernels cannot run, said before anything is built."""

from __future__ import annotations

from collections.abc import Iterable

from arkinfer.config import ModelConfig
from arkinfer.exporters.base import BuildOptions, StoredMatrix
from arkinfer.exporters.kernels.tir import attention
from arkinfer.exporters.kernels.tir.isa import ISAS
from arkinfer.quant.groups import activation_group
from arkinfer.targets import Target

LANES = 16  # the kernels work on vectors of 16 values along every inner axis


def reasons(config: ModelConfig, weights: Iterable[StoredMatrix], target: Target, options: BuildOptions) -> list[str]:
    """Return one sentence per obstacle to running a model with these linear ``weights``; empty if there is none."""
    found = [f"no kernels are generated for the level {level}" for level in target.arch if level not in ISAS]
    for name, value in (("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)):
        if value % LANES:
            found.append(f"{name} {value} is not a multiple of {LANES}")
    # The kernels for both gears are built whatever the default gear, so that one artifact can be opened in either.
    sparse = config.sparse
    sizes = () if sparse is None else (sparse.block_size, sparse.kernel_stride)
    found += attention.unsupported(config.head_dim, *sizes)
    for weight in weights:
        group = activation_group(weight.group, weight.shape[1]) if weight.format != "dense" else LANES
        if group % LANES:
            found.append(
                f"{weight.name}: groups of {group} inputs are not a multiple of {LANES}; --weights fp16 avoids them"
            )
            break
    return found
