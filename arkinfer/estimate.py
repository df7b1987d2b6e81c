"""How fast a model will run, and what its build will take: arithmetic on rates, with the factors named.

The factors were measured with tests/benchmarks/plan_against_bench.py, whose records say on what; they are shares of
what the machine itself reaches, so that they carry over to others better than times would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from arkinfer.config import ModelConfig

# Operations of int8 products for each of float32 multiply-adds that a level's instructions do in the same time.
INT8_PER_FLOAT32: Mapping[str, float] = {
    "x86-64-v4-vnni": 4.0,
    "x86-64-v3": 4 / 3,
    "aarch64-i8mm": 8.0,
    "aarch64-dotprod": 4.0,
}


@dataclass(frozen=True)
class Factors:
    """What of the rates is reached, and what each step costs whatever the model's size is."""

    weight_share: float = 0.83  # of the read bandwidth, while weights stream
    cache_share: float = 0.56  # of the read bandwidth, while attention reads the caches
    product_share: float = 0.58  # of the arithmetic peak, in the products of prompts
    attention_share: float = 0.57  # of the float32 peak, in the attention of prompts
    value_ops: float = 360.0  # float operations of norms, rounding and gates for each hidden value of a layer
    gemm_share: float = 0.96  # of the float32 peak, in numpy's product of small matrices
    step_seconds: float = 40e-6  # each step: call, rotation, logits
    layer_seconds: float = 10e-6  # each layer of a step: some eight kernels that wait for their slowest thread

    source: str = "measured on CPUs"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Of GPUs nothing is measured yet (tests/gpu/README.md): these are the goals for weights, and guesses.
_GPU = Factors(
    weight_share=0.8,
    cache_share=0.7,
    product_share=0.5,
    attention_share=0.4,
    value_ops=0.0,  # these kernels wait for memory: layer_seconds
    gemm_share=1.0,
    step_seconds=30e-6,
    layer_seconds=20e-6,
    source="guessed: no GPU has run it",
)
_SOURCES = {
    "tensorrt": "guessed from another backend's, measured on CPUs: no GPU has run it",
    "onnxruntime": "guessed from another backend's, measured on CPUs",
    "mlc": "guessed from another backend's, measured on CPUs",
}


def factors(backend: str) -> Factors:
    """Return the factors of a backend."""
    if backend == "cuda":
        return _GPU
    return Factors(source=_SOURCES[backend]) if backend in _SOURCES else Factors()


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second: bytes read, int8, float32 and float16 operations; None where unknown.

    ``float16`` is that of GPUs' matrix units, which take over all products of floats where there are any.
    """

    bandwidth: float | None
    int8: float | None
    float32: float | None
    source: str  # where they are from
    float16: float | None = None

    @property
    def floats(self) -> float | None:
        """Operations of products of floats."""
        return self.float16 or self.float32

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """What a token costs.

    ``linear_ops`` are those of all layers, ``head_ops`` those of the output head, which a prompt needs once.
    ``whole``: products are of int8.
    """

    linear_ops: int
    head_ops: int
    whole: bool


def decode(work: Work, weights: int, caches: int, config: ModelConfig, rates: Rates, factors: Factors) -> float | None:
    """Return tokens/s where a token reads ``weights`` and ``caches`` bytes; None without a bandwidth."""
    if rates.bandwidth is None:
        return None
    seconds = weights / (rates.bandwidth * factors.weight_share) + caches / (rates.bandwidth * factors.cache_share)
    peak = rates.int8 if work.whole else rates.floats
    if peak:  # few machines compute slower than they read
        seconds = max(seconds, (work.linear_ops + work.head_ops) / (peak * factors.product_share))
    return 1 / (seconds + factors.step_seconds + config.layers * factors.layer_seconds)


def attention_ops(config: ModelConfig, keys: float, compressed: float) -> float:
    """Return the float operations of one token's attention over ``keys`` keys, chosen by ``compressed`` others."""
    width = config.layers * config.heads * config.head_dim
    return width * (4 * keys + 2 * compressed)


def prefill(
    work: Work, tokens: int, attention: float, config: ModelConfig, rates: Rates, factors: Factors
) -> float | None:
    """Return tokens/s of a prompt of ``tokens``, whose attention takes ``attention`` operations a token."""
    peak = rates.int8 if work.whole else rates.floats
    if not peak or not rates.floats:
        return None
    seconds = tokens * work.linear_ops / (peak * factors.product_share)
    seconds += work.head_ops / (peak * factors.product_share)
    floats = attention + config.layers * config.hidden_size * factors.value_ops
    seconds += tokens * floats / (rates.floats * factors.attention_share)
    steps = -(-tokens // 512)
    return tokens / (seconds + steps * (factors.step_seconds + config.layers * factors.layer_seconds))
