"""The exporter of the tensorrt backend: an ONNX model in TensorRT's form, and the recipe for its engine.

TensorRT itself builds only on the device. TensorRT for RTX has the same parser and needs no GPU: it builds the engine
of targets that name it ahead of time, and where it is installed it reads the ONNX file of every other target too.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from arkinfer.artifact import Artifact, tensorrt
from arkinfer.artifact.engine_recipe import FILE, Cache, EngineRecipe, Profile
from arkinfer.artifact.journal import Journal
from arkinfer.errors import UnsupportedError
from arkinfer.exporters import onnx_outline, onnx_weights, tensorrt_outline
from arkinfer.exporters.base import BuildOptions, Payload, Progress, StandIn
from arkinfer.exporters.onnxruntime import MODEL, TOOLS, WEIGHTS, plan_of
from arkinfer.graph import ModelGraph
from arkinfer.passes import formats
from arkinfer.reference import RowSource, WeightSource
from arkinfer.targets import Target

ENGINE = "payload/engine.plan"
CHECKED_FOR = "sm_89"  # what a file for other devices is read for: TensorRT for RTX knows no Jetson
WORKSPACE = 1 << 30  # bytes that one layer may use: an eighth of the smallest board


class TensorRtExporter:
    """Lowers to one ONNX model of float16, strongly typed; no file of the artifact is bound to a device, but for an
    engine that was built ahead of time.
    """

    precision = "fp16"

    def prepare(self, target: Target) -> None:
        """Nothing takes long to start."""

    def close(self) -> None:
        """Nothing was started."""

    def support(self, model: ModelGraph, target: Target, options: BuildOptions) -> list[str]:
        """Return why TensorRT cannot run ``model``; empty if it can."""
        weights = [model.weight_of(node) for node in formats.linears(model)]
        found = tensorrt_outline.reasons(model.config, weights, target, options)
        if any(weight.zeros for weight in weights):
            found.append("TensorRT multiplies out no zero points; --weights fp16")
        return found

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
        """Write the weights, the model that refers to them, and the recipe; the engine where one can be built here."""
        library, versions = tensorrt_outline.library(target)
        ahead = library == "tensorrt_rtx"
        needed = (*TOOLS, *(("tensorrt-rtx",) if ahead else ()))
        if absent := [tool for tool in needed if importlib.util.find_spec(tool.replace("-", "_")) is None]:
            raise UnsupportedError(
                f"building for the target {target.name} needs {', '.join(absent)}",
                hint=f"pip install 'arkinfer[build,onnx-build,onnxruntime{',tensorrt-rtx' if ahead else ''}]'",
                code="ARK-E312",
            )
        from arkinfer.exporters.onnx_lowering import Lowering

        lowering = Lowering(model, options, WEIGHTS, tensorrt_outline.FORM, "F16", taps=False)
        lowered = lowering.run()
        origins = onnx_weights.write(lowering.stored, lowering.layout, weights, path(WEIGHTS), journal, progress)
        lowered.save(path(MODEL), onnx_weights.places(lowering.stored))
        plan = plan_of(model, lowering, options)
        path("payload/plan.json").write_text(json.dumps(plan, sort_keys=True, indent=1) + "\n", encoding="utf-8")
        recipe = EngineRecipe(
            library=library,
            versions=versions,
            levels=tuple(target.arch),
            model=MODEL,
            engine=ENGINE if ahead else None,
            workspace=WORKSPACE,
            profiles={
                "decode": Profile(1, 1),
                "verify": Profile(tensorrt_outline.VERIFIED, tensorrt_outline.VERIFIED),
                "prefill": Profile(
                    min(tensorrt_outline.CHUNK, options.context), min(tensorrt_outline.ROWS, options.context)
                ),
            },
            caches=tuple(Cache(item["name"], item["dtype"], tuple(item["shape"])) for item in plan["caches"]),
            checked="read by no TensorRT",
            facts={name: plan[name] for name in ("vocab_size", "max_context", "sparse", "bytes", "ops_per_token")},
        )
        recipe = _checked(recipe, path, progress)
        path(FILE).write_text(recipe.to_json(), encoding="utf-8")
        toolchain = {tool: metadata.version(tool) for tool in TOOLS}
        if ahead:
            toolchain["tensorrt-rtx"] = metadata.version("tensorrt-rtx")
        limits = {"max_context": options.context, "cache_bytes": recipe.cache_bytes}
        return Payload({**toolchain, "torch": torch.__version__.split("+")[0]}, limits, origins)

    def weights(
        self, model: ModelGraph, file: Callable[[str], Path], origins: Mapping[str, str] | None = None
    ) -> WeightSource:
        """Return the weights of an artifact in canonical form, unpacked from the operators' layout."""
        layout = partial(onnx_outline.layout_of, form=tensorrt_outline.FORM, products="F16")
        return onnx_weights.ArtifactWeights(model, layout, file(WEIGHTS), origins)

    def stand_in(self, artifact: Artifact) -> StandIn:
        """Return onnxruntime on this processor: the same model, by other kernels."""
        from arkinfer.stand_in import on_processor

        checked = EngineRecipe.from_json(artifact.file(FILE).read_text(encoding="utf-8")).checked
        return StandIn(on_processor(artifact), f"compiled, {checked}, its ONNX file run by onnxruntime on a processor")


def _checked(recipe: EngineRecipe, path: Callable[[str], Path], progress: Progress) -> EngineRecipe:
    """Let TensorRT for RTX read the ONNX file, and build the engine if the recipe has it in the artifact.

    Returns the recipe with what it made of it. Raises UnsupportedError where it refuses.
    """
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return recipe
    level = recipe.levels[0] if recipe.engine is not None else CHECKED_FOR
    engine = None if recipe.engine is None else str(path(recipe.engine))
    request = tensorrt.Request("tensorrt_rtx", recipe.to_json(), str(path(recipe.model)), level, engine)
    outcome = tensorrt.build(request, lambda done, total: progress("engine", done, total))
    verb = "read" if engine is None else f"built for {level}"
    return replace(recipe, checked=f"{verb} by TensorRT for RTX {outcome.version}")
