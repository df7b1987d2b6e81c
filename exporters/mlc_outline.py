"""What an MLC package will hold, and what it cannot, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from arkinfer.artifact.tensors import ITEM_BYTES, TensorSpec
from arkinfer.config import ModelConfig
from arkinfer.exporters import refusals
from arkinfer.exporters.base import BuildOptions, StoredMatrix
from arkinfer.exporters.kernels.tir.paged import PAGE
from arkinfer.exporters.outline import CpuOutline
from arkinfer.targets import Target

PLATFORMS = {"android-aarch64": "android", "ios-arm64": "iphone"}  # -> what MLC calls the device
CHUNK = 512  # prompt tokens of one call; the cache and the engine reserve room for as many
_ITEM = {"fp32": ITEM_BYTES["F32"], "fp16": ITEM_BYTES["F16"]}


def reasons(config: ModelConfig, target: Target, options: BuildOptions) -> list[str]:
    """Return one sentence per obstacle to packing a model for MLC; empty if there is none."""
    plain = "--target android or iphone has it" if target.platform in PLATFORMS else "a plain target has it"
    found = refusals.reasons(config, target)
    if target.platform not in PLATFORMS:
        found.append(f"MLC packages are for the platforms {' and '.join(PLATFORMS)}, not {target.platform or 'linux'}")
    if len(target.arch) != 1:
        found.append("an app links one model library: `arch` must name one level")
    if options.kv not in _ITEM:
        found.append(f"MLC's cache keeps keys and values as floats, not {options.kv}; --kv fp16, or {plain}")
    if config.sparse is not None and options.attention != "dense":
        found.append(
            "sparse attention: MLC's cache has no place for compressed keys, so that choosing blocks would read all "
            f"keys at every token; --attention dense, or {plain}"
        )
    return found


class MlcOutline(CpuOutline):
    """The mlc backend as `arkinfer plan` sees it: the CPU's matrices, another cache."""

    def reasons(
        self, config: ModelConfig, weights: Iterable[StoredMatrix], target: Target, options: BuildOptions
    ) -> list[str]:
        """Return why a model cannot be packed; empty if it can."""
        return reasons(config, target, options)

    def caches(self, config: ModelConfig, kv: str, capacity: int) -> Mapping[str, int]:
        """Return the bytes of the pool of pages for ``capacity`` tokens; MLC keeps one page in reserve."""
        pages = -(-capacity // PAGE) + 1
        item = _ITEM.get(kv, ITEM_BYTES["F16"])
        half = config.layers * pages * config.kv_heads * PAGE * config.head_dim * item
        return {"k": half, "v": half}


def parameter_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Return the bytes of the parameters of a package."""
    return sum(spec.nbytes for spec in specs.values())


def parameter_count(specs: Mapping[str, TensorSpec]) -> int:
    """Return how many numbers the parameters hold as they are stored: a byte of packed codes is one."""
    return sum(math.prod(spec.shape) for spec in specs.values())
