"""The exporter of the cuda backend: a plan of launches, kernels compiled ahead of time, weights as these read them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from arkinfer.artifact import Artifact
from arkinfer.artifact.journal import Journal
from arkinfer.artifact.plan import Image, Plan
from arkinfer.errors import UnsupportedError
from arkinfer.exporters import cuda_outline, cuda_weights, outline
from arkinfer.exporters.base import BuildOptions, Payload, Progress, StandIn
from arkinfer.exporters.cuda_lowering import Lowering
from arkinfer.exporters.kernels import triton as kernels
from arkinfer.exporters.kernels.triton.cubin import Cubin, Job, compile_all
from arkinfer.exporters.kernels.triton.kernel import SHARED_LIMIT
from arkinfer.graph import ModelGraph
from arkinfer.passes import formats
from arkinfer.reference import RowSource, WeightSource
from arkinfer.targets import Target

WEIGHTS = "weights-cuda.safetensors"
TOOLS = ("triton",)


class CudaExporter:
    """Lowers to a plan of Triton kernels; cubins for every architecture of the target, one weight file for all."""

    precision = "fp16"

    def prepare(self, target: Target) -> None:
        """Nothing takes long to start."""

    def close(self) -> None:
        """Nothing was started."""

    def support(self, model: ModelGraph, target: Target, options: BuildOptions) -> list[str]:
        """Return why the CUDA kernels cannot run ``model``; empty if they can."""
        return _refusals(model, target, options)

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
        """Compile the kernels in a process of its own while this one packs the weights."""
        if absent := [tool for tool in TOOLS if importlib.util.find_spec(tool) is None]:
            raise UnsupportedError(
                f"building for the target {target.name} needs {', '.join(absent)}",
                hint="pip install 'arkinfer[build,cuda-build]'",
                code="ARK-E312",
            )
        plan, stored = planned(model, options, target.arch)
        jobs = [Job(kernel.name, kernel.options, level) for kernel in plan.kernels for level in plan.levels]
        with ThreadPoolExecutor(1) as waiting:
            compiling = waiting.submit(compile_all, jobs)
            origins = cuda_weights.write(plan, stored, weights, path(WEIGHTS), journal, progress)
            progress("compile", 0, len(jobs))
            cubins = compiling.result()
            progress("compile", len(jobs), len(jobs))
        _check_shared(jobs, cubins)
        plan = with_images(plan, jobs, cubins, path)
        path("payload/plan.json").write_text(plan.to_json(), encoding="utf-8")
        path("payload/plan.txt").write_text(plan.dump(), encoding="utf-8")
        limits = {"max_context": options.context, **_memory(plan)}
        toolchain = {tool: metadata.version(tool) for tool in TOOLS}
        return Payload({**toolchain, "torch": torch.__version__.split("+")[0]}, limits, origins)

    def weights(
        self, model: ModelGraph, file: Callable[[str], Path], origins: Mapping[str, str] | None = None
    ) -> WeightSource:
        """Return the weights of an artifact in canonical form, unpacked from the kernels' layout."""
        return cuda_weights.ArtifactWeights(model, file(WEIGHTS), origins)

    def stand_in(self, artifact: Artifact) -> StandIn:
        """Return what runs the plan of ``artifact`` on the CPU."""
        from arkinfer.interpreter import PlanInterpreter

        return StandIn(PlanInterpreter(artifact), "compiled, plan interpreted")


def _key(job: Job) -> tuple[str, str, str]:
    return job.name, json.dumps(job.options, sort_keys=True), job.arch


def _check_shared(jobs: Sequence[Job], cubins: Sequence[Cubin]) -> None:
    """Raise UnsupportedError for a kernel whose block asks for more shared memory than an architecture has."""
    for job, cubin in zip(jobs, cubins, strict=True):
        if cubin.shared > SHARED_LIMIT[job.arch]:
            raise UnsupportedError(
                "a kernel needs more shared memory than the GPU has for a block",
                facts={
                    "kernel": job.name,
                    "level": job.arch,
                    "needed": f"{cubin.shared:,} bytes",
                    "limit": f"{SHARED_LIMIT[job.arch]:,} bytes",
                },
                hint="report this with the model's config.json",
                code="ARK-E323",
            )


