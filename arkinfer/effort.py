"""What a build takes on the host: time, memory and disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from arkinfer import exporters
from arkinfer.checkpoint import Checkpoint
from arkinfer.estimate import Rates, Work
from arkinfer.recipe import Storage
from arkinfer.structure import Matrix
from arkinfer.targets import Target, probe

# Rough: weights that one core reads, packs and repacks in a second, half of what it packs from memory (a Xeon with
# AVX-512: 330e6 ternary, 49e6 int4 with its search); tests/benchmarks/large_build.py times whole builds.
PACKED: Mapping[str, float] = {"dense": 150e6, "int8": 150e6, "int4": 30e6, "int2": 150e6, "ternary": 150e6}
DISK = 300e6  # bytes read in a second from a disk that holds the checkpoint cold
START_SECONDS = 6.0  # loading torch and capturing the graph
COMPILE_SECONDS = 10.0  # of one core, for each level of a target whose code is not kept from a build before
VERIFIED_TOKENS = 2048  # that the fast suite compares
REFERENCE_SHARE = 0.25  # of the float32 peak that the torch reference reaches
# The 8B shape took 0.6 GB in this process and 0.6 GB in the compilers: tests/benchmarks/results/2026-11-24-8b.json.
BASE_BYTES = 1_200_000_000
PAYLOAD_BYTES = 4_000_000  # compiled code and tables, beside the weights


@dataclass(frozen=True)
class Effort:
    """Seconds by stage, host memory in bytes, bytes that the artifact needs on disk."""

    read_seconds: float
    pack_seconds: float
    compile_seconds: float
    verify_seconds: float
    host_bytes: int
    disk_bytes: int

    @property
    def total_seconds(self) -> float:
        return START_SECONDS + self.read_seconds + max(self.pack_seconds, self.compile_seconds) + self.verify_seconds


def effort(
    checkpoint: Checkpoint,
    stored: Mapping[Matrix, Storage],
    weight_bytes: int,
    work: Work,
    target: Target,
    rates: Rates,
) -> Effort:
    """Return what building on this machine will take; compiling overlaps packing, both use every core."""
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
    return Effort(
        read_seconds=read / DISK,
        pack_seconds=packing / cores,
        compile_seconds=levels * COMPILE_SECONDS / min(cores, max(levels, 1)),
        verify_seconds=reference,
        host_bytes=BASE_BYTES + largest,  # verification holds one weight at a time
        disk_bytes=weight_bytes + PAYLOAD_BYTES,
    )
