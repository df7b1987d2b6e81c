"""How TensorRT is to make its engine of an artifact's ONNX file, as data that build host and device read alike.

An engine is bound to the GPU, the driver and the version of TensorRT that made it, so an artifact for a Jetson holds no
engine but this recipe: which versions will do, how many tokens a step may have, and what one sequence keeps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FILE = "payload/tensorrt.json"
FORMAT = 1  # of FILE; readers refuse any other
LIBRARIES = ("tensorrt", "tensorrt_rtx")
ITEM_BYTES: Mapping[str, int] = {"float16": 2, "float32": 4, "int8": 1, "int32": 4, "int64": 8}
PROFILES = ("decode", "verify", "prefill")
LEAST_SPAN = 256  # keys: the shortest part of the caches that an engine is asked to read


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: a step of 1 to ``tokens`` tokens and 1 to ``rows`` rows of logits, fastest at the most.

    The decode profile has one of each.
    """

    tokens: int
    rows: int


@dataclass(frozen=True)
class Cache:
    """One tensor that a sequence keeps from step to step: an input that the output ``<name>.out`` is written over."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class EngineRecipe:
    """All that is needed to build the engine and to run it.

    ``library``: the Python package of TensorRT, or of TensorRT for RTX. ``versions``: the range that will do, as in a
    target's toolchain. ``levels``: GPU architectures. ``engine``: the file that holds the engine where it was built
    ahead of time, None where the device builds it. ``workspace``: bytes that one layer may use while it runs.
    ``checked``: what a TensorRT at the build host made of the ONNX file, for people. ``facts``: the model's
    (vocab_size, max_context, sparse, bytes, ops_per_token), as in payload/plan.json.
    """

    library: str
    versions: str
    levels: tuple[str, ...]
    model: str
    engine: str | None
    workspace: int
    profiles: Mapping[str, Profile]
    caches: tuple[Cache, ...]
    checked: str
    facts: Mapping[str, Any]

    @property
    def capacity(self) -> int:
        """Tokens that the caches hold."""
        return max((cache.shape[2] for cache in self.caches if len(cache.shape) == 4), default=0)

    def span(self, length: int) -> int:
        """Return how many keys a step reads that ends at ``length``: a power of two or all, so that few graphs do."""
        return min(max(LEAST_SPAN, 1 << (length - 1).bit_length()), self.capacity)

    @property
    def cache_bytes(self) -> int:
        """Bytes that one sequence keeps."""
        return sum(cache.nbytes for cache in self.caches)

    def to_json(self) -> str:
        """Return the recipe as canonical JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> EngineRecipe:
        """Read and check a recipe. Raises ValueError, with the reason, for anything but a sound one."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"this version of arkinfer reads format {FORMAT}")
        try:
            recipe = EngineRecipe(
                **{
                    **data,
                    "levels": tuple(data["levels"]),
                    "profiles": {name: Profile(**item) for name, item in data["profiles"].items()},
                    "caches": tuple(Cache(**{**item, "shape": tuple(item["shape"])}) for item in data["caches"]),
                }
            )
            recipe.check()
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"an entry is missing or malformed: {error}") from error
        return recipe

    def check(self) -> None:
        """Raise ValueError where an engine made by this recipe could not be run."""
        if self.library not in LIBRARIES:
            raise ValueError(f"{self.library!r} is no TensorRT")
        if not self.levels or set(self.profiles) != set(PROFILES):
            raise ValueError("it lacks levels or profiles")
        for name, profile in self.profiles.items():
            if not (_is_count(profile.tokens) and _is_count(profile.rows) and profile.rows <= profile.tokens):
                raise ValueError(f"the profile {name} has no sound sizes")
        if self.profiles["decode"] != Profile(1, 1):
            raise ValueError("the profile decode is of more than one token")
        if not _is_count(self.workspace):
            raise ValueError("its workspace is no number of bytes")
        for cache in self.caches:
            if cache.dtype not in ITEM_BYTES or not all(_is_count(extent) for extent in cache.shape):
                raise ValueError(f"the cache {str(cache.name)[:80]} has no sound type or shape")
        if len({cache.name for cache in self.caches}) != len(self.caches):
            raise ValueError("two caches have one name")
        for key in ("vocab_size", "max_context", "ops_per_token"):
            if not _is_count(self.facts[key]):
                raise ValueError(f"{key} is no positive number")

    def pieces(self, count: int, logits: str) -> list[tuple[str, int, int]]:
        """Cut a step of ``count`` tokens into (profile, tokens, rows of logits wanted).

        Each piece takes the smallest profile that holds what is left, else the largest. With ``logits`` "all" a piece
        has no more tokens than its profile has rows, since every row of logits costs a run of the whole model.
        """

        def most(name: str) -> int:
            return self.profiles[name].rows if logits == "all" else self.profiles[name].tokens

        by_size = sorted(PROFILES, key=most)
        pieces, left = [], count
        while left:
            name = next((name for name in by_size if most(name) >= left), by_size[-1])
            size = min(left, most(name))
            left -= size
            pieces.append((name, size, size if logits == "all" else int(logits == "last" and not left)))
        return pieces


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 50
