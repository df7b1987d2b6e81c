"""ONNX models through onnx-ir: nodes, functions of the domain `arkinfer`, and weights that lie in a file beside them.

The one file that imports onnx-ir. Names are counted, so that equal graphs give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from arkinfer.exporters.onnx_weights import Place

OPSET = 24  # the first with TensorScatter
IR_VERSION = 11
DOMAIN, CONTRIB = "arkinfer", "com.microsoft"
_OPSETS = {"": OPSET, DOMAIN: 1, CONTRIB: 1}

Value: TypeAlias = ir.Value
Extent: TypeAlias = int | str  # a name for an extent that a run decides
Body: TypeAlias = Callable[..., "Value | tuple[Value, ...]"]

# Safetensors' names; ONNX has 4-bit types beyond them, two codes to a byte, the first in the low half.
TYPES = {
    "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "U8": ir.DataType.UINT8,
    "I8": ir.DataType.INT8, "I32": ir.DataType.INT32, "I64": ir.DataType.INT64, "BOOL": ir.DataType.BOOL,
    "I4": ir.DataType.INT4, "U4": ir.DataType.UINT4,
}  # fmt: skip


class Scope:
    """A graph or the body of a function in the making."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self._constants: dict[tuple[Any, ...], Value] = {}
        self._count = 0

    def op(self, kind: str, *inputs: Value | None, domain: str = "", **attributes: Any) -> Value:
        """Append a node with one output and return that."""
        return self.ops(kind, *inputs, count=1, domain=domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: Value | None,
        count: int,
        domain: str = "",
        skipped: Sequence[int] = (),
        **attributes: Any,
    ) -> tuple[Value, ...]:
        """Append a node and return its ``count`` outputs; those in ``skipped`` are left out of the model."""
        outputs = [ir.Value(name="" if index in skipped else self._name(kind)) for index in range(count)]
        node = ir.Node(domain, kind, inputs, ir.convenience.convert_attributes(attributes), outputs=outputs)
        self.nodes.append(node)
        return tuple(outputs)

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind.lower()}_{self._count}"

    def constant(self, value: Any, dtype: str = "I64") -> Value:
        """Return a constant, a scalar or an array; equal ones are one value."""
        kinds = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "BOOL": np.bool_}
        array: np.ndarray = np.asarray(value, kinds[dtype])
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=ir.tensor(array))
        return self._constants[key]

    def cast(self, value: Value, dtype: str) -> Value:
        """Return ``value`` converted to ``dtype``."""
        return self.op("Cast", value, to=int(TYPES[dtype]))


class Model(Scope):
    """A whole model: its graph, its functions, its inputs, outputs and weights."""

    def __init__(self, name: str, weights: str) -> None:
        super().__init__()
        self.name, self.file = name, weights
        self.functions: dict[tuple[Any, ...], ir.Function] = {}
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.weights: dict[str, Value] = {}
        self._same: dict[str, str] = {}  # a weight that is another's bytes in another shape -> that one

    def input(self, name: str, dtype: str, shape: Sequence[Extent]) -> Value:
        """Add an input and return it."""
        value = ir.Value(name=name, type=ir.TensorType(TYPES[dtype]), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, name: str, value: Value, dtype: str, shape: Sequence[Extent]) -> None:
        """Make ``value`` an output called ``name``."""
        if value.graph is not None or value in self.outputs or value in self.inputs:
            value = self.op("Identity", value)
        value.name, value.type, value.shape = name, ir.TensorType(TYPES[dtype]), ir.Shape(shape)
        self.outputs.append(value)

    def weight(self, name: str, dtype: str, shape: Sequence[int]) -> Value:
        """Return the weight ``name``; ``save`` says where it lies."""
        if name not in self.weights:
            self.weights[name] = ir.Value(name=name, type=ir.TensorType(TYPES[dtype]), shape=ir.Shape(shape))
        return self.weights[name]

    def seen_as(self, weight: Value, shape: Sequence[int], dtype: str) -> Value:
        """Return a weight that is the same bytes of the file in another shape, or of another type."""
        assert weight.name is not None
        name = f"{weight.name}:{dtype.lower()}:{'x'.join(map(str, shape))}"
        self._same[name] = weight.name
        return self.weight(name, dtype, shape)

    def call(self, name: str, body: Body, *inputs: Value, key: Any = None) -> Value:
        """Append a call of a function with one output and return that; see ``calls``."""
        return self.calls(name, body, *inputs, key=key)[0]

    def calls(self, name: str, body: Body, *inputs: Value, key: Any = None) -> tuple[Value, ...]:
        """Append a call of the function ``name`` of the domain `arkinfer` and return its outputs.

        ``body(scope, *inputs)`` writes the function for the first call; ``key`` is what else than the name it depends
        on, and a further key makes a function of its own, ``name_2``.
        """
        known = self.functions.get((name, key, len(inputs)))
        if known is None:
            scope, formal = Scope(), [ir.Value(name=f"in_{index}") for index in range(len(inputs))]
            results = body(scope, *formal)
            outputs = results if isinstance(results, tuple) else (results,)
            others = sum(each == name for each, _, _ in self.functions)
            label = f"{name}_{others + 1}" if others else name
            graph = ir.Graph(formal, outputs, nodes=scope.nodes, opset_imports=_OPSETS, name=label)
            known = self.functions[name, key, len(inputs)] = ir.Function(DOMAIN, label, graph=graph, attributes=[])
        return self.ops(known.name, *inputs, count=len(known.outputs), domain=DOMAIN)

    def save(self, path: Path, places: Mapping[str, Place]) -> None:
        """Write the model to ``path``; ``places`` holds every weight's place in the weight file beside it."""
        path.write_bytes(self.serialised(places, path.parent))

    def serialised(self, places: Mapping[str, Place], folder: Path = Path()) -> bytes:
        """Return the bytes of the model, whose weight file lies in ``folder``."""
        for name, value in self.weights.items():
            assert value.type is not None
            place = places[self._same.get(name, name)]
            value.const_value = ir.ExternalTensor(
                self.file,
                place.offset,
                place.length,
                ir.DataType(value.type.dtype),
                shape=ir.Shape(value.shape or ()),
                name=name,
                base_dir=folder,
            )
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.weights.values()),
            opset_imports=_OPSETS,
            name=self.name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, functions=[*self.functions.values()])
        written: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        return written
