"""What a build compiles in, resolved from what the user, the target and the model say."""

from __future__ import annotations

from arkinfer import exporters
from arkinfer.config import ModelConfig
from arkinfer.errors import UserError, nearest
from arkinfer.exporters.base import BuildOptions
from arkinfer.targets import Target

KV = ("fp32", "fp16", "int8")
ATTENTION = ("auto", "dense", "sparse")
_FLOAT_WEIGHTS = "int8"  # what `auto` makes of a checkpoint that is neither quantised nor ternary


def resolve(config: ModelConfig, target: Target, kv: str | None, attention: str, context: int | None) -> BuildOptions:
    """Return the options of a build. Raises UserError for what the model or arkinfer does not have."""
    kv = kv or target.defaults.kv or "fp16"
    if kv not in KV:
        raise UserError(f"unknown kv {kv!r}", hint=nearest(kv, KV), code="ARK-E133")
    if attention not in ATTENTION:
        raise UserError(f"unknown attention {attention!r}", hint=nearest(attention, ATTENTION), code="ARK-E134")
    if attention == "sparse" and config.sparse is None:
        raise UserError(
            "this model has no sparse attention: its config.json has no sparse_config",
            hint="--attention dense",
            code="ARK-E213",
        )
    limit = config.max_context
    default = target.defaults.context
    # "fit" is settled by planning.fitted, which knows how the weights are stored.
    wanted = context or min(limit, default if isinstance(default, int) else limit)
    if not 1 <= wanted <= limit:
        raise UserError(
            f"a context of {wanted} tokens is not possible",
            facts={"the model's limit": limit},
            hint=f"--context {limit}, or raise max_position_embeddings if the model was extended",
            code="ARK-E135",
        )
    return BuildOptions(kv, attention, wanted)


def computed(target: Target, activations: str) -> str:
    """Return the activations of a build, where auto is for the weights to decide unless the target decides.

    Raises UserError for int8 activations where the target's kernels have none.
    """
    if not exporters.multiplies_floats(target) or activations == "float":
        return activations
    if activations == "int8":
        raise UserError(
            f"the kernels for {target.name} multiply float16 activations, not int8",
            hint="--activations float",
            code="ARK-E131",
        )
    return "float" if activations == "auto" else activations


def fallback(target: Target) -> str:
    """Return what `auto` makes of weights that are neither quantised nor ternary."""
    default = target.defaults.weights
    return _FLOAT_WEIGHTS if default in (None, "auto") else default
