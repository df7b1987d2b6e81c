"""InfLLM-v2 block-sparse attention in plain torch: the definition that every backend is compared with.

Source: InfLLM-V2 (arXiv 2509.24663) and MiniCPM4 (arXiv 2506.07900, section 2.2). Four steps: keys are mean-pooled into
overlapping *kernels*; each query scores the kernels that it may see; scores are max-pooled to *blocks* and the best are
taken together with the first and the nearest ones; the query attends to the tokens of these blocks alone. Everything
is decided per row from its absolute position, so results do not depend on how the tokens were fed.

Tensors are tokens first: q (tokens, heads, head_dim), keys (tokens, kv_heads, head_dim); query head h reads kv head
h // (heads / kv_heads).
"""

from __future__ import annotations

import math

import torch

from arkinfer.config import SparseConfig

# Rows per tile: neighbours share most of their blocks, so a tile gathers each key once and masks row by row.
_TILE = 128
_INIT_CHUNK = 4096  # kernels pooled at once, which bounds the gathered copy


def kernel_count(length: int, kernel_size: int, kernel_stride: int) -> int:
    """Return how many complete kernels ``length`` keys hold."""
    return 0 if length < kernel_size else (length - kernel_size) // kernel_stride + 1


def visible_kernels(positions: torch.Tensor, kernel_size: int, kernel_stride: int) -> torch.Tensor:
    """Return for each row how many kernels end at or before its position: kernel j iff stride * j + size - 1 <= i."""
    return torch.clamp((positions - (kernel_size - kernel_stride - 1)).div(kernel_stride, rounding_mode="floor"), min=0)


def compress_keys(k: torch.Tensor, kernel_size: int, kernel_stride: int) -> torch.Tensor:
    """Return the mean of every complete kernel of ``k`` (tokens, kv_heads, head_dim): (kernels, kv_heads, head_dim).

    Kernel j covers tokens [stride * j, stride * j + size). The mean is taken in float32 and returned in the dtype of k.
    """
    count = kernel_count(k.shape[0], kernel_size, kernel_stride)
    pieces = []
    for first in range(0, count, _INIT_CHUNK):
        starts = torch.arange(first, min(first + _INIT_CHUNK, count), device=k.device) * kernel_stride
        windows = k[starts[:, None] + torch.arange(kernel_size, device=k.device)]  # (kernels, size, kv_heads, head_dim)
        pieces.append((windows.float().sum(dim=1) / kernel_size).to(k.dtype))
    return torch.cat(pieces) if pieces else k[:0]


