"""The exporter of the tvm backend: kernels compiled for every level of the target, weights repacked once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from arkinfer.artifact import Artifact, tensors
from arkinfer.artifact.journal import Journal
from arkinfer.errors import UnsupportedError
from arkinfer.exporters import compiled, emulation, native, outline, platforms, refusals
from arkinfer.exporters import weights as weight_file
from arkinfer.exporters.base import BuildOptions, Payload, Progress, StandIn
from arkinfer.exporters.compiler import Compiler
from arkinfer.exporters.kernels.tir import peak
from arkinfer.exporters.kernels.tir.isa import ISAS
from arkinfer.exporters.lowering import Lowering
from arkinfer.exporters.program import Program
from arkinfer.graph import ModelGraph
from arkinfer.passes.formats import linears
from arkinfer.reference import RowSource, WeightSource
from arkinfer.targets import Target

WEIGHTS = "weights-cpu.safetensors"
PLAN_FORMAT = 1  # of payload/plan.json; the backend refuses any other
_PRODUCTS = ("linear_int8", "linear_float", "quantize", "take_columns")  # what reads the parameters of linears
TOOLS = ("apache-tvm", "apache-tvm-ffi", "ziglang")


class TvmExporter:
    """Lowers to TIR kernels; one shared library per instruction-set level, one weight file for all of them."""

    precision = "float"

    def __init__(self) -> None:
        self._compilers: dict[str, Compiler] = {}

    def prepare(self, target: Target) -> None:
        """Start one compiler per level: they load TVM while the graph is captured."""
        if not self._compilers and all(installed(tool) for tool in TOOLS):
            self._compilers = {isa: Compiler(isa, platforms.of(target)) for isa in target.arch if isa in ISAS}

    def close(self) -> None:
        """End compilers that nobody waits for."""
        for compiler in self._compilers.values():
            compiler.close()
        self._compilers = {}

    def support(self, model: ModelGraph, target: Target, options: BuildOptions) -> list[str]:
        """Return why the CPU kernels cannot run ``model``; empty if they can."""
        return refusals.reasons(model.config, target)

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
        """Compile in one process per level while this one packs the weights."""
        if absent := [tool for tool in TOOLS if not installed(tool)]:
            raise UnsupportedError(
                f"building for the target {target.name} needs {', '.join(absent)}",
                hint="pip install 'arkinfer[build]'",
                code="ARK-E312",
            )
        lowering = Lowering(model, options)
        program = lowering.run()
        toolchain = {tool: metadata.version(tool) for tool in TOOLS}
        text = program.to_json()
        platform, tools = platforms.of(target), json.dumps(toolchain, sort_keys=True)
        libraries = {isa: path(f"payload/{isa}{platform.suffix}") for isa in target.arch}
        keys = {isa: compiled.key(text, isa, platform, tools) for isa in target.arch}
        missing = [isa for isa in target.arch if not _fetch(keys[isa], libraries[isa])]
        try:
            self.prepare(target)
            for isa in missing:
                self._compilers[isa].start(text, libraries[isa])
            origins = weight_file.write(program, lowering.stored, weights, path(WEIGHTS), journal, progress)
            for done, isa in enumerate(missing):
                progress("compile", done, len(missing))
                self._compilers[isa].finish()
                _keep(keys[isa], libraries[isa])
            progress("compile", len(missing), len(missing))
        finally:
            self.close()
        path("payload/program.txt").write_text(program.dump(), encoding="utf-8")
        plan = _plan(model, program, target, options)
        path("payload/plan.json").write_text(json.dumps(plan, sort_keys=True, indent=1) + "\n", encoding="utf-8")
        names = {isa: _take_names(library) for isa, library in libraries.items()}
        if target.native:
            levels = {isa: (f"payload/{isa}{platform.suffix}", names[isa]) for isa in target.arch}
            native.export(program, plan, weight_file.specs(program), levels, platform, path)
        toolchain["torch"] = torch.__version__.split("+")[0]
        return Payload(toolchain, {"max_context": options.context}, origins)

    def weights(
        self, model: ModelGraph, file: Callable[[str], Path], origins: Mapping[str, str] | None = None
    ) -> WeightSource:
        """Return the weights of an artifact in canonical form, unpacked from the kernels' layout."""
        return weight_file.ArtifactWeights(model, tensors.load(file(WEIGHTS)), origins)

    def stand_in(self, artifact: Artifact) -> StandIn | None:
        """Return an emulator that runs ``artifact``, or None where its architecture is not emulated."""
        return emulation.stand_in(artifact)


def installed(tool: str) -> bool:
    """Tell whether the package ``tool`` is there."""
    try:
        metadata.version(tool)
    except metadata.PackageNotFoundError:
        return False
    return True


def _fetch(key: str, library: Path) -> bool:
    """Copy a compiled library and the names of its kernels from the cache; return whether both were there."""
    suffix = library.suffix
    return compiled.fetch(key, library, suffix) and compiled.fetch(
        f"{key}-names", library.with_suffix(".json"), ".json"
    )


def _keep(key: str, library: Path) -> None:
    compiled.keep(key, library, library.suffix)
    compiled.keep(f"{key}-names", library.with_suffix(".json"), ".json")


def _take_names(library: Path) -> native.Names:
    """Return the names of a library's kernels from the file beside it, which no artifact holds."""
    file = library.with_suffix(".json")
    names: native.Names = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return names


def _plan(model: ModelGraph, program: Program, target: Target, options: BuildOptions) -> dict[str, Any]:
    """Return what the backend needs to know that is not in the compiled code."""
    config, sparse = model.config, model.config.sparse
    sizes = {name: spec.nbytes for name, spec in weight_file.specs(program).items()}
    read = {name for call in program.calls if call.kernel in _PRODUCTS for name in call.inputs}
    matrices = [model.weight_of(node) for node in linears(model)]
    whole = any(call.kernel == "linear_int8" for call in program.calls)
    frequencies = next(iter(model.constants.values())).float().tolist()
    return {
        "format": PLAN_FORMAT,
        "isa": list(target.arch),
        "vocab_size": config.vocab_size,
        "max_context": options.context,
        "weights": WEIGHTS,
        "parameters": [value.name for value in program.parameters],
        "caches": [outline.cache(value, sparse) for value in program.caches],
        "taps": [public for public, _ in program.taps],
        "rope": {
            "inverse_frequencies": [value.hex() for value in frequencies],
            "magnitude": float(config.rope.magnitude(config.max_context)).hex(),
        },
        "sparse": outline.gear(sparse),
        "bytes": outline.traffic(config, options.kv, sum(size for name, size in sizes.items() if name in read)),
        "peak": {
            "values": 64 * peak.SOURCES if whole else 16 * peak.SOURCES,
            "dtype": "int8" if whole else "float32",
            "operations": {isa: peak.operations(ISAS[isa], whole) for isa in target.arch},
        },
        "ops_per_token": sum(2 * weight.shape[0] * weight.shape[1] for weight in matrices),
    }
