"""What an exporter is: it turns the model graph and its weights into the payload of one backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from arkinfer.targets import Target

if TYPE_CHECKING:
    from arkinfer.artifact import Artifact
    from arkinfer.artifact.journal import Journal
    from arkinfer.artifact.tensors import TensorSpec
    from arkinfer.backends.base import Executor
    from arkinfer.config import ModelConfig
    from arkinfer.graph import ModelGraph
    from arkinfer.reference import RowSource, WeightSource
    from arkinfer.structure import Structure

Progress = Callable[[str, int, int], None]  # stage, units done, units in all


@dataclass(frozen=True)
class BuildOptions:
    """The choices that an exporter compiles in."""

    kv: str  # "fp32", "fp16" or "int8"
    attention: str  # "auto", "dense" or "sparse": the default of the artifact
    context: int


@dataclass(frozen=True)
class StandIn:
    """What runs an artifact where its device is absent, and what its results are worth.

    ``evidence`` is "compiled" or "emulated", and how it was shown: "compiled, plan interpreted".
    """

    executor: Executor
    evidence: str


@dataclass(frozen=True)
class Payload:
    """What an exporter wrote: facts for the manifest, and digests of the weights before they were repacked.

    ``notes`` are sentences on what the payload cannot express, for people.
    """

    toolchain: Mapping[str, str]
    limits: Mapping[str, Any]
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()


class StoredMatrix(Protocol):
    """A matrix (N, K) in its storage format; ``group`` as in arkinfer.ops.linear."""

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> str: ...

    @property
    def group(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def wide(self) -> bool:
        """Whether it is kept as it is, in float32."""
        ...


class Outline(Protocol):
    """What `arkinfer plan` asks of a backend: answers from shapes alone, without a compiler or torch."""

    def reasons(
        self, config: ModelConfig, weights: Iterable[StoredMatrix], target: Target, options: BuildOptions
    ) -> list[str]:
        """Return why the kernels cannot run a model; empty if they can."""
        ...

    def parameters(self, weight: StoredMatrix, dtype: str, zeros: bool, gated: bool) -> Mapping[str, TensorSpec]:
        """Return the tensors that hold one matrix."""
        ...

    def caches(self, config: ModelConfig, kv: str, capacity: int) -> Mapping[str, int]:
        """Return the bytes of the state tensors of all layers by name, for ``capacity`` tokens, a multiple of 64."""
        ...

    def workspace(self, structure: Structure, context: int) -> int:
        """Return the bytes that a step needs beside weights and caches, in an artifact for ``context`` tokens."""
        ...

    def native(self, operators: Mapping[str, int]) -> dict[str, int]:
        """Return those of ``operators`` that have a kernel of their own."""
        ...


class Exporter(Protocol):
    """Host side of a backend.

    ``precision`` is that of values between operators, "float" (float32) or "fp16": verification judges by its gate.
    """

    precision: str

    def prepare(self, target: Target) -> None:
        """Start what takes long to start; ``close`` ends it."""
        ...

    def close(self) -> None:
        """Release what ``prepare`` started. Closing twice is harmless."""
        ...

    def support(self, model: ModelGraph, target: Target, options: BuildOptions) -> list[str]:
        """Return why the target cannot run the graph, one reason per operator; empty if it can."""
        ...

    def export(
        self,
        model: ModelGraph,
        weights: RowSource,
        target: Target,
        options: BuildOptions,
        path: Callable[[str], Path],
        progress: Progress,
        journal: Journal | None = None,
    ) -> Payload:
        """Write the payload's files to ``path(name)`` and return its facts.

        ``journal`` is of the weight file: what it says is finished is kept, and the rest is noted in it.
        """
        ...

    def weights(
        self, model: ModelGraph, file: Callable[[str], Path], origins: Mapping[str, str] | None = None
    ) -> WeightSource:
        """Return the weights of an exported payload in canonical form, for the torch reference.

        With ``origins`` of its Payload, each is compared with what it was before it was repacked.
        """
        ...

    def stand_in(self, artifact: Artifact) -> StandIn | None:
        """Return what runs ``artifact`` where its device is absent, or None where nothing ever does.

        Raises UnsupportedError where only something to be installed is missing, and says what.
        """
        ...
