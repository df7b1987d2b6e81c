"""The exporter of the tvm backend: kernels compiled for every level of the target, weights repacked once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arkinfer.artifact import tensors
from arkinfer.errors import UnsupportedError
from arkinfer.exporters import compiled, outline, refusals
from arkinfer.exporters.base import BuildOptions, Payload, Progress
from arkinfer.exporters.compiler import Compiler
from arkinfer.exporters.kernels.tir import pack, peak
from arkinfer.exporters.kernels.tir.isa import ISAS
from arkinfer.exporters.lowering import Lowering, Stored
from arkinfer.exporters.program import Program, Value
from arkinfer.graph import ModelGraph, Weight
from arkinfer.passes.formats import linears
from arkinfer.quant.packed import Packed, pack_crumbs, pack_nibbles
from arkinfer.reference import WeightSource
from arkinfer.targets import Target

WEIGHTS = "weights-cpu.safetensors"
PLAN_FORMAT = 1  # of payload/plan.json; the backend refuses any other
_PRODUCTS = ("linear_int8", "linear_float", "quantize", "take_columns")  # what reads the parameters of linears
TOOLS = ("apache-tvm", "apache-tvm-ffi", "ziglang")
# Codes, one a byte, to the bytes of arkinfer.ops.linear.
_CANONICAL: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int8": lambda codes: codes,
    "int4": pack_nibbles,
    "int2": pack_crumbs,
    "ternary": pack_crumbs,
}
_DTYPES = {"uint8": "U8", "int8": "I8", "float16": "F16", "float32": "F32", "int32": "I32", "uint16": "BF16"}


class TvmExporter:
    """Lowers to TIR kernels; one shared library per instruction-set level, one weight file for all of them."""

    def __init__(self) -> None:
        self._compilers: dict[str, Compiler] = {}

    def prepare(self, target: Target) -> None:
        """Start one compiler per level: they load TVM while the graph is captured."""
        if not self._compilers and all(_installed(tool) for tool in TOOLS):
            self._compilers = {isa: Compiler(isa) for isa in target.arch if isa in ISAS}

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
        weights: WeightSource,
        target: Target,
        options: BuildOptions,
        path: Callable[[str], Path],
        progress: Progress,
    ) -> Payload:
        """Compile in one process per level while this one packs the weights."""
        if absent := [tool for tool in TOOLS if not _installed(tool)]:
            raise UnsupportedError(
                f"building for the target {target.name} needs {', '.join(absent)}",
                hint="pip install 'arkinfer[build]'",
                code="ARK-E312",
            )
        lowering = Lowering(model, options)
        program = lowering.run()
        toolchain = {tool: metadata.version(tool) for tool in TOOLS}
        text = program.to_json()
        names = {isa: compiled.key(text, isa, json.dumps(toolchain, sort_keys=True)) for isa in target.arch}
        missing = [isa for isa in target.arch if not compiled.fetch(names[isa], path(f"payload/{isa}.so"))]
        try:
            self.prepare(target)
            for isa in missing:
                self._compilers[isa].start(text, path(f"payload/{isa}.so"))
            _write_weights(program, lowering.stored, weights, path(WEIGHTS), progress)
            for done, isa in enumerate(missing):
                progress("compile", done, len(missing))
                self._compilers[isa].finish()
                compiled.keep(names[isa], path(f"payload/{isa}.so"))
            progress("compile", len(missing), len(missing))
        finally:
            self.close()
        path("payload/program.txt").write_text(program.dump(), encoding="utf-8")
        plan = _plan(model, program, target, options)
        path("payload/plan.json").write_text(json.dumps(plan, sort_keys=True, indent=1) + "\n", encoding="utf-8")
        return Payload({**toolchain, "torch": torch.__version__.split("+")[0]}, {"max_context": options.context})

    def weights(self, model: ModelGraph, file: Callable[[str], Path]) -> WeightSource:
        """Return the weights of an artifact in canonical form, unpacked from the kernels' layout."""
        return _ArtifactWeights(model, tensors.load(file(WEIGHTS)))