def planned(
    model: ModelGraph, options: BuildOptions, levels: tuple[str, ...]
) -> tuple[Plan, Mapping[str, cuda_weights.Stored]]:
    """Return the plan of ``model``, its kernels not compiled yet, and what each of its parameters is made of."""
    lowering = Lowering(model, options, levels)
    plan = lowering.run(_facts(model, options))
    return replace(plan, facts={**plan.facts, **_traffic(model, plan, options)}), lowering.stored


def with_images(plan: Plan, jobs: Sequence[Job], cubins: Sequence[Cubin], path: Callable[[str], Path]) -> Plan:
    """Write every cubin and its PTX into the artifact, and name them in the kernel table.

    Kernels that differ in what a launch passes by value alone share their files.
    """
    found = dict(zip(map(_key, jobs), cubins, strict=True))
    table = []
    stems: dict[tuple[str, str, str], str] = {}
    for index, kernel in enumerate(plan.kernels):
        description = kernels.kernel(kernel.name)
        images = {}
        for level in plan.levels:
            cubin = found[_key(Job(kernel.name, kernel.options, level))]
            same = (level, kernel.name, cubin.digest)
            if same not in stems:
                stems[same] = f"payload/{level}/{index:03}-{kernel.name}"
                path(f"{stems[same]}.cubin").write_bytes(cubin.code)
                path(f"{stems[same]}.ptx").write_text(cubin.ptx, encoding="utf-8")
            stem = stems[same]
            grid = description.variant(description.parse(kernel.options), level).grid
            names = (f"{stem}.cubin", f"{stem}.ptx")
            images[level] = Image(*names, cubin.entry, grid, cubin.num_warps, cubin.shared)
        table.append(replace(kernel, images=images))
    return replace(plan, kernels=tuple(table))


def _refusals(model: ModelGraph, target: Target, options: BuildOptions) -> list[str]:
    weights = [model.weight_of(node) for node in formats.linears(model)]
    return cuda_outline.reasons(model.config, weights, target, options)


def _facts(model: ModelGraph, options: BuildOptions) -> dict[str, Any]:
    """Return what executors need to know of the model."""
    config = model.config
    frequencies = next(iter(model.constants.values())).float().tolist()
    return {
        "vocab_size": config.vocab_size,
        "max_context": options.context,
        "weights": WEIGHTS,
        "rope": {
            "inverse_frequencies": [value.hex() for value in frequencies],
            "magnitude": float(config.rope.magnitude(config.max_context)).hex(),
        },
        "sparse": outline.gear(cuda_outline.selects(config)),
    }


def _traffic(model: ModelGraph, plan: Plan, options: BuildOptions) -> dict[str, Any]:
    """Return the bytes that a decoded token reads and the operations that a prompt token takes."""
    table = {buffer.name: buffer for buffer in plan.of_kind("parameter")}
    read = {
        pointer.buffer
        for launch in plan.schedules["decode"].launches
        if plan.kernels[launch.kernel].name.startswith("linear")
        for pointer in launch.pointers
    }
    weights = sum(table[name].nbytes({}) for name in read & set(table))
    matrices = [model.weight_of(node) for node in formats.linears(model)]
    return {
        "bytes": outline.traffic(model.config, options.kv, weights),
        "ops_per_token": sum(2 * weight.shape[0] * weight.shape[1] for weight in matrices),
    }


def _memory(plan: Plan) -> dict[str, int]:
    """Return the bytes of device memory that the artifact takes, by what for."""

    def total(*kinds: str) -> int:
        return sum(buffer.nbytes({"c": plan.capacity}) for kind in kinds for buffer in plan.of_kind(kind))

    return {
        "weights_bytes": total("parameter"),
        "cache_bytes": total("cache"),
        "workspace_bytes": plan.arena + total("control", "input", "output"),
    }
