"""Dense or sparse: which rows of an artifact attend to chosen blocks alone, and what a decode step reads."""

from __future__ import annotations

from collections.abc import Mapping

from arkinfer.errors import UserError

NEVER = 2**62  # a dense_len that no position reaches


def gear(sparse: Mapping[str, int] | None, attention: str) -> int:
    """Return ``threshold``'s result. Raises UserError for a gear that does not exist or that the artifact lacks."""
    if attention == "sparse" and sparse is None:
        raise UserError(
            "this artifact has no sparse attention",
            facts={"reason": "its model has no sparse_config, or it was built for dense attention alone"},
            hint="--attention dense, or add sparse_config to config.json and build again",
            code="ARK-E213",
        )
    if attention not in ("auto", "dense", "sparse"):
        raise UserError(f"attention is auto, dense or sparse, not {attention!r}", code="ARK-E213")
    return threshold(sparse, attention)


def threshold(sparse: Mapping[str, int] | None, attention: str) -> int:
    """Return the length from which rows attend sparsely, by the artifact's ``sparse`` and the gear asked for."""
    if attention == "dense" or sparse is None:
        return NEVER
    length = int(sparse["dense_len"])
    return 0 if attention == "sparse" or length < 0 else length


def visible(sparse: Mapping[str, int] | None, gear: int, depth: int) -> int:
    """Return how many keys the row at ``depth`` attends to, itself included; ``gear`` is ``threshold``'s result."""
    if depth + 1 < gear or sparse is None:
        return depth + 1
    blocks = sparse["topk"] + sparse["window_size"] // sparse["block_size"]
    return min(depth + 1, blocks * sparse["block_size"])


def decode_bytes(entry: Mapping[str, float], sparse: Mapping[str, int] | None, gear: int, depth: int) -> int:
    """Return the bytes that one decode step must read; ``entry`` and ``sparse`` are those of payload/plan.json."""
    total = entry["weights"] + visible(sparse, gear, depth) * entry["kv_per_token"]
    if depth + 1 < gear or sparse is None:
        return int(total)
    return int(total + (depth + 1) * entry["compressed_per_token"])
