"""The parity oracle: the same graph that was exported, run by torch with the same packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx

from arkinfer.backends.base import Rows
from arkinfer.graph import ModelGraph, Weight
from arkinfer.ops.attention import LayerCache
from arkinfer.quant.packed import Packed

KEEP_BYTES = 1 << 30  # packed weights of a model that are kept from step to step
PERTURBATION = 1e-7  # relative; float32 resolves 6e-8
_KV = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}


class WeightSource(Protocol):
    """Gives the packed form of any weight of the graph."""

    def packed(self, weight: Weight) -> Packed: ...


class RowSource(Protocol):
    """Gives some rows of the packed form of any weight of the graph; of vectors, elements."""

    def rows(self, weight: Weight, start: int, stop: int) -> Packed: ...


class ReferenceState:
    """The caches of one sequence, one LayerCache per layer."""

    def __init__(self, caches: list[LayerCache], capacity: int) -> None:
        self.caches = caches
        self.capacity = capacity
        self.length = 0

    def truncate(self, length: int) -> None:
        self.length = length


class _Interpreter(fx.Interpreter):
    """Runs the graph, fetches each weight when a node reads it, and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, fetch: Callable[[str], torch.Tensor], wanted: Mapping[str, str]) -> None:
        super().__init__(module)
        self._fetch, self._wanted = fetch, wanted
        self.kept: dict[str, np.ndarray] = {}

    def fetch_args_kwargs_from_env(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def resolved(value: Any) -> Any:
            return self._fetch(value.name) if isinstance(value, _Deferred) else value

        args, kwargs = super().fetch_args_kwargs_from_env(node)
        return fx.node.map_aggregate(args, resolved), fx.node.map_aggregate(kwargs, resolved)

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if node.name in self._wanted:
            self.kept[self._wanted[node.name]] = value.numpy()
        return value


@dataclass(frozen=True)
class _Deferred:
    """A weight input that has not been fetched."""

    name: str


class _Kept:
    """Keeps the weights of a small model; of a large one, the last, which its codes, scales and zeros are parts of."""

    def __init__(self, inner: WeightSource, everything: bool) -> None:
        self._inner, self._everything = inner, everything
        self._kept: dict[Weight, Packed] = {}

    def packed(self, weight: Weight) -> Packed:
        if weight not in self._kept:
            if not self._everything:
                self._kept.clear()  # before the next one takes memory
            self._kept[weight] = self._inner.packed(weight)
        return self._kept[weight]


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
    """Runs a ModelGraph in torch on the CPU; the same ``step`` as an Executor's, in float32.

    Weights beyond KEEP_BYTES are fetched anew at each step and dropped after their use: one at a time is in memory.
    """

    def __init__(self, model: ModelGraph, weights: WeightSource, kv: str, attention: str = "auto") -> None:
        self._model, self._attention = model, attention
        self._weights = _Kept(weights, model.weight_bytes() <= KEEP_BYTES)
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
        chosen = range(len(tokens)) if logits == "all" else [len(tokens) - 1]
        ((result,), _) = self._run(tokens, state, chosen, {})
        values: np.ndarray = result.float().numpy()
        return values

    def trace(self, tokens: Sequence[int], state: ReferenceState, names: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Run ``tokens`` and return the value of each node in ``names`` (node name -> key of the result)."""
        return self._run(tokens, state, [len(tokens) - 1], names)[1]

    def _run(
        self, tokens: Sequence[int], state: ReferenceState, rows: Sequence[int], names: Mapping[str, str]
    ) -> tuple[Sequence[torch.Tensor], dict[str, np.ndarray]]:
        count = len(tokens)
        values = {
            "tokens": torch.tensor(list(tokens)),
            "positions": torch.arange(state.length, state.length + count),
            "rows": torch.tensor(list(rows), dtype=torch.int64),
        }
        arguments = self._model.arguments(values, state.caches)
        interpreter = _Interpreter(self._module, self._fetch, names)
        with torch.no_grad():
            result = interpreter.run(
                *(_Deferred(name) if value is None else value for name, value in arguments.items())
            )
        state.length += count
        return result, interpreter.kept

    def _fetch(self, name: str) -> torch.Tensor:
        weight = replace(self._model.weights[name], part="weight")
        return self._model.bound(name, self._weights.packed(weight))
