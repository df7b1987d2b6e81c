"""Read a Hugging Face config.json into one normalised, checked description of the model."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arkinfer.errors import UnsupportedError, UserError

FAMILIES: Mapping[str, str] = {
    "MiniCPMForCausalLM": "minicpm",
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
DTYPES = ("float32", "float16", "bfloat16")

# Far beyond any released model: a larger number is a damaged file, and is refused before anything is allocated.
_LIMITS = {"hidden_size": 1 << 17, "layers": 1 << 12, "vocab_size": 1 << 24, "intermediate_size": 1 << 20}
_MAX_CONTEXT = 1 << 27


def _refuse(message: str, hint: str = "", **facts: object) -> UserError:
    return UserError(
        message,
        facts=facts,
        hint=hint or "compare the file with the one that the model's author published",
        code="ARK-E130",
    )


class _Fields:
    """Typed access to a JSON object; every value that has the wrong type or sign is a UserError naming the field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise _refuse(f"{self.where} has no `{name}`")
            return default
        whole = isinstance(value, float) and value.is_integer()
        if isinstance(value, bool) or not (isinstance(value, int) or whole):
            raise _refuse(f"{self.where}: `{name}` is not an integer", value=repr(value))
        if value < minimum:
            raise _refuse(f"{self.where}: `{name}` is below {minimum}", value=value)
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise _refuse(f"{self.where} has no `{name}`")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise _refuse(f"{self.where}: `{name}` is not a positive finite number", value=repr(value))
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _refuse(f"{self.where}: `{name}` is neither true nor false", value=repr(value))
        return value

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != length:
            size = len(value) if isinstance(value, list) else repr(value)
            raise _refuse(f"{self.where}: `{name}` must list {length} numbers, one per rotated pair", found=size)
        return tuple(_Fields({name: item}, self.where).number(name) for item in value)

    def table(self, name: str) -> Mapping[str, Any] | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise _refuse(f"{self.where}: `{name}` is not an object", value=repr(value)[:80])
        return value


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: which frequencies, and by how much cos and sin are scaled."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def inverse_frequencies(self, head_dim: int, context: int) -> NDArray[np.float32]:
        """Return radians per position (head_dim / 2,), every extension already applied.

        ``context`` is the context limit of the artifact: longrope takes its long list iff that exceeds the original one
        (MiniCPM4 report; transformers' modeling_rope_utils for the other kinds, in whose float32 this computes too).
        """
        pairs = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        wavelengths = np.power(np.float32(self.theta), pairs, dtype=np.float32)  # (head_dim / 2,) positions per radian
        if self.kind == "longrope":
            factors = self.long_factor if context > self.original_context else self.short_factor
            stretched: NDArray[np.float32] = np.reciprocal(np.asarray(factors, dtype=np.float32) * wavelengths)
            return stretched
        inverse: NDArray[np.float32] = np.reciprocal(wavelengths)
        if self.kind == "linear":
            return inverse / np.float32(self.factor)
        if self.kind == "llama3":
            return self._llama3(inverse)
        if self.kind == "yarn":
            return self._yarn(inverse, head_dim)
        return inverse

    def _llama3(self, inverse: NDArray[np.float32]) -> NDArray[np.float32]:
        wavelength = 2 * math.pi / inverse.astype(np.float64)
        ratio = self.original_context / wavelength
        blend = np.clip((ratio - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        scaled: NDArray[np.float32] = ((1 - blend) * inverse / self.factor + blend * inverse).astype(np.float32)
        return scaled

    def _yarn(self, inverse: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
        def pair(rotations: float) -> float:
            return head_dim * math.log(self.original_context / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        scaled: NDArray[np.float32] = (inverse / self.factor * ramp + inverse * (1 - ramp)).astype(np.float32)
        return scaled

    def magnitude(self, context: int) -> float:
        """Return the number that cos and sin are multiplied by; no known kind lets it depend on ``context``."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind != "yarn" or self.factor <= 1:
            return 1.0

        def scale(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


@dataclass(frozen=True)
class SparseConfig:
    """InfLLM-v2 block selection (arXiv 2509.24663); sizes in tokens, ``init_blocks`` and ``topk`` in blocks.

    ``local_rule`` "inclusive" forces blocks q_blk - local <= b <= q_blk as MiniCPM4.1's code does, "exclusive" one
    fewer.
    ``lse`` "coarse" normalises scores by the keys pooled over four times the span, "exact" by the fine keys themselves.
    ``dense_len`` -1 makes every row sparse.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    init_blocks: int = 1
    window_size: int = 2048
    topk: int = 64
    use_nope: bool = False
    dense_len: int = 8192
    local_rule: str = "inclusive"
    lse: str = "coarse"

    def __post_init__(self) -> None:
        source = _Fields(vars(self), "sparse_config")
        for name in ("kernel_size", "kernel_stride", "block_size", "topk"):
            source.integer(name)
        for name in ("init_blocks", "window_size"):
            source.integer(name, minimum=0)
        source.integer("dense_len", minimum=-1)
        for large, small in (
            ("kernel_size", "kernel_stride"),
            ("block_size", "kernel_stride"),
            ("window_size", "block_size"),
        ):
            if getattr(self, large) % getattr(self, small):
                raise _refuse(
                    f"sparse_config: `{large}` is not a multiple of `{small}`",
                    **{large: getattr(self, large), small: getattr(self, small)},
                )
        for name, known in (("local_rule", ("inclusive", "exclusive")), ("lse", ("coarse", "exact"))):
            if getattr(self, name) not in known:
                raise _refuse(
                    f"sparse_config: unknown `{name}` {getattr(self, name)!r}", hint="known: " + ", ".join(known)
                )

    @property
    def local_blocks(self) -> int:
        return self.window_size // self.block_size

    @property
    def budget(self) -> int:
        """Blocks that one row attends to, forced ones included."""
        return self.topk + self.local_blocks

    @property
    def coarse_size(self) -> int:
        return 4 * self.kernel_size

    @property
    def coarse_stride(self) -> int:
        return 4 * self.kernel_stride


@dataclass(frozen=True)
class ModelConfig:
    """What a model computes, in the same words for every family; ``notes`` are warnings for the user."""

    family: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    max_context: int
    tie_embeddings: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    sparse: SparseConfig | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    dtype: str = "bfloat16"
    notes: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read the object in config.json, in the spelling of any transformers version.

        Raises UnsupportedError for an architecture or feature that arkinfer does not have and UserError for missing,
        contradictory or absurd values.
        """
        return _read(values)


def _family(values: Mapping[str, Any]) -> str:
    names = values.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _refuse("config.json: `architectures` is not a list of names", value=repr(names)[:80])
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    kind = values.get("model_type")
    if not names and kind in FAMILIES.values():
        return str(kind)
    asked = names[0] if names else str(kind)
    raise UnsupportedError(
        f"no model family for architecture {asked!r}",
        facts={"known": ", ".join(FAMILIES)},
        hint="arkinfer does not compile it; ARCHITECTURE.md tells how to add a model family",
        code="ARK-E310",
    )


def _scales(source: _Fields, hidden: int, layers: int, notes: list[str]) -> tuple[float, float, float]:
    """Return MiniCPM's muP multipliers (embedding, residual, logits).

    Readers disagree about absent fields: OpenBMB's own code takes 1 for all three, transformers' class 12, 1.4 and 256.
    The values of every released model (the second set) are taken, and said so.
    """

    def taken(name: str, default: float) -> float:
        if not source.has(name):
            notes.append(
                f"{name} absent: took {default:g}, as every released MiniCPM has (OpenBMB's own code would take 1)"
            )
        return source.number(name, default)

    embedding, depth, base = taken("scale_emb", 12), taken("scale_depth", 1.4), taken("dim_model_base", 256)
    return embedding, depth / math.sqrt(layers), base / hidden


def _rope(source: _Fields, head_dim: int, max_context: int, notes: list[str]) -> RopeConfig:
    table: Mapping[str, Any] = source.table("rope_parameters") or source.table("rope_scaling") or {}
    theta = source.number("rope_theta", 10000.0)
    rope = _Fields(table, "rope_parameters" if source.has("rope_parameters") else "rope_scaling")
    theta = rope.number("rope_theta", theta)
    if theta <= 1:
        raise _refuse("rope_theta must exceed 1", rope_theta=theta)
    kind = table.get("rope_type", table.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # the name that the first Phi-3 files used
    if kind not in ROPE_KINDS:
        raise UnsupportedError(
            f"rope kind {kind!r} is not supported", facts={"known": ", ".join(ROPE_KINDS)}, code="ARK-E311"
        )
    if rope.number("partial_rotary_factor", source.number("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedError("partial rotary embedding is not supported", code="ARK-E311")
    if kind == "default":
        return RopeConfig(theta=theta)
    top = source.integer("original_max_position_embeddings", max_context)
    original = rope.integer("original_max_position_embeddings", top)
    attention = rope.number("attention_factor") if rope.has("attention_factor") else None
    if kind == "longrope":
        by_context = _longrope_magnitude(max_context / original, original)
        by_factor = _longrope_magnitude(rope.number("factor"), original) if rope.has("factor") else by_context
        if attention is None and not math.isclose(by_factor, by_context):
            notes.append(
                f"rope factor {rope.number('factor'):g} and max_position_embeddings / original"
                f" {max_context / original:g}"
                " differ: cos and sin are scaled by the factor, as transformers does"
            )
        return RopeConfig(
            kind, theta, original_context=original, attention_factor=by_factor if attention is None else attention,
            short_factor=rope.numbers("short_factor", head_dim // 2),
            long_factor=rope.numbers("long_factor", head_dim // 2),
        )  # fmt: skip
    factor = rope.number("factor")
    if factor < 1:
        raise _refuse("rope factor is below 1", factor=factor)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise _refuse("rope high_freq_factor must exceed low_freq_factor", low=low, high=high)
        return RopeConfig(kind, theta, factor, low, high, original)
    if kind == "yarn":
        return RopeConfig(
            kind, theta, factor, original_context=original, attention_factor=attention,
            beta_fast=rope.number("beta_fast", 32.0), beta_slow=rope.number("beta_slow", 1.0),
            mscale=rope.number("mscale") if rope.has("mscale") else None,
            mscale_all_dim=rope.number("mscale_all_dim") if rope.has("mscale_all_dim") else None,
            truncate=rope.flag("truncate", True),
        )  # fmt: skip
    return RopeConfig(kind, theta, factor)


def _longrope_magnitude(factor: float, original: int) -> float:
    return 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _sparse(source: _Fields, notes: list[str]) -> SparseConfig | None:
    table = source.table("sparse_config")
    if table is None:
        return None
    known = {item.name for item in fields(SparseConfig)}
    unknown = sorted(set(table) - known)
    if unknown:
        notes.append("sparse_config fields without a meaning here: " + ", ".join(unknown))
    values = _Fields(table, "sparse_config")
    kept: dict[str, Any] = {name: table[name] for name in known & set(table) if table[name] is not None}
    if "use_nope" in kept:
        kept["use_nope"] = values.flag("use_nope", False)
    return SparseConfig(**kept)


def _token_ids(values: Mapping[str, Any], name: str, vocabulary: int) -> tuple[int, ...]:
    value = values.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise _refuse(f"config.json: `{name}` is not a token id", value=repr(value)[:80])
    # Several published files carry -1 for "none", and ids beyond the vocabulary can never be generated.
    return tuple(item for item in ids if 0 <= item < vocabulary)


def _read(values: Mapping[str, Any]) -> ModelConfig:
    family = _family(values)
    source = _Fields(values, "config.json")
    notes: list[str] = []
    hidden = source.integer("hidden_size")
    layers = source.integer("num_hidden_layers")
    heads = source.integer("num_attention_heads")
    kv_heads = source.integer("num_key_value_heads", heads)
    intermediate = source.integer("intermediate_size")
    vocabulary = source.integer("vocab_size")
    max_context = source.integer("max_position_embeddings")
    for name, value in {
        "hidden_size": hidden,
        "layers": layers,
        "vocab_size": vocabulary,
        "intermediate_size": intermediate,
    }.items():
        if value > _LIMITS[name]:
            raise _refuse(f"config.json: {name} {value} is beyond every known model", limit=_LIMITS[name])
    if max_context > _MAX_CONTEXT:
        raise _refuse("config.json: `max_position_embeddings` is beyond every known model", value=max_context)
    if heads % kv_heads:
        raise _refuse("num_attention_heads is not a multiple of num_key_value_heads", heads=heads, kv_heads=kv_heads)
    if not source.has("head_dim") and hidden % heads:
        raise _refuse(
            "hidden_size is not a multiple of num_attention_heads, and head_dim is absent", hidden=hidden, heads=heads
        )
    head_dim = source.integer("head_dim", 128 if family == "qwen3" else hidden // heads)
    if head_dim % 2 or head_dim > 1024 or heads > 1024:
        raise _refuse("head_dim must be even, head_dim and heads at most 1024", head_dim=head_dim, heads=heads)
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"activation {activation!r} is not supported", facts={"known": "silu"}, code="ARK-E311")
    if source.flag("use_sliding_window", False):
        raise UnsupportedError("sliding-window attention is not supported", code="ARK-E311")
    scales = _scales(source, hidden, layers, notes) if family == "minicpm" else (1.0, 1.0, 1.0)
    if family == "minicpm" and not source.has("tie_word_embeddings"):
        notes.append("tie_word_embeddings absent: took true, the default of MiniCPM's own code")
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        raise _refuse(f"config.json: dtype {dtype!r} is unknown", hint="known: " + ", ".join(DTYPES))
    bos, pad = _token_ids(values, "bos_token_id", vocabulary), _token_ids(values, "pad_token_id", vocabulary)
    rope = _rope(source, head_dim, max_context, notes)  # before the constructor: it appends to notes
    sparse = _sparse(source, notes)
    return ModelConfig(
        family=family, hidden_size=hidden, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        intermediate_size=intermediate, vocab_size=vocabulary, norm_eps=source.number("rms_norm_eps", 1e-6),
        max_context=max_context, tie_embeddings=source.flag("tie_word_embeddings", family == "minicpm"),
        embedding_scale=scales[0], residual_scale=scales[1], logit_scale=scales[2], qk_norm=family == "qwen3",
        attention_bias=source.flag("attention_bias", False), mlp_bias=source.flag("mlp_bias", False),
        rope=rope, sparse=sparse,
        bos_id=bos[0] if bos else None, eos_ids=_token_ids(values, "eos_token_id", vocabulary),
        pad_id=pad[0] if pad else None, dtype=dtype, notes=tuple(notes),
    )  # fmt: skip
