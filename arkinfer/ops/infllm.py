"""InfLLM-v2 block-sparse attention: the torch reference (arXiv 2509.24663; MiniCPM4 report, section 2).

Tensors are (tokens, heads, head_dim) and positions are absolute. A row's result depends on its own position and on the
keys before it, never on how tokens were split into calls.
"""

from __future__ import annotations

import torch

from arkinfer.config import SparseConfig

# exp() of the difference between a score and the coarse normaliser can pass float32's range, because the coarse keys
# average four times as many tokens; every backend caps the exponent here, far above any score that matters.
EXPONENT_LIMIT = 80.0


def kernel_count(length: int, size: int, stride: int) -> int:
    """Return how many windows of ``size`` tokens, ``stride`` apart, lie completely within ``length`` tokens."""
    return (length - size) // stride + 1 if length >= size else 0


def compress_keys(k: torch.Tensor, kernel_size: int, kernel_stride: int) -> torch.Tensor:
    """Return the mean key of every complete window: k (tokens, kv_heads, head_dim) -> float32 (kernels, kv_heads, head_dim)."""
    count = kernel_count(k.shape[0], kernel_size, kernel_stride)
    if count == 0:
        return torch.zeros(0, *k.shape[1:])
    windows = k.float().unfold(0, kernel_size, kernel_stride)  # (kernels, kv_heads, head_dim, kernel_size)
    return windows.mean(dim=-1)


def visible_kernels(positions: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """Return for each position i how many windows end at or before i: those with stride * j + size - 1 <= i."""
    return torch.clamp((positions + 1 - size) // stride + 1, min=0)


def block_scores(
    q: torch.Tensor, fine: torch.Tensor, coarse: torch.Tensor, positions: torch.Tensor, config: SparseConfig
) -> torch.Tensor:
    """Return the relevance of every key block to every row, float32 (tokens, kv_heads, blocks).

    q (tokens, heads, head_dim); fine and coarse compressed keys (kernels, kv_heads, head_dim); positions (tokens,).
    Per head: exp(score - LSE) over the visible fine keys, LSE over the coarse keys (or the fine ones: config.lse);
    summed over the heads of a group, then the maximum over the windows that touch a block. A row that sees no key to
    normalise by scores 0 everywhere; blocks = ceil((last position + 1) / block_size).
    """
    tokens, heads, dim = q.shape
    kv_heads = fine.shape[1]
    grouped = q.float().reshape(tokens, kv_heads, heads // kv_heads, dim)
    blocks = (int(positions.max()) + config.block_size) // config.block_size

    def scores(keys: torch.Tensor, size: int, stride: int) -> torch.Tensor:
        raw = torch.einsum("nhgd,khd->nhgk", grouped, keys.float()) * dim**-0.5
        seen = torch.arange(keys.shape[0]) < visible_kernels(positions, size, stride)[:, None]  # (tokens, kernels)
        return raw.masked_fill(~seen[:, None, None], -torch.inf)

    local = scores(fine, config.kernel_size, config.kernel_stride)
    normaliser = local if config.lse == "exact" else scores(coarse, config.coarse_size, config.coarse_stride)
    lse = torch.logsumexp(normaliser, dim=-1, keepdim=True) if normaliser.shape[-1] else torch.full((*local.shape[:-1], 1), -torch.inf)
    weight = torch.exp((local - lse).clamp(max=EXPONENT_LIMIT))
    weight = torch.where(torch.isfinite(lse) & torch.isfinite(local), weight, 0.0).sum(dim=2)  # (tokens, kv_heads, kernels)
    # Max pooling as the released code does it: stride block/stride, one more than that wide, one to the left. For the
    # usual kernel of twice the stride these are exactly the windows that share a token with the block.
    ratio = config.block_size // config.kernel_stride
    padded = torch.nn.functional.pad(weight, (1, max(0, blocks * ratio - weight.shape[-1])))
    return padded.unfold(-1, ratio + 1, ratio)[..., :blocks, :].amax(dim=-1)


def select_blocks(scores: torch.Tensor, positions: torch.Tensor, config: SparseConfig) -> torch.Tensor:
    """Return the blocks that each row attends: int64 (tokens, kv_heads, budget), ascending, unused entries -1 at the end.

    Initial and local blocks are always taken, blocks after the row's own never; equal scores go to the lower block.
    """
    tokens, kv_heads, blocks = scores.shape
    index = torch.arange(blocks)
    own = (positions // config.block_size)[:, None]  # (tokens, 1)
    first_local = own - config.local_blocks + (0 if config.local_rule == "inclusive" else 1)
    forced = (index < config.init_blocks) | ((index >= first_local) & (index <= own))
    ranked = scores.masked_fill(forced[:, None], torch.inf).masked_fill((index > own)[:, None], -torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., : config.budget]
    order = torch.where(order <= own[:, None], order, blocks)
    order = order.sort(dim=-1).values
    order = torch.where(order < blocks, order, -1)
    return torch.nn.functional.pad(order, (0, config.budget - order.shape[-1]), value=-1)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    positions: torch.Tensor,
    config: SparseConfig,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention over the tokens of the chosen blocks, causal; returns float32 (tokens, heads, head_dim).

    q (tokens, heads, head_dim); k, v (keys, kv_heads, head_dim); blocks (tokens, kv_heads, budget) from select_blocks.
    """
    tokens, heads, dim = q.shape
    keys, kv_heads, _ = k.shape
    scale = dim**-0.5 if scale is None else scale
    widest = int((blocks >= 0).sum(dim=-1).max())
    tables = k.float().transpose(0, 1), v.float().transpose(0, 1)  # (kv_heads, keys, head_dim)
    offsets = torch.arange(config.block_size)
    results = []
    step = max(1, (1 << 24) // (kv_heads * widest * config.block_size * dim))
    for start in range(0, tokens, step):
        chosen = blocks[start : start + step, :, :widest]
        index = (chosen[..., None] * config.block_size + offsets).flatten(2)  # (rows, kv_heads, widest * block_size)
        hidden = (index < 0) | (index > positions[start : start + step, None, None])
        index = index.clamp(0, keys - 1)
        head = torch.arange(kv_heads)[None, :, None]
        picked_k, picked_v = tables[0][head, index], tables[1][head, index]  # (rows, kv_heads, keys, head_dim)
        grouped = q[start : start + step].float().reshape(-1, kv_heads, heads // kv_heads, dim)
        scores = (grouped @ picked_k.transpose(-1, -2)) * scale
        probability = scores.masked_fill(hidden[:, :, None], -torch.inf).softmax(dim=-1)
        results.append((probability @ picked_v).reshape(-1, heads, dim))
    return torch.cat(results)
