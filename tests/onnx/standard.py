"""Models of standard operators alone, built and run in onnxruntime: what other consumers are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from arkinfer import pipeline, structure
from arkinfer.checkpoint import open_checkpoint
from arkinfer.exporters import onnx_weights
from arkinfer.exporters.base import BuildOptions
from arkinfer.exporters.onnx_lowering import Lowering
from arkinfer.graph import ModelGraph
from arkinfer.recipe import choose
from arkinfer.reference import Reference
from arkinfer.weights import CheckpointWeights

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass
class Standard:
    """A model on disk, and the reference that it must equal."""

    file: Path
    graph: ModelGraph
    reference: Reference


def build(model: str | Path, folder: Path, weights: str, form: str, context: int, attention: str = "dense") -> Standard:
    """Write ``model`` for the consumer ``form``; "tensorrt" computes in float16, "portable" in float32."""
    checkpoint = open_checkpoint(model)
    recipe = choose(
        weights, "int8", structure.body(checkpoint.config), structure.shapes(checkpoint.config), checkpoint, "float"
    )
    kv = "fp16" if form == "tensorrt" else "fp32"
    graph = pipeline.lower(checkpoint.config, context, recipe, checkpoint.layouts(), kv).graph
    options = BuildOptions(kv, attention, context)
    lowering = Lowering(graph, options, "weights.bin", form, "F16" if form == "tensorrt" else "F32", form != "tensorrt")
    written = lowering.run()
    source = CheckpointWeights(checkpoint)
    folder.mkdir(exist_ok=True)
    file = folder / "model.onnx"
    onnx_weights.write(lowering.stored, lowering.layout, source, folder / "weights.bin", None, lambda *_: None)
    written.save(file, onnx_weights.places(lowering.stored))
    return Standard(file, graph, Reference(graph, source, kv, attention))


class Runner:
    """One sequence of such a model: every cache is bound to one address as input and output."""

    def __init__(self, file: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.length = 0
        self.caches = {
            each.name: np.zeros(each.shape, NUMPY[each.type])
            for each in self.session.get_inputs()
            if each.name.startswith("layers.")
        }

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> np.ndarray:
        """Append ``tokens`` and return logits of ``rows``."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("tokens", np.array(tokens, np.int64))
        binding.bind_cpu_input("position", np.array([self.length], np.int64))
        binding.bind_cpu_input("rows", np.array(rows, np.int64))
        if "span" in {each.name for each in self.session.get_inputs()}:
            binding.bind_cpu_input("span", np.arange(self.length + len(tokens)))
        for name, cache in self.caches.items():
            binding.bind_input(name, "cpu", 0, cache.dtype, cache.shape, cache.ctypes.data)
            binding.bind_output(f"{name}.out", "cpu", 0, cache.dtype, cache.shape, cache.ctypes.data)
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        self.length += len(tokens)
        found: np.ndarray = binding.copy_outputs_to_cpu()[-1]
        return found
