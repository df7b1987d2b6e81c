"""What the CPU kernels cannot run, said before anything is built."""

from __future__ import annotations

from arkinfer.config import ModelConfig
from arkinfer.exporters import platforms
from arkinfer.exporters.kernels.tir import attention
from arkinfer.exporters.kernels.tir.isa import ISAS
from arkinfer.targets import Target


def reasons(config: ModelConfig, target: Target) -> list[str]:
    """Return one sentence per obstacle to running a model; empty if there is none. Weights of any shape run."""
    platform = platforms.of(target)
    found = [f"no kernels are generated for the level {level}" for level in target.arch if level not in ISAS]
    found += [
        f"code of the level {level} is not for {platform.name}"
        for level in target.arch
        if level in ISAS and level.startswith("aarch64") != (platform.machine == "aarch64")
    ]
    # The kernels for both gears are built whatever the default gear, so that one artifact can be opened in either.
    sparse = config.sparse
    sizes = () if sparse is None else (sparse.block_size, sparse.kernel_stride)
    return found + attention.unsupported(config.head_dim, *sizes)
