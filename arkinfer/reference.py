"""The parity oracle: the same graph that was exported, run by torch with the same packed weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import fx

from arkinfer.backends.base import Rows
from arkinfer.graph import ModelGraph, Weight
from arkinfer.ops.attention import LayerCache
from arkinfer.quant.packed import Packed

PERTURBATION = 1e-7  # relative; float32 resolves 6e-8
_KV = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}


class WeightSource(Protocol):
    """Gives the packed form of any weight of the graph."""

    def packed(self, weight: Weight) -> Packed: ...


class ReferenceState:
    """The caches of one sequence, one LayerCache per layer."""

    def __init__(self, caches: list[LayerCache], capacity: int) -> None:
        self.caches = caches
        self.capacity = capacity
        self.length = 0

    def truncate(self, length: int) -> None:
        self.length = length


class _Tracer(fx.Interpreter):
    """Runs the graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, wanted: Mapping[str, str]) -> None:
        super().__init__(module)
        self._wanted = wanted
        self.kept: dict[str, np.ndarray] = {}

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if node.name in self._wanted:
            self.kept[self._wanted[node.name]] = value.numpy()
        return value


class _Perturbed:
    """Weights whose vectors differ in their last bits."""

    def __init__(self, inner: WeightSource) -> None:
        self._inner = inner

    def packed(self, weight: Weight) -> Packed:
        packed = self._inner.packed(weight)
        if len(weight.shape) > 1:
            return packed
        noise = torch.randn(packed.weight.shape, generator=torch.Generator().manual_seed(len(weight.name)))
        return replace(packed, weight=packed.weight.float() * (1 + PERTURBATION * noise))


class Reference:
    """Runs a ModelGraph in torch on the CPU; the same ``step`` as an Executor's, in float32."""

    def __init__(self, model: ModelGraph, weights: WeightSource, kv: str, attention: str = "auto") -> None:
        self._model, self._weights, self._attention = model, weights, attention
        self._kv = kv
        self._module = fx.GraphModule(torch.nn.Module(), model.with_attention(attention).graph)

    def perturbed(self) -> Reference:
        """Return the same model with norm weights changed by about one unit in the last place."""
        return Reference(self._model, _Perturbed(self._weights), self._kv, self._attention)

    def residuals(self) -> dict[str, str]:
        """Return the graph's residual nodes, see ModelGraph.residuals."""
        return self._model.residuals()

    def new_state(self, capacity: int) -> ReferenceState:
        return ReferenceState(self._model.new_caches(capacity, _KV[self._kv]), capacity)

    def step(self, tokens: Sequence[int], state: ReferenceState, logits: Rows = "last") -> np.ndarray:
        """Append ``tokens`` and return float32 logits (rows, vocab): of all rows or the last."""
        arguments = self._arguments(tokens, state, range(len(tokens)) if logits == "all" else [len(tokens) - 1])
        with torch.no_grad():
            (result,) = self._module(*arguments)
        state.length += len(tokens)
        values: np.ndarray = result.float().numpy()
        return values

    def trace(self, tokens: Sequence[int], state: ReferenceState, names: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Run ``tokens`` and return the value of each node in ``names`` (node name -> key of the result)."""
        tracer = _Tracer(self._module, names)
        with torch.no_grad():
            tracer.run(*self._arguments(tokens, state, [len(tokens) - 1]))
        state.length += len(tokens)
        return tracer.kept

    def _arguments(self, tokens: Sequence[int], state: ReferenceState, rows: Sequence[int]) -> list[torch.Tensor]:
        count = len(tokens)
        values = {
            "tokens": torch.tensor(list(tokens)),
            "positions": torch.arange(state.length, state.length + count),
            "rows": torch.tensor(list(rows), dtype=torch.int64),
        }
        return self._model.bind(values, state.caches, self._weights)