def block_scores(
    q: torch.Tensor,
    fine: torch.Tensor,
    coarse: torch.Tensor,
    positions: torch.Tensor,
    config: SparseConfig,
    scale: float | None = None,
) -> torch.Tensor:
    """Return every block's score for every row, (tokens, kv_heads, blocks) float32; blocks reach the last position.

    q (tokens, heads, head_dim); fine (kernels, kv_heads, head_dim) from compress_keys(k, kernel_size, kernel_stride);
    coarse likewise from (coarse_size, coarse_stride), unused when config.lse is "exact"; positions (tokens,) absolute;
    ``scale`` defaults to 1 / sqrt(head_dim). Scores are >= 0 and finite: the sum over the group's heads of
    exp(q.k * scale - LSE), max-pooled over the kernels that touch the block. A row that sees no kernel (or, with the
    coarse LSE, no coarse kernel) scores 0 everywhere. Forced and future blocks are select_blocks' affair.
    """
    kv_heads = fine.shape[1]
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    blocks = 0 if len(positions) == 0 else int(positions.max()) // config.block_size + 1
    pieces = []
    for first in range(0, q.shape[0], _TILE):
        rows = slice(first, first + _TILE)
        grouped = (
            q[rows].float().view(-1, kv_heads, q.shape[1] // kv_heads, q.shape[2]).transpose(0, 1)
        )  # (kv_heads, rows, group, head_dim)
        kernels = _kernel_scores(grouped * scale, fine, coarse, positions[rows], config)  # (kv_heads, rows, kernels)
        pieces.append(_pool(kernels, blocks, config).transpose(0, 1))
    return torch.cat(pieces) if pieces else q.new_zeros((0, kv_heads, blocks), dtype=torch.float32)


def _logits(q: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return q . keys (kv_heads, rows, group, kernels), -inf beyond the first visible[row] kernels."""
    count = min(keys.shape[0], int(visible.max()))  # future kernels cost nothing
    logits = torch.einsum("hrgd,jhd->hrgj", q, keys[:count].float())
    hidden = torch.arange(count, device=q.device) >= visible[:, None]  # (rows, kernels)
    return logits.masked_fill_(hidden[None, :, None], -math.inf)


def _kernel_scores(
    q: torch.Tensor, fine: torch.Tensor, coarse: torch.Tensor, positions: torch.Tensor, config: SparseConfig
) -> torch.Tensor:
    logits = _logits(q, fine, visible_kernels(positions, config.kernel_size, config.kernel_stride))
    if config.lse == "exact":
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    else:
        lse = torch.logsumexp(
            _logits(q, coarse, visible_kernels(positions, config.coarse_size, config.coarse_stride)),
            dim=-1,
            keepdim=True,
        )
    # exp(-inf - -inf) is NaN and exp(x - -inf) is inf; the CUDA kernel answers 0 for such rows, and so does this.
    weights = torch.exp(logits - lse).masked_fill_(lse == -math.inf, 0.0)
    # The coarse LSE does not bound the logits, so the exponential may overflow; inf is reserved for forced blocks.
    return weights.sum(dim=2).clamp_(max=torch.finfo(torch.float32).max)


def _pool(kernels: torch.Tensor, blocks: int, config: SparseConfig) -> torch.Tensor:
    """Max-pool (kv_heads, rows, kernels) to (.., blocks): s = block / stride, block b takes [s * b - 1, s * b + s)."""
    stride = config.block_size // config.kernel_stride
    # Scores are >= 0, so zeros pad both ends as -inf would, and blocks without any kernel score 0.
    missing = stride * blocks - kernels.shape[-1]
    padded = (
        torch.nn.functional.pad(kernels, (1, missing))
        if missing >= 0
        else torch.nn.functional.pad(kernels[..., : stride * blocks], (1, 0))
    )
    return torch.nn.functional.max_pool1d(padded, stride + 1, stride)


def select_blocks(scores: torch.Tensor, positions: torch.Tensor, config: SparseConfig) -> torch.Tensor:
    """Return the chosen block ids (tokens, kv_heads, budget) int64, ascending, unused places -1 at the end.

    scores (tokens, kv_heads, blocks) from block_scores; positions (tokens,). The first init_blocks and the local blocks
    win over every score, blocks after the row's own are never taken, and of equal scores the lower id is taken first.
    """
    blocks = scores.shape[2]
    ids = torch.arange(blocks, device=scores.device)
    own = positions.div(config.block_size, rounding_mode="floor")[:, None]  # (tokens, 1)
    nearest = own - config.local_blocks + (1 if config.local_rule == "exclusive" else 0)
    forced = (ids < config.init_blocks) | (ids >= nearest)  # (tokens, blocks)
    # A float's bits order like the integer once negative ones are flipped; below them the id breaks ties, so that
    # topk, which promises no order among equals, has no equals to order.
    bits = (scores.float().masked_fill(forced[:, None], math.inf) + 0.0).contiguous().view(torch.int32).long()
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 31) - ids
    keys = keys.masked_fill((ids > own)[:, None], torch.iinfo(torch.int64).min)
    best, chosen = keys.topk(min(config.budget, blocks), dim=2)
    chosen = chosen.masked_fill(best == torch.iinfo(torch.int64).min, blocks).sort(dim=2).values
    chosen = torch.where(chosen == blocks, -1, chosen)
    return torch.nn.functional.pad(chosen, (0, config.budget - chosen.shape[2]), value=-1)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    positions: torch.Tensor,
    config: SparseConfig,
    scale: float | None = None,
) -> torch.Tensor:
    """Attend each row to the tokens of its blocks up to its own position; (tokens, heads, head_dim) in the dtype of q.

    q (tokens, heads, head_dim); k, v (keys, kv_heads, head_dim) from position 0 on; blocks (tokens, kv_heads, any) ids,
    -1 for none; positions (tokens,). ``scale`` defaults to 1 / sqrt(head_dim). Differentiable in q, k and v.
    """
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    pieces = [
        _attend_tile(q[rows], k, v, blocks[rows], positions[rows], config.block_size, scale)
        for rows in (slice(first, first + _TILE) for first in range(0, q.shape[0], _TILE))
    ]
    return torch.cat(pieces) if pieces else torch.empty_like(q)


def _attend_tile(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    positions: torch.Tensor,
    block_size: int,
    scale: float,
) -> torch.Tensor:
    rows, heads, head_dim = q.shape
    group = heads // k.shape[1]
    count = int(positions.max()) // block_size + 1
    outputs = []
    for head in range(k.shape[1]):
        wanted = torch.where(blocks[:, head] < 0, count, blocks[:, head])  # column `count` collects the unused places
        member = torch.zeros(rows, count + 1, dtype=torch.bool, device=q.device).scatter_(1, wanted, True)
        union = member[:, :count].any(dim=0).nonzero().flatten()  # blocks that any row of the tile wants
        tokens = (union[:, None] * block_size + torch.arange(block_size, device=q.device)).flatten()
        tokens = tokens[tokens < k.shape[0]]
        allowed = member[:, tokens // block_size] & (tokens <= positions[:, None])  # (rows, tokens)
        queries = q[:, head * group : (head + 1) * group].float().reshape(rows * group, head_dim)
        logits = (queries @ k[tokens, head].float().T * scale).view(rows, group, -1)  # (rows, group, tokens)
        weights = logits.masked_fill(~allowed[:, None], -math.inf).softmax(dim=-1)
        outputs.append((weights.flatten(0, 1) @ v[tokens, head].float()).view(rows, group, -1))
    return torch.cat(outputs, dim=1).to(q.dtype)


def cost(
    tokens: int, length: int, heads: int, kv_heads: int, head_dim: int, config: SparseConfig, itemsize: float = 4
) -> tuple[int, int]:
    """Return (bytes, flops) of the last ``tokens`` rows of a context of ``length``; ``itemsize`` is the cache's."""
    fine = kernel_count(length, config.kernel_size, config.kernel_stride)
    coarse = kernel_count(length, config.coarse_size, config.coarse_stride) if config.lse == "coarse" else 0
    attended = min(length, config.budget * config.block_size)
    # Rows of one call share the keys that they read; each row may choose different blocks, up to all of them.
    read = min(length, attended * tokens)
    moved = (fine + coarse + 2 * read) * kv_heads * head_dim * itemsize
    return int(moved), tokens * heads * head_dim * (2 * (fine + coarse) + 4 * attended)
