"""The exporter of the onnxruntime backend: an ONNX model with that runtime's own operators, weights beside it.

On processors values between operators are float32: onnxruntime's kernels for float16 there convert to float32 and
back, and the parity gate of float32 is the sharpest. On GPUs they are float16, the residual stream excepted.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arkinfer.artifact import Artifact
from arkinfer.artifact.journal import Journal
from arkinfer.errors import UnsupportedError
from arkinfer.exporters import onnx_outline, onnx_weights, outline
from arkinfer.exporters.base import BuildOptions, Payload, Progress, StandIn
from arkinfer.graph import ModelGraph
from arkinfer.passes import formats
from arkinfer.reference import RowSource, WeightSource
from arkinfer.targets import Target

if TYPE_CHECKING:
    from arkinfer.exporters.onnx_lowering import Lowering

MODEL, WEIGHTS = "model.onnx", "weights-onnx.safetensors"
PLAN_FORMAT = 1  # of payload/plan.json; the backend refuses any other
FORM = "onnxruntime"
PIECE = 128  # most tokens of a step where blocks are chosen: they share the gathered blocks, and mask each other's
TOOLS = ("onnx", "onnx-ir")
_DTYPES = {"F32": "float32", "F16": "float16"}


class OnnxruntimeExporter:
    """Lowers to one ONNX model; what it holds is the same for every processor."""

    precision = "float"  # of what computes with int8 activations; GPUs, which do not, are judged by their fp16 caches

    def prepare(self, target: Target) -> None:
        """Nothing takes long to start."""

    def close(self) -> None:
        """Nothing was started."""

    def support(self, model: ModelGraph, target: Target, options: BuildOptions) -> list[str]:
        """Return why onnxruntime cannot run ``model``; empty if it can."""
        weights = [model.weight_of(node) for node in formats.linears(model)]
        return onnx_outline.reasons(model.config, weights, target, options)

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
        """Write the weights, and the model that refers to them."""
        if absent := [tool for tool in TOOLS if importlib.util.find_spec(tool.replace("-", "_")) is None]:
            raise UnsupportedError(
                f"building for the target {target.name} needs {', '.join(absent)}",
                hint="pip install 'arkinfer[build,onnx-build,onnxruntime]'",
                code="ARK-E312",
            )
        from arkinfer.exporters.onnx_lowering import Lowering

        activations = "F16" if onnx_outline.narrow(target.arch) else "F32"
        lowering = Lowering(model, options, WEIGHTS, FORM, activations)
        lowered = lowering.run()
        origins = onnx_weights.write(lowering.stored, lowering.layout, weights, path(WEIGHTS), journal, progress)
        lowered.save(path(MODEL), onnx_weights.places(lowering.stored))
        plan = plan_of(model, lowering, options)
        path("payload/plan.json").write_text(json.dumps(plan, sort_keys=True, indent=1) + "\n", encoding="utf-8")
        toolchain = {tool: metadata.version(tool) for tool in TOOLS}
        return Payload(
            {**toolchain, "torch": torch.__version__.split("+")[0]}, {"max_context": options.context}, origins
        )

    def weights(
        self, model: ModelGraph, file: Callable[[str], Path], origins: Mapping[str, str] | None = None
    ) -> WeightSource:
        """Return the weights of an artifact in canonical form, unpacked from the operators' layout."""
        plan = json.loads(file("payload/plan.json").read_text(encoding="utf-8"))
        layout = partial(onnx_outline.layout_of, form=FORM, products=plan["products"])
        return onnx_weights.ArtifactWeights(model, layout, file(WEIGHTS), origins)

    def stand_in(self, artifact: Artifact) -> StandIn | None:
        """Return onnxruntime on this processor for an artifact of a GPU: the same model, by other kernels."""
        from arkinfer.stand_in import on_processor

        if not onnx_outline.narrow(artifact.manifest.target["arch"]):
            return None
        return StandIn(on_processor(artifact), "compiled, run by onnxruntime on a processor")


def plan_of(model: ModelGraph, lowering: Lowering, options: BuildOptions) -> dict[str, Any]:
    """Return what the backend needs to know that is not in the model."""
    config = model.config
    matrices = [model.weight_of(node) for node in formats.linears(model)]
    names = {weight.name for weight in matrices}
    read = sum(item.spec.nbytes for item in lowering.stored.values() if item.weight.name in names)
    activations = lowering.shape.activations
    frequencies = next(iter(model.constants.values())).float().tolist()
    sparse = lowering.sparse
    strides = {} if sparse is None else {"fine": sparse.kernel_stride, "coarse": sparse.coarse_stride}
    caches = [
        {
            "name": name,
            "dtype": _DTYPES[activations],
            "shape": [-1 if isinstance(extent, str) else extent for extent in shape],
            "stride": strides.get(name.rpartition(".")[2], 1),
        }
        for name, _, shape in lowering.caches
    ]
    return {
        "format": PLAN_FORMAT,
        "provider": "cuda" if activations == "F16" else "cpu",
        "activations": _DTYPES[activations],
        "products": lowering.products,
        "vocab_size": config.vocab_size,
        "max_context": options.context,
        "model": MODEL,
        "weights": WEIGHTS,
        "caches": caches,
        "block": lowering.block,
        "piece": PIECE if sparse is not None else None,
        "taps": list(model.residuals().values()) if lowering.taps else [],
        "rope": {
            "inverse_frequencies": [value.hex() for value in frequencies],
            "magnitude": float(config.rope.magnitude(config.max_context)).hex(),
        },
        "sparse": outline.gear(sparse),
        "bytes": outline.traffic(config, options.kv, read),
        "ops_per_token": sum(2 * weight.shape[0] * weight.shape[1] for weight in matrices),
    }
