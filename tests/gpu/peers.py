"""What torch reaches at the same shapes on the same GPU: SDPA, torch.compile and a CUDA graph, in fp16 and in its int4.

The layers are written for torch: one compiled function a layer, static caches of exactly the length that is attended
to, the whole step in one graph. int4 is torch's weight-only kernel (``_weight_int4pack_mm``, groups of 128, bfloat16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from arkinfer.config import ModelConfig
from tests.gpu import clock
from tests.gpu.shapes import SHAPES

Row = dict[str, Any]
Stored = tuple[torch.Tensor, ...]  # a float16 weight, or int4's packed codes and scales
GROUP = 128
ROWS = 8192  # tokens of a prompt that go through the wide layers at once


@dataclass(frozen=True)
class Layer:
    """The weights of one layer."""

    qkv: Stored
    out: Stored
    gate_up: Stored
    down: Stored


def dense(rows: int, width: int) -> Stored:
    return ((torch.randn(rows, width, device=clock.device()) * 0.02).half(),)


def int4(rows: int, width: int) -> Stored:
    codes = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, device="cuda")
    scales = torch.rand(width // GROUP, rows, 2, device="cuda").mul_(0.01).bfloat16()
    return torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales


def linear(x: torch.Tensor, stored: Stored) -> torch.Tensor:
    if len(stored) == 1:
        return functional.linear(x, stored[0])
    packed, scales = stored
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x.reshape(-1, x.shape[-1]), packed, GROUP, scales)
    return product.view(*x.shape[:-1], scales.shape[1])


class Model:
    """A decoder of ``shape`` with random weights, in ``weights`` "fp16" or "int4"."""

    def __init__(self, shape: str, weights: str) -> None:
        self.config = config = ModelConfig.from_json(SHAPES[shape])
        make = dense if weights == "fp16" else int4
        self.dtype = torch.float16 if weights == "fp16" else torch.bfloat16
        query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        self.layers = [
            Layer(make(query + 2 * key, hidden), make(hidden, query), make(2 * inner, hidden), make(hidden, inner))
            for _ in range(config.layers)
        ]
        table = (torch.randn(config.vocab_size, hidden, device=clock.device()) * 0.02).to(self.dtype)
        self.table, self.norm = table, torch.ones(hidden, device=clock.device(), dtype=self.dtype)
        # Without a GPU there is no compiler to rely on: the same functions, not compiled.
        self.block = torch.compile(self._block, dynamic=False) if clock.device() == "cuda" else self._block

    def _heads(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _block(
        self,
        layer: Layer,
        x: torch.Tensor,  # (1, n, hidden)
        cos: torch.Tensor,  # (n, head_dim / 2)
        sin: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor] | None,  # (1, kv_heads, keys, head_dim), the last one to be written
    ) -> torch.Tensor:
        config = self.config
        sizes = [config.heads, config.kv_heads, config.kv_heads]
        normed = functional.rms_norm(x, x.shape[-1:], self.norm)
        parts = linear(normed, layer.qkv).unflatten(-1, (-1, config.head_dim)).transpose(1, 2).split(sizes, dim=1)
        q, k, v = self._heads(parts[0], cos, sin), self._heads(parts[1], cos, sin), parts[2]
        if cache is not None:
            cache[0][:, :, -1:], cache[1][:, :, -1:] = k, v
            k, v = cache
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        x = x + linear(mixed.transpose(1, 2).flatten(2), layer.out)
        pieces = []
        for piece in x.split(ROWS, dim=1):
            gate, up = linear(functional.rms_norm(piece, x.shape[-1:], self.norm), layer.gate_up).chunk(2, dim=-1)
            pieces.append(piece + linear(functional.silu(gate) * up, layer.down))
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def _turns(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.config.head_dim // 2
        angles = positions[:, None] * 10000.0 ** (-torch.arange(half, device=positions.device) / half)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        normed = functional.rms_norm(x[:, -1], x.shape[-1:], self.norm)
        return functional.linear(normed, self.table).argmax(dim=-1, keepdim=True)

    def decode(self, depth: int) -> float:
        """Return the seconds of one token after ``depth``."""
        config, place = self.config, clock.device()
        shape = (1, config.kv_heads, depth + 1, config.head_dim)
        caches = [tuple(torch.randn(shape, device=place, dtype=self.dtype) for _ in "kv") for _ in self.layers]
        token = torch.zeros(1, 1, dtype=torch.int64, device=place)
        cos, sin = self._turns(torch.tensor([depth], device=place))

        def step(_: int) -> None:
            x = self.table[token]
            for layer, (k, v) in zip(self.layers, caches, strict=True):
                x = self.block(layer, x, cos, sin, (k, v))
            token.copy_(self._head(x))

        return clock.by_torch(step, launches=1, repeats=20)

    def prefill(self, length: int) -> float:
        """Return the seconds of a prompt of ``length`` tokens, read at once."""
        place = clock.device()
        tokens = torch.randint(0, self.config.vocab_size, (1, length), device=place)
        cos, sin = self._turns(torch.arange(length, device=place))

        def read(_: int) -> None:
            x = self.table[tokens]
            for layer in self.layers:
                x = self.block(layer, x, cos, sin, None)
            self._head(x)

        return clock.by_torch(read, launches=1, repeats=3 if length <= 8192 else 1, graph=False)


def rows(shape: str, weights: str, depths: Sequence[int], lengths: Sequence[int]) -> Iterator[Row]:
    """Yield decode and prefill rows; where torch fails (memory, a kernel that is not there), the row says how."""
    torch._dynamo.config.cache_size_limit = 64  # one compiled function for every layer and length
    named = {"peer": True, "shape": shape, "weights": weights, "by": f"torch {torch.__version__}"}
    if weights == "int4" and clock.device() == "cpu":
        yield {**named, "skipped": "torch's int4 kernel for GPUs needs one"}
        return
    with torch.inference_mode():
        model = Model(shape, weights)
        for what, sizes, key in (("decode", depths, "depth"), ("prefill", lengths, "length")):
            for size in sizes:
                row = {**named, "what": what, key: size}
                try:
                    seconds = model.decode(size) if what == "decode" else model.prefill(size)
                except Exception as error:
                    yield {**row, "failure": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
                else:
                    yield {**row, "seconds": seconds, "tok_s": (1 if what == "decode" else size) / seconds}
