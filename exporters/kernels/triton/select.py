"""Which blocks of the context a sparse row reads (InfLLM-v2): three kernels that follow arkinfer.ops.infllm.

`select_lse` gives the normaliser of each query head, in parts; `select_scores` the score of every fine kernel, kept as
two numbers a block; `select_blocks` the best blocks. Rows that are dense (position + i + 1 < control[1]) are left alone
by the first two, and get the count -1 from the third.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from arkinfer.config import SparseConfig
from arkinfer.exporters.kernels.triton import layout
from arkinfer.exporters.kernels.triton.kernel import Argument, Extent, Kernel, Variant, ceil_div, power_of_two
from arkinfer.ops.infllm import select_blocks, visible_kernels

KEYS = 64  # compressed keys of a tile of select_lse
BLOCKS, FINE = 32, 128  # most blocks, and fine keys, of a tile of select_scores: more keys spill registers
_TILE_ROWS = 64  # query heads of a tile
_REFERENCE_ROWS = 64  # rows at once, which bounds the memory of the references
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Select:
    """SparseConfig's fields, the shape of the heads, and ``splits``: blocks that share the normaliser's keys."""

    heads: int
    kv_heads: int
    head_dim: int
    context: int
    scale: float
    block_size: int
    kernel_size: int
    kernel_stride: int
    init_blocks: int
    local_blocks: int
    budget: int
    local_rule: str = "inclusive"
    lse: str = "coarse"
    splits: int = 1

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def blocks(self) -> int:
        """Blocks that a full cache holds."""
        return ceil_div(self.context, self.block_size)

    @property
    def normaliser(self) -> tuple[int, int]:
        """Size and stride of the kernels under the LSE."""
        factor = 1 if self.lse == "exact" else 4
        return factor * self.kernel_size, factor * self.kernel_stride


def _queries(options: Select) -> Argument:
    return Argument("q", "float16", ("n", options.heads, options.head_dim))


def _compressed(options: Select, stride: int) -> tuple[Extent, ...]:
    return layout.compressed_rows(stride), options.kv_heads, options.head_dim


def _lse_arguments(options: Select) -> tuple[Argument, ...]:
    return (
        _queries(options),
        Argument("keys", "float16", _compressed(options, options.normaliser[1])),
        Argument("control", "int32", (16,)),
        Argument("lse", "float32", ("n", options.heads, options.splits), "out"),
        Argument("count", "int32", ("n",), "scalar"),
    )


def _scores_arguments(options: Select) -> tuple[Argument, ...]:
    return (
        _queries(options),
        Argument("fine", "float16", _compressed(options, options.kernel_stride)),
        Argument("control", "int32", (16,)),
        Argument("lse", "float32", ("n", options.heads, options.splits)),
        Argument("scores", "float32", ("n", options.kv_heads, 2, options.blocks), "out"),
        Argument("count", "int32", ("n",), "scalar"),
    )


def _blocks_arguments(options: Select) -> tuple[Argument, ...]:
    return (
        Argument("scores", "float32", ("n", options.kv_heads, 2, options.blocks)),
        Argument("control", "int32", (16,)),
        Argument("blocks", "int32", ("n", options.kv_heads, options.budget), "out"),
        Argument("counts", "int32", ("n", options.kv_heads), "out"),
    )


def _constants(options: Select) -> dict[str, int | float | bool | str]:
    return {
        "KV_HEADS": options.kv_heads,
        "GROUP": options.group,
        "GROUP_TILE": power_of_two(options.group),
        "TOKENS": max(1, _TILE_ROWS // power_of_two(options.group)),
        "DIM": options.head_dim,
        "PADDED_DIM": max(16, power_of_two(options.head_dim)),
        "SCALE": options.scale,
        "SPLITS": options.splits,
    }


def _lse_variant(options: Select, arch: str) -> Variant:
    size, stride = options.normaliser
    constants = _constants(options) | {"SIZE": size, "STRIDE": stride, "KEYS": KEYS}
    tokens = constants["TOKENS"]
    return Variant(constants, (f"(n + {tokens} - 1) // {tokens}", str(options.kv_heads), str(options.splits)), 4, 2)


def _scores_variant(options: Select, arch: str) -> Variant:
    per = options.block_size // options.kernel_stride
    blocks = max(1, min(BLOCKS, FINE // per))
    constants = _constants(options) | {
        "SIZE": options.kernel_size,
        "STRIDE": options.kernel_stride,
        "BLOCK": options.block_size,
        "HELD": options.blocks,
        "BLOCKS": blocks,
        "PER": per,
        "SPLITS_TILE": power_of_two(options.splits),
    }
    tokens = constants["TOKENS"]
    grid = (f"(n + {tokens} - 1) // {tokens}", str(options.kv_heads), str(ceil_div(options.blocks, blocks)))
    return Variant(constants, grid, 4, 1)


def _blocks_variant(options: Select, arch: str) -> Variant:
    tile = power_of_two(options.blocks)
    constants: dict[str, int | float | bool | str] = {
        "KV_HEADS": options.kv_heads,
        "BLOCK": options.block_size,
        "HELD": options.blocks,
        "TILE": tile,
        "INIT": options.init_blocks,
        "NEAR": options.local_blocks - (1 if options.local_rule == "exclusive" else 0),
        "BUDGET": options.budget,
        "BUDGET_TILE": power_of_two(options.budget),
    }
    return Variant(constants, ("n", str(options.kv_heads), "1"), max(1, min(16, tile // 256)), 1)


def _sparse_rows(arguments: Mapping[str, torch.Tensor], n: int) -> tuple[int, int]:
    """Return the first sparse row of the step, and its position."""
    start, threshold = (int(value) for value in arguments["control"][:2])
    first = min(n, max(0, threshold - 1 - start))
    return first, start + first


def _logits(options: Select, q: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return (rows, kv_heads, group, keys) of q (rows, heads, head_dim), -inf beyond the ``visible`` keys of a row."""
    count = int(visible.max())
    grouped = q.float().view(-1, options.kv_heads, options.group, options.head_dim).transpose(0, 1)
    products = grouped.flatten(1, 2) @ keys[:count].float().permute(1, 2, 0) * options.scale
    logits = products.view(options.kv_heads, q.shape[0], options.group, count).transpose(0, 1)
    return logits.masked_fill_((torch.arange(count) >= visible[:, None])[:, None, None], -math.inf)