def _installed(tool: str) -> bool:
    try:
        metadata.version(tool)
    except metadata.PackageNotFoundError:
        return False
    return True


def _write_weights(
    program: Program, stored: dict[str, Stored], weights: WeightSource, file: Path, progress: Progress
) -> None:
    specs = {
        value.name: tensors.TensorSpec(_DTYPES[value.dtype], tuple(map(int, value.shape)))
        for value in program.parameters
    }

    def chunks() -> Iterator[tuple[str, Iterable[np.ndarray]]]:
        for index, value in enumerate(program.parameters):
            progress("weights", index, len(program.parameters))
            what = stored[value.name]
            yield value.name, _repack(weights.packed(what.weight), what, value)

    tensors.write(file, specs, chunks())
    progress("weights", len(specs), len(specs))


def _repack(packed: Packed, what: Stored, value: Value) -> Iterable[np.ndarray]:
    """Yield one parameter of the program from a canonical weight, some panels at a time."""
    if what.part == "vector":
        return [packed.weight.float().numpy().reshape(-1)]
    source: torch.Tensor = getattr(packed, what.part)
    array = source.contiguous().view(torch.uint16).numpy() if source.dtype == torch.bfloat16 else source.numpy()
    if what.part == "order":
        return [array]
    write = pack.weight if what.part == "weight" else pack.vectors
    return write(_matrix(what.weight, what.gated), lambda start, stop: array[start:stop])


def _matrix(weight: Weight, gated: bool) -> pack.Matrix:
    return pack.Matrix(weight.format, weight.shape[0], weight.shape[1], weight.group, gated)


class _ArtifactWeights:
    """Canonical weights read back from an artifact."""

    def __init__(self, model: ModelGraph, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays
        dtypes = {node.name: node.meta["val"].dtype for node in model.placeholders() if node.name in model.weights}
        self._dtypes = {(weight.name, weight.part): dtypes[name] for name, weight in model.weights.items()}
        self._orders = {
            weight.order: torch.from_numpy(arrays[name])
            for weight in model.weights.values()
            if (name := f"{weight.name}:order") in arrays
        }

    def packed(self, weight: Weight) -> Packed:
        vector = self._arrays.get(f"{weight.name}:vector")
        if vector is not None:
            return Packed("dense", 0, (vector.shape[0], vector.shape[0]), torch.from_numpy(vector))
        gated = f"{weight.name}:gated.weight" in self._arrays
        stem = f"{weight.name}:{'gated' if gated else 'panels'}"
        matrix = _matrix(weight, gated)
        rows = torch.from_numpy(pack.unpack(matrix, self._arrays[f"{stem}.weight"]))
        if weight.format == "dense":
            kind = self._dtypes[weight.name, "weight"]
            return Packed("dense", 0, (matrix.rows, matrix.width), rows.view(kind) if kind == torch.bfloat16 else rows)
        scales = torch.from_numpy(pack.unpack(matrix, self._arrays[f"{stem}.scales"]))
        kind = self._dtypes[weight.name, "scales"]
        scales = scales.view(kind) if kind == torch.bfloat16 else scales
        zeros = torch.from_numpy(pack.unpack(matrix, self._arrays[f"{stem}.zeros"])) if weight.zeros else None
        order = self._orders[weight.order] if weight.order else None
        shape = matrix.rows, matrix.width
        return Packed(weight.format, weight.group, shape, _CANONICAL[weight.format](rows), scales, zeros, order)


def _plan(model: ModelGraph, program: Program, target: Target, options: BuildOptions) -> dict[str, Any]:
    """Return what the backend needs to know that is not in the compiled code."""
    config, sparse = model.config, model.config.sparse
    sizes = {
        value.name: tensors.TensorSpec(_DTYPES[value.dtype], tuple(map(int, value.shape))).nbytes
        for value in program.parameters
    }
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
