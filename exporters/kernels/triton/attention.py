"""Attention over the cache: one row with its keys split, or many rows; dense, or block-sparse where blocks were chosen.

Query heads of one kv head are the rows of a tile, so keys are read once for all of them. Logits, their maximum and sums
are float32; weights are rounded to float16 for the product with the values. int8 keys multiply exactly, their scales
the logits; int8 values are multiplied out in float32 and rounded to float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from arkinfer.config import SparseConfig
from arkinfer.exporters.kernels.triton import layout, tuning
from arkinfer.exporters.kernels.triton.kernel import Argument, Kernel, Variant, ceil_div, power_of_two
from arkinfer.ops.infllm import sparse_attention


@dataclass(frozen=True)
class Attention:
    """q (n, heads, head_dim) against caches of at most ``context`` tokens.

    ``splits`` blocks share the keys of a kv head in decode. ``budget`` > 0: blocks (n, kv_heads, budget) and counts
    (n, kv_heads) say which blocks of ``block`` keys a row reads; count -1 means all. ``block`` is also a tile of keys.
    """

    heads: int
    kv_heads: int
    head_dim: int
    context: int
    scale: float
    kv: str = "float16"
    splits: int = 1
    budget: int = 0
    block: int = 64

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads


def _cache(options: Attention) -> list[Argument]:
    shape = ("c", options.kv_heads, options.head_dim)
    arguments = [Argument("k", options.kv, shape), Argument("v", options.kv, shape)]
    if options.kv == "int8":
        arguments += [Argument(name, "float32", shape[:2]) for name in ("k_scale", "v_scale")]
    return [*arguments, Argument("control", "int32", (16,))]


def _chosen(options: Attention, rows: int | str) -> list[Argument]:
    if not options.budget:
        return []
    return [
        Argument("blocks", "int32", (rows, options.kv_heads, options.budget)),
        Argument("counts", "int32", (rows, options.kv_heads)),
    ]


def _decode_arguments(options: Attention) -> tuple[Argument, ...]:
    parts = (options.kv_heads, options.splits, options.group)
    return (
        Argument("q", "float16", (1, options.heads, options.head_dim)),
        *_cache(options),
        *_chosen(options, 1),
        Argument("partial", "float32", (*parts, options.head_dim), "out"),
        Argument("lse", "float32", parts, "out"),
    )


def _combine_arguments(options: Attention) -> tuple[Argument, ...]:
    parts = (options.kv_heads, options.splits, options.group)
    return (
        Argument("partial", "float32", (*parts, options.head_dim)),
        Argument("lse", "float32", parts),
        Argument("out", "float16", (1, options.heads, options.head_dim), "out"),
    )


def _prefill_arguments(options: Attention) -> tuple[Argument, ...]:
    return (
        Argument("q", "float16", ("n", options.heads, options.head_dim)),
        *_cache(options),
        Argument("out", "float16", ("n", options.heads, options.head_dim), "out"),
        Argument("count", "int32", ("n",), "scalar"),
    )


def _sparse_arguments(options: Attention) -> tuple[Argument, ...]:
    return (
        Argument("q", "float16", ("n", options.heads, options.head_dim)),
        *_cache(options),
        *_chosen(options, "n"),
        Argument("out", "float16", ("n", options.heads, options.head_dim), "out"),
    )


def _constants(options: Attention) -> dict[str, int | float | bool | str]:
    layout.check_cache(options.kv_heads, options.context, options.head_dim)
    return {
        "KV_HEADS": options.kv_heads,
        "GROUP": options.group,
        "DIM": options.head_dim,
        "PADDED_DIM": max(16, power_of_two(options.head_dim)),
        "SCALE": options.scale,
        "INT8": options.kv == "int8",
        "BLOCK": options.block,
    }


def _decode_variant(options: Attention, arch: str) -> Variant:
    constants = _constants(options) | {
        "SPLITS": options.splits,
        "BUDGET": options.budget,
        "GROUP_TILE": max(16, power_of_two(options.group)),
    }
    return Variant(constants, (str(options.kv_heads), str(options.splits), "1"), 4, 2)


def _combine_variant(options: Attention, arch: str) -> Variant:
    constants = _constants(options) | {"SPLITS": options.splits, "SPLITS_TILE": power_of_two(options.splits)}
    return Variant(constants, (str(options.heads), "1", "1"), 4, 1)


def _prefill_variant(options: Attention, arch: str) -> Variant:
    rows, warps = tuning.PREFILL[arch]
    tokens = max(1, rows // power_of_two(options.group))
    constants = _constants(options) | {
        "BUDGET": options.budget,
        "TOKENS": tokens,
        "GROUP_TILE": power_of_two(options.group),
    }
    return Variant(constants, (f"(n + {tokens - 1}) // {tokens}", str(options.kv_heads), "1"), warps, 2)


def _sparse_variant(options: Attention, arch: str) -> Variant:
    constants = _constants(options) | {
        "BUDGET": options.budget,
        "GROUP_TILE": max(16, power_of_two(options.group)),
    }
    return Variant(constants, ("n", str(options.kv_heads), "1"), 4, 2)


def _keys(
    options: Attention, arguments: Mapping[str, torch.Tensor], place: tuple[slice | int | torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cached keys and values at ``place`` (positions, kv heads) as float32, as the kernels see them."""
    k, v = (arguments[name][place].float() for name in ("k", "v"))
    if options.kv == "int8":
        k = k * arguments["k_scale"][place][..., None]
        v = (v * arguments["v_scale"][place][..., None]).half().float()
    return k, v


