"""The parity oracle: the same graph that was exported, run by torch with the same packed weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import fx

from arkinfer.graph import ModelGraph
from arkinfer.ops.attention import LayerCache

_KV = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}


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


class Reference:
    """Runs a ModelGraph in torch on the CPU; the same ``step`` as an Executor's, in float32."""

    def __init__(self, model: ModelGraph, weights: object, kv: str, attention: str = "auto") -> None:
        self._model = model
        self._weights = weights
        self._kv = _KV[kv]
        self._module = fx.GraphModule(torch.nn.Module(), model.with_attention(attention).graph)

    def new_state(self, capacity: int) -> ReferenceState:
        return ReferenceState(self._model.new_caches(capacity, self._kv), capacity)

    def step(self, tokens: Sequence[int], state: ReferenceState, rows: Sequence[int] | None = None) -> np.ndarray:
        """Append ``tokens`` and return float32 logits (rows, vocab) of ``rows`` (default: all)."""
        arguments = self._arguments(tokens, state, range(len(tokens)) if rows is None else rows)
        with torch.no_grad():
            logits = self._module(*arguments)
        state.length += len(tokens)
        values: np.ndarray = logits.float().numpy()
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
