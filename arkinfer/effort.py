"""What a build takes on the host: time, memory and disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arkinfer import exporters
from arkinfer.checkpoint import Checkpoint
from arkinfer.config import ModelConfig
from arkinfer.estimate import Rates, Work
from arkinfer.recipe import Storage
from arkinfer.structure import Matrix
from arkinfer.targets import Target, probe

# Rough: weights that one core reads, packs and repacks in a second, half of what it packs from memory (a Xeon with
# AVX-512: 330e6 ternary, 49e6 int4 with its search); tests/benchmarks/large_build.py times whole builds.
PACKED: Mapping[str, float] = {"dense": 150e6, "int8": 150e6, "int4": 30e6, "int2": 150e6, "ternary": 150e6}
ENGINE_GROWTH = 1.6  # bytes of an engine for each of the weights: 1.58 with fp16, 0.9 with int4
ENGINE_MEMORY = 7  # bytes that TensorRT for RTX takes for each of the weights: 5.7 GB for 0.87 GB in fp16
DISK = 300e6  # bytes read in a second from a disk that holds the checkpoint cold
START_SECONDS = 6.0  # loading torch and capturing the graph
COMPILE_SECONDS = 10.0  # of one core, for each level of a target whose code is not kept from a build before
TOKENS = 8192  # of P-GPTQ's calibration texts, at most
WINDOW = 512  # tokens of one calibration window, at most
BATCH = 4  # windows whose inputs are held at once
ROUNDING_SHARE = (
    0.5  # of the float32 peak that P-GPTQ reaches; one layer of the 8B shape: 20e12 operations in 169 s of CPU
)
VERIFIED_TOKENS = 2048  # that the fast suite compares
REFERENCE_SHARE = 0.25  # of the float32 peak that the torch reference reaches
# The 8B shape took 0.6 GB in this process and 0.6 GB in the compilers: tests/benchmarks/results/2026-11-24-8b.json.
BASE_BYTES = 1_200_000_000
PAYLOAD_BYTES = 4_000_000  # compiled code and tables, beside the weights


@dataclass(frozen=True)
class Effort:
    """Seconds by stage, host memory in bytes, bytes that the artifact needs on disk."""

    read_seconds: float
    round_seconds: float  # by P-GPTQ
    pack_seconds: float
    compile_seconds: float
    verify_seconds: float
    host_bytes: int
    disk_bytes: int

    @property
    def total_seconds(self) -> float:
        packing = max(self.pack_seconds, self.compile_seconds)
        return START_SECONDS + self.read_seconds + self.round_seconds + packing + self.verify_seconds


def effort(
    checkpoint: Checkpoint,
    stored: Mapping[Matrix, Storage],
    weight_bytes: int,
    work: Work,
    target: Target,
    rates: Rates,
    method: str,
) -> Effort:
    """Return what building on this machine will take; compiling overlaps packing, both use every core."""
    config, pgptq = checkpoint.config, method == "pgptq"
    cores = probe.cores()
    layouts = checkpoint.layouts()
    packing = 0.0
    largest = 0
    for matrix, how in stored.items():
        elements = matrix.shape[0] * matrix.shape[1]
        kept = all(layouts[source].format == how.format for source in matrix.sources)
        packing += elements / PACKED["dense" if kept else how.format]
        largest = max(largest, elements)
    levels = len(target.arch) if target.backend in exporters.EXPORTERS else 0
    reference = 0.0
    if rates.float32:
        reference = VERIFIED_TOKENS * (work.linear_ops + work.head_ops) / (rates.float32 * REFERENCE_SHARE)
    read = sum(weight.nbytes for weight in checkpoint.weights.values())
    rounding = rounding_ops(config, TOKENS) / (rates.float32 * ROUNDING_SHARE) if pgptq and rates.float32 else 0.0
    engine = weight_bytes if exporters.builds_engine(target) else 0  # bytes that go into one
    return Effort(
        read_seconds=read / DISK,
        round_seconds=rounding,
        pack_seconds=packing / cores,
        compile_seconds=levels * COMPILE_SECONDS / min(cores, max(levels, 1)),
        verify_seconds=reference,
        # Verification holds one weight at a time.
        host_bytes=BASE_BYTES
        + max(largest, rounding_memory(config, TOKENS, WINDOW) if pgptq else 0, ENGINE_MEMORY * engine),
        # What P-GPTQ rounds lies beside the artifact until it is sealed.
        disk_bytes=(2 if pgptq else 1) * weight_bytes + int(ENGINE_GROWTH * engine) + PAYLOAD_BYTES,
    )


def rounding_memory(config: ModelConfig, tokens: int, window: int) -> int:
    """Return the bytes that P-GPTQ needs: two matrices of the widest input's square, one layer, the activations."""
    attention = config.heads * config.head_dim
    widest = max(config.hidden_size, config.intermediate_size, attention)
    layer = config.hidden_size * (2 * attention + 2 * config.kv_heads * config.head_dim + 3 * config.intermediate_size)
    batch = min(tokens, BATCH * window)
    return 4 * (2 * widest * widest + 2 * layer + 2 * tokens * config.hidden_size + 6 * batch * widest)


def rounding_ops(config: ModelConfig, tokens: int) -> float:
    """Return the operations of P-GPTQ: Hessians, their factors, error feedback, the layers themselves."""
    attention = config.heads * config.head_dim
    inputs = {  # of each distinct Hessian: its width, the rows of the matrices that read it
        "qkv": (config.hidden_size, attention + 2 * config.kv_heads * config.head_dim),
        "o": (attention, config.hidden_size),
        "gate_up": (config.hidden_size, 2 * config.intermediate_size),
        "down": (config.intermediate_size, config.hidden_size),
    }
    layer = 0.0
    for width, rows in inputs.values():
        layer += 2.0 * tokens * width**2 + 2.0 * width**3 + rows * width**2 + 2.0 * tokens * rows * width
    return config.layers * layer
