"""Run a model one layer at a time over many windows of tokens: each weight is read once, and one layer is in memory.

For work that knows all its tokens beforehand: calibrating, and measuring what quantising costs. The modules are those
of arkinfer.models, in float32 and with float activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from arkinfer import models
from arkinfer.checkpoint.stored import Layout
from arkinfer.config import ModelConfig
from arkinfer.graph import ModelGraph, Weight
from arkinfer.models.decoder import Layer, Linear, RMSNorm
from arkinfer.quant.packed import Packed, dequantise
from arkinfer.reference import RowSource

Fetch = Callable[[str], Packed]


@contextmanager
def workers() -> Iterator[Executor]:
    """Give a pool of threads, each of which computes alone.

    A matrix product that several threads share is cut by their number, and its last bits depend on the cut. Work that
    is cut the same way everywhere and computed in one thread a piece gives the same bits on any number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


class Layerwise:
    """One model's layers, loaded in turn; ``fetch`` gives each weight by its name in the checkpoint."""

    def __init__(self, config: ModelConfig, fetch: Fetch) -> None:
        self._config, self._fetch = config, fetch
        with torch.device("meta"):
            self._model = models.create(config).requires_grad_(False)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self._config.layers

    def embed(self, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Return the first hidden states (tokens, hidden) of each window."""
        table = self._fetch("model.embed_tokens.weight")
        tokens, places = torch.unique(
            torch.tensor([token for window in windows for token in window]), return_inverse=True
        )
        self._model.model.embed_tokens.weight = _parameter(dequantise(rows_of(table, tokens)))
        hidden = self._model.embed(places)
        self._model.model.embed_tokens.to("meta")
        return list(torch.split(hidden, [len(window) for window in windows]))

    def layers(self) -> Iterator[tuple[str, Layer]]:
        """Yield each layer, loaded, and its name; it is dropped when the next one is asked for."""
        for index, layer in enumerate(self._model.model.layers):
            assert isinstance(layer, Layer)
            name = f"model.layers.{index}"
            self._load(name, layer)
            yield name, layer
            layer.to("meta")

    def forward(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        """Return what ``layer`` makes of one window's hidden states (tokens, hidden), positions counted from 0."""
        with torch.no_grad():
            result: torch.Tensor = layer(hidden, torch.arange(len(hidden)), self._model.inverse_frequencies, None)
        return result

    def run(self, windows: Sequence[Sequence[int]], advance: Callable[[], None]) -> list[torch.Tensor]:
        """Return the last layer's output for each window; ``advance`` is called after every layer."""
        hidden = self.embed(windows)
        for _, layer in self.layers():
            with workers() as pool:
                hidden = list(pool.map(lambda states, layer=layer: self.forward(layer, states), hidden))
            advance()
        return hidden

    def logits(self, hidden: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the logits (tokens, vocabulary) of each window's last hidden states."""
        model = self._model
        self._load("model.norm", model.model.norm)
        table = self._fetch("model.embed_tokens.weight" if self._config.tie_embeddings else "lm_head.weight")
        model.lm_head.pack(_plain(table))
        for states in hidden:
            with torch.no_grad():  # never across a yield: it would hold for whoever asks for the next one
                values: torch.Tensor = model.head(model.model.norm(states))
            yield values

    def _load(self, name: str, module: nn.Module) -> None:
        for inner, part in module.named_modules():
            path = f"{name}.{inner}" if inner else name
            if isinstance(part, Linear):
                part.pack(_plain(self._fetch(f"{path}.weight")))
                if part.bias is not None:
                    part.bias = _parameter(self._fetch(f"{path}.bias").weight.float())
            elif isinstance(part, RMSNorm):
                part.weight = _parameter(self._fetch(f"{path}.weight").weight.float())


def fetch_from(graph: ModelGraph, layouts: Mapping[str, Layout], weights: RowSource) -> Fetch:
    """Return what fetches single weights of the checkpoint out of those of ``graph``, each of which stacks some."""
    places: dict[str, tuple[Weight, int, int]] = {}
    for weight in graph.weights.values():
        start = 0
        for source in weight.sources:
            places[source] = weight, start, start + layouts[source].shape[0]
            start = places[source][2]

    def fetch(name: str) -> Packed:
        weight, start, stop = places[name]
        return weights.rows(replace(weight, part="weight"), start, stop)

    return fetch


def _parameter(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _plain(packed: Packed) -> Packed:
    """Return the weight as float32, so that it is multiplied out once and not for every window."""
    return Packed("dense", 0, packed.shape, dequantise(packed))


def rows_of(packed: Packed, rows: torch.Tensor | slice) -> Packed:
    """Return some rows of a weight."""
    scales, zeros = (None if part is None else part[rows] for part in (packed.scales, packed.zeros))
    weight = packed.weight[rows]
    return Packed(packed.format, packed.group, (len(weight), packed.shape[1]), weight, scales, zeros, packed.order)