def _tiles(arguments: Mapping[str, torch.Tensor], n: int) -> list[tuple[slice, torch.Tensor]]:
    """Return the sparse rows, some at a time, each with its position."""
    first, position = _sparse_rows(arguments, n)
    rows = [slice(begin, min(begin + _REFERENCE_ROWS, n)) for begin in range(first, n, _REFERENCE_ROWS)]
    return [(part, torch.arange(part.start, part.stop) - first + position) for part in rows]


def _lse_reference(options: Select, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    size, stride = options.normaliser
    total = int(visible_kernels(arguments["control"][:1] + n - 1, size, stride))
    each = ceil_div(ceil_div(total, KEYS), options.splits) * KEYS
    for rows, positions in _tiles(arguments, n):
        visible = visible_kernels(positions, size, stride)
        logits = _logits(options, arguments["q"][rows], arguments["keys"], visible)
        arguments["lse"][rows] = -math.inf
        for split in range(options.splits):
            part = logits[..., split * each : (split + 1) * each]
            if part.shape[-1]:
                arguments["lse"][rows, :, split] = part.logsumexp(dim=-1).flatten(1).to(torch.float32)


def _scores_reference(options: Select, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    per = options.block_size // options.kernel_stride
    for rows, positions in _tiles(arguments, n):
        visible = visible_kernels(positions, options.kernel_size, options.kernel_stride)
        logits = _logits(options, arguments["q"][rows], arguments["fine"], visible)
        lse = arguments["lse"][rows].float().logsumexp(dim=-1).view(*logits.shape[:3], 1)
        weights = torch.exp(logits - lse).masked_fill_(lse == -math.inf, 0.0)
        kernels = weights.sum(dim=2).clamp_(max=LARGEST)  # (rows, kv_heads, kernels)
        seen = int(positions.max()) // options.block_size + 1
        padded = torch.nn.functional.pad(kernels, (0, seen * per - kernels.shape[2]))
        padded = padded.view(*kernels.shape[:2], seen, per)
        both = torch.stack((padded.amax(dim=3), padded[..., -1]), dim=2)  # (rows, kv_heads, 2, blocks)
        hidden = torch.arange(seen) * options.block_size > positions[:, None]
        target = arguments["scores"][rows, :, :, :seen]
        target.copy_(torch.where(hidden[:, None, None], target.to(both.dtype), both))


def _blocks_reference(options: Select, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    first, position = _sparse_rows(arguments, n)
    arguments["counts"][:first] = -1
    if first == n:
        return
    positions = torch.arange(n - first) + position
    seen = int(positions[-1]) // options.block_size + 1
    own, last = arguments["scores"][first:, :, :, :seen].unbind(dim=2)
    pooled = torch.maximum(own, torch.nn.functional.pad(last[..., :-1], (1, 0)))
    config = SparseConfig(
        kernel_size=options.kernel_size,
        kernel_stride=options.kernel_stride,
        block_size=options.block_size,
        init_blocks=options.init_blocks,
        window_size=options.local_blocks * options.block_size,
        topk=options.budget - options.local_blocks,
        local_rule=options.local_rule,
    )
    chosen = select_blocks(pooled, positions, config)
    arguments["blocks"][first:] = chosen.int()
    arguments["counts"][first:] = (chosen >= 0).sum(dim=2).int()


LSE = Kernel("select:lse", Select, _lse_arguments, _lse_variant, _lse_reference)
SCORES = Kernel("select:scores", Select, _scores_arguments, _scores_variant, _scores_reference)
BLOCKS_OF_ROWS = Kernel("select:blocks", Select, _blocks_arguments, _blocks_variant, _blocks_reference)