def _blocks_of_row(options: Attention, arguments: Mapping[str, torch.Tensor], head: int, position: int) -> list[int]:
    """Return the blocks that the one row of decode reads for kv head ``head``, ascending."""
    every = list(range(position // options.block + 1))
    if not options.budget:
        return every
    count = int(arguments["counts"][0, head])
    return every if count < 0 else arguments["blocks"][0, head, :count].tolist()


def _decode_reference(options: Attention, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    position = int(arguments["control"][0])
    q = arguments["q"][0].float().view(options.kv_heads, options.group, options.head_dim)
    arguments["partial"].zero_()
    arguments["lse"].fill_(-torch.inf)
    for head in range(options.kv_heads):
        blocks = _blocks_of_row(options, arguments, head, position)
        each = ceil_div(len(blocks), options.splits)
        for split in range(options.splits):
            mine = blocks[split * each : (split + 1) * each]
            if not mine:
                continue
            ids = torch.tensor(
                [key for block in mine for key in range(block * options.block, (block + 1) * options.block)]
            )
            k, v = _keys(options, arguments, (ids[ids <= position], head))
            logits = q[head] @ k.T * options.scale  # (group, keys)
            arguments["lse"][head, split] = logits.logsumexp(dim=1)
            arguments["partial"][head, split] = logits.softmax(dim=1) @ v


def _combine_reference(options: Attention, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    weights = arguments["lse"].softmax(dim=1)  # (kv_heads, splits, group)
    mixed = (arguments["partial"] * weights[..., None]).sum(dim=1)  # (kv_heads, group, head_dim)
    arguments["out"].copy_(mixed.view(1, options.heads, options.head_dim))


def _prefill_reference(options: Attention, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    start, threshold = (int(value) for value in arguments["control"][:2])
    rows = min(n, max(0, threshold - 1 - start)) if options.budget else n  # the rest are sparse: not this kernel's
    if not rows:
        return
    k, v = (part.transpose(0, 1) for part in _keys(options, arguments, (slice(start + rows),)))
    q = arguments["q"][:rows].float().transpose(0, 1)
    seen = torch.arange(start + rows) <= torch.arange(start, start + rows)[:, None]  # (rows, keys)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=seen, scale=options.scale, enable_gqa=options.group > 1
    )
    arguments["out"][:rows] = mixed[0].transpose(0, 1).half()


def _sparse_reference(options: Attention, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    start = int(arguments["control"][0])
    sparse = arguments["counts"][:, 0] >= 0
    if not bool(sparse.any()):
        return
    if options.kv == "int8":
        k, v = _keys(options, arguments, (slice(start + n),))
    else:  # a long context would take long to convert, and most of it is not read
        k, v = (arguments[name][: start + n] for name in ("k", "v"))
    q = arguments["q"][sparse].float()
    blocks, counts = arguments["blocks"][sparse].long(), arguments["counts"][sparse]
    blocks = torch.where(torch.arange(options.budget) < counts[..., None], blocks, -1)
    config = SparseConfig(block_size=options.block, kernel_size=2 * options.block, kernel_stride=options.block)
    positions = (torch.arange(n) + start)[sparse]
    arguments["out"][sparse] = sparse_attention(q, k, v, blocks, positions, config, options.scale).half()


DECODE = Kernel("attention:decode", Attention, _decode_arguments, _decode_variant, _decode_reference)
COMBINE = Kernel("attention:combine", Attention, _combine_arguments, _combine_variant, _combine_reference)
PREFILL = Kernel("attention:prefill", Attention, _prefill_arguments, _prefill_variant, _prefill_reference)
SPARSE = Kernel("attention:sparse", Attention, _sparse_arguments, _sparse_variant, _sparse_reference)
