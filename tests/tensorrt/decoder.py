"""A small dense decoder written by hand in the form that TensorRT gets, and an artifact of it.

It shares no code with the exporter: tokens, position, rows and caches in, logits and the updated caches out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from arkinfer.artifact import Artifact, Writer
from arkinfer.artifact.engine_recipe import FILE, Cache, EngineRecipe, Profile
from tests.artifact.samples import fields

DATA = "weights-decoder.data"
VOCABULARY, CONTEXT = 200, 640
PROFILES = {"decode": Profile(1, 1), "verify": Profile(8, 8), "prefill": Profile(96, 16)}
_HALF = TensorProto.FLOAT16
_HIDDEN, _HEADS, _KV_HEADS, _DIM, _LAYERS, _WIDE = 64, 4, 2, 16, 1, 96


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.random = np.random.default_rng(0)

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def matrix(self, rows: int, columns: int) -> str:
        return self.constant(self.random.standard_normal((rows, columns)) / np.sqrt(rows), np.float16)


def write_model(path: Path) -> None:
    """Write the model to ``path``, its larger weights to the file DATA beside it."""
    graph = _Graph()
    op, constant = graph.op, graph.constant
    ones = constant(np.ones(_HIDDEN), np.float16)
    h = op("Unsqueeze", op("Gather", graph.matrix(VOCABULARY, _HIDDEN), "tokens"), constant([0]))
    steps = op("Range", constant(0), op("Squeeze", op("Shape", "tokens")), constant(1))
    positions = op("Add", "position", steps)
    seen = op("LessOrEqual", "span", op("Unsqueeze", positions, constant([1])))
    reach = op("Shape", "span")
    # A mask of booleans does not build for a few tokens: TensorRT for RTX 1.7.1 names two operators alike.
    mask = op("Where", seen, constant(0, np.float16), constant(-65504, np.float16))
    mask = op("Unsqueeze", mask, constant([0, 1]))
    angles = np.arange(CONTEXT)[:, None] * 10000.0 ** (-np.arange(0, _DIM, 2) / _DIM)
    cos, sin = constant(np.cos(angles), np.float16), constant(np.sin(angles), np.float16)
    batched = op("Unsqueeze", positions, constant([0]))
    inputs = [("tokens", TensorProto.INT64, ["n"]), ("position", TensorProto.INT64, [1])]
    inputs += [("rows", TensorProto.INT64, ["r"]), ("span", TensorProto.INT64, ["m"])]
    outputs: list[tuple[str, int, list[Any]]] = [("logits", TensorProto.FLOAT, ["r", VOCABULARY])]
    for layer in range(_LAYERS):
        x = op("RMSNormalization", h, ones, epsilon=1e-5)
        heads = []
        for count in (_HEADS, _KV_HEADS, _KV_HEADS):
            part = op("MatMul", x, graph.matrix(_HIDDEN, count * _DIM))
            heads.append(op("Transpose", op("Reshape", part, constant([1, -1, count, _DIM])), perm=[0, 2, 1, 3]))
        q, k = (op("RotaryEmbedding", part, cos, sin, batched) for part in heads[:2])
        updated = []
        for name, part in (("k", k), ("v", heads[2])):
            cache = f"layers.{layer}.{name}"
            inputs.append((cache, _HALF, [1, _KV_HEADS, CONTEXT, _DIM]))
            outputs.append((f"{cache}.out", _HALF, [1, _KV_HEADS, CONTEXT, _DIM]))
            updated.append(op("TensorScatter", cache, part, "position", out=f"{cache}.out", axis=2, mode="linear"))
        updated = [op("Slice", each, constant([0]), reach, constant([2])) for each in updated]
        mixed = op("Transpose", op("Attention", q, *updated, mask), perm=[0, 2, 1, 3])
        mixed = op("Reshape", mixed, constant([1, -1, _HEADS * _DIM]))
        h = op("Add", h, op("MatMul", mixed, graph.matrix(_HEADS * _DIM, _HIDDEN)))
        x = op("RMSNormalization", h, ones, epsilon=1e-5)
        gate, up = op("MatMul", x, graph.matrix(_HIDDEN, _WIDE)), op("MatMul", x, graph.matrix(_HIDDEN, _WIDE))
        gated = op("Mul", op("Mul", gate, op("Sigmoid", gate)), up)
        h = op("Add", h, op("MatMul", gated, graph.matrix(_WIDE, _HIDDEN)))
    chosen = op("RMSNormalization", op("Gather", op("Squeeze", h, constant([0])), "rows"), ones, epsilon=1e-5)
    op("Cast", op("MatMul", chosen, graph.matrix(_HIDDEN, VOCABULARY)), out="logits", to=TensorProto.FLOAT)
    declared = [[helper.make_tensor_value_info(*item) for item in items] for items in (inputs, outputs)]
    made = helper.make_graph(graph.nodes, "decoder", *declared, graph.constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.save(model, path, save_as_external_data=True, location=DATA, size_threshold=1024)


def recipe(library: str = "tensorrt", level: str = "sm_87", **changes: Any) -> EngineRecipe:
    """Return the recipe of the decoder."""
    shape = (1, _KV_HEADS, CONTEXT, _DIM)
    caches = tuple(Cache(f"layers.{layer}.{name}", "float16", shape) for layer in range(_LAYERS) for name in "kv")
    values: dict[str, Any] = {
        "library": library,
        "versions": ">=10.15,<12" if library == "tensorrt" else ">=1.7.1,<1.8",
        "levels": (level,),
        "model": "model.onnx",
        "engine": None,
        "workspace": 1 << 28,
        "profiles": PROFILES,
        "caches": caches,
        "checked": "",
        "facts": {
            "vocab_size": VOCABULARY,
            "max_context": CONTEXT,
            "sparse": None,
            "bytes": {"weights": 1000, "kv_per_token": 256, "compressed_per_token": 0},
            "ops_per_token": 5000,
        },
    }
    return EngineRecipe(**{**values, **changes})


def write_artifact(path: Path, made: EngineRecipe, data: str = DATA) -> Artifact:
    """Write an artifact of the decoder; ``data``, of the same length, is where its model says that the weights lie."""
    target = {"name": "jetson-orin" if made.library == "tensorrt" else "rtx-4090-tensorrt", "arch": list(made.levels)}
    with Writer(path) as writer:
        model = writer.path(made.model)
        write_model(model)
        model.write_bytes(model.read_bytes().replace(DATA.encode(), data.encode()))
        writer.path(FILE).write_text(made.to_json(), encoding="utf-8")
        changes = {"target": target, "backend": "tensorrt", "context": CONTEXT, "kv": "fp16", "parity": None}
        return writer.seal(fields(**changes))
