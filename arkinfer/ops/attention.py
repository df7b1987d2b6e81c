"""arkinfer::attention: append to the KV cache, then attend, dense or InfLLM-v2 sparse by the row's own position."""

from __future__ import annotations

from typing import NamedTuple

import torch

from arkinfer.config import SparseConfig
from arkinfer.ops import infllm

NEVER = 2**62  # a dense_len that no position reaches: every row is dense
_ROWS = 256  # rows attended at a time by the reference, which bounds its score matrix


class LayerCache(NamedTuple):
    """State of one layer. ``k``, ``v`` (kv_heads, capacity, head_dim) float32, float16 or int8; the scales (kv_heads,
    capacity) float32 belong to int8 caches; ``fine`` and ``coarse`` (kv_heads, kernels, head_dim) hold compressed keys;
    ``nope`` the keys before rotation, where block scores use them. Tensors that a model does not need have size 0.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    fine: torch.Tensor
    coarse: torch.Tensor
    nope: torch.Tensor


def new_cache(kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype, sparse: SparseConfig | None, device: str = "cpu") -> LayerCache:
    """Return an empty cache for ``capacity`` tokens; ``dtype`` float32, float16 or int8."""

    def zeros(entries: int, width: int | None = head_dim, kind: torch.dtype = dtype) -> torch.Tensor:
        shape = (kv_heads, entries) if width is None else (kv_heads, entries, width)
        return torch.zeros(shape, dtype=kind, device=device)

    scales = capacity if dtype == torch.int8 else 0
    real = torch.float16 if dtype == torch.int8 else dtype
    fine = coarse = nope = 0
    if sparse is not None:
        fine = infllm.kernel_count(capacity, sparse.kernel_size, sparse.kernel_stride)
        coarse = infllm.kernel_count(capacity, sparse.coarse_size, sparse.coarse_stride)
        nope = capacity if sparse.use_nope else 0
    return LayerCache(
        zeros(capacity),
        zeros(capacity),
        zeros(scales, None, torch.float32),
        zeros(scales, None, torch.float32),
        zeros(fine, kind=real),
        zeros(coarse, kind=real),
        zeros(nope, kind=real),
    )


def _store(cache: torch.Tensor, scale: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
    """Write ``rows`` (tokens, kv_heads, head_dim) at ``positions``; int8 rows get one scale per token and head."""
    rows = rows.float().transpose(0, 1)  # (kv_heads, tokens, head_dim)
    if cache.dtype == torch.int8:
        extent = rows.abs().amax(dim=-1) / 127.0
        scale[:, positions] = extent
        rows = torch.round(rows / torch.where(extent == 0, 1.0, extent)[..., None]).clamp(-127, 127)
    cache[:, positions] = rows.to(cache.dtype)


def _load(cache: torch.Tensor, scale: torch.Tensor, length: int) -> torch.Tensor:
    """Return the first ``length`` cached rows as float32 (length, kv_heads, head_dim)."""
    rows = cache[:, :length].float()
    if cache.dtype == torch.int8:
        rows = rows * scale[:, :length, None]
    return rows.transpose(0, 1)


def _compress(target: torch.Tensor, keys: torch.Tensor, start: int, size: int, stride: int) -> None:
    """Recompute the kernels that tokens ``start`` and later complete; ``keys`` (length, kv_heads, head_dim)."""
    first = infllm.kernel_count(start, size, stride)
    last = infllm.kernel_count(keys.shape[0], size, stride)
    if last > first:
        window = keys[first * stride : (last - 1) * stride + size]
        target[:, first:last] = infllm.compress_keys(window, size, stride).transpose(0, 1).to(target.dtype)


def _dense(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention by absolute position: q (tokens, heads, d) over keys, values (length, kv_heads, d)."""
    tokens, heads, dim = q.shape
    kv_heads = keys.shape[1]
    grouped = q.float().reshape(tokens, kv_heads, heads // kv_heads, dim)
    results = []
    for start in range(0, tokens, _ROWS):
        rows, where = grouped[start : start + _ROWS], positions[start : start + _ROWS]
        length = int(where.max()) + 1
        scores = torch.einsum("nhgd,khd->nhgk", rows, keys[:length]) * scale
        hidden = torch.arange(length) > where[:, None]
        probability = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(dim=-1)
        results.append(torch.einsum("nhgk,khd->nhgd", probability, values[:length]).reshape(-1, heads, dim))
    return torch.cat(results)


@torch.library.custom_op("arkinfer::attention", mutates_args=("k_cache", "v_cache", "k_scale", "v_scale", "fine", "coarse", "nope"))
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_nope: torch.Tensor | None,
    k_nope: torch.Tensor | None,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    fine: torch.Tensor,
    coarse: torch.Tensor,
    nope: torch.Tensor,
    scale: float,
    dense_len: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    window_size: int,
    topk: int,
    local_rule: str,
    lse: str,
) -> torch.Tensor:
    start, length = int(positions[0]), int(positions[-1]) + 1
    _store(k_cache, k_scale, positions, k)
    _store(v_cache, v_scale, positions, v)
    keys, values = _load(k_cache, k_scale, length), _load(v_cache, v_scale, length)
    has_sparse = fine.shape[0] > 0 and kernel_size > 0
    if has_sparse:
        scored = keys
        if k_nope is not None:
            nope[:, positions] = k_nope.transpose(0, 1).to(nope.dtype)
            scored = nope[:, :length].float().transpose(0, 1)
        _compress(fine, scored, start, kernel_size, kernel_stride)
        _compress(coarse, scored, start, 4 * kernel_size, 4 * kernel_stride)
    sparse_rows = positions + 1 >= dense_len
    result = torch.empty(q.shape, dtype=torch.float32)
    dense_rows = ~sparse_rows
    if bool(dense_rows.any()):
        result[dense_rows] = _dense(q[dense_rows], keys, values, positions[dense_rows], scale)
    if bool(sparse_rows.any()):
        config = SparseConfig(
            kernel_size, kernel_stride, block_size, init_blocks, window_size, topk, k_nope is not None, dense_len, local_rule, lse
        )
        counts = (
            infllm.kernel_count(length, kernel_size, kernel_stride),
            infllm.kernel_count(length, 4 * kernel_size, 4 * kernel_stride),
        )
        compressed = [cache[:, :count].float().transpose(0, 1) for cache, count in zip((fine, coarse), counts, strict=True)]
        query = q if q_nope is None else q_nope
        indices = torch.nonzero(sparse_rows).squeeze(1)
        for part in indices.split(_ROWS):
            scores = infllm.block_scores(query[part], *compressed, positions[part], config)
            blocks = infllm.select_blocks(scores, positions[part], config)
            result[part] = infllm.sparse_attention(q[part], keys, values, blocks, positions[part], config, scale)
    return result.to(q.dtype)


@_attention.register_fake
def _(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(q)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cache: LayerCache | None,
    sparse: SparseConfig | None,
    q_nope: torch.Tensor | None = None,
    k_nope: torch.Tensor | None = None,
) -> torch.Tensor:
    """Append ``k``, ``v`` (tokens, kv_heads, head_dim) to ``cache`` and attend with ``q`` (tokens, heads, head_dim).

    ``positions`` (tokens,) int64 are consecutive and absolute. Row i is sparse iff the model has a sparse_config and
    i + 1 >= dense_len (-1: always). ``q_nope`` and ``k_nope``, unrotated, score blocks if sparse_config.use_nope.
    Without a cache the rows attend each other densely, batch dimensions may precede, and gradients flow.
    Result: (tokens, heads, head_dim) in q's dtype.
    """
    scale = q.shape[-1] ** -0.5
    if cache is None:
        heads_first = [tensor.transpose(-3, -2) for tensor in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=q.shape[-2] != k.shape[-2])
        return out.transpose(-3, -2)
    dense_len = NEVER if sparse is None else max(sparse.dense_len, 0)
    s = sparse or SparseConfig(kernel_size=0, kernel_stride=0)
    nope = (q_nope, k_nope) if sparse is not None and sparse.use_nope else (None, None)
    result: torch.Tensor = torch.ops.arkinfer.attention(
        q, k, v, *nope, positions, *cache, scale, dense_len,
        s.kernel_size, s.kernel_stride, s.block_size, s.init_blocks, s.window_size, s.topk, s.local_rule, s.lse,
    )  # fmt: skip
    return result


def cost(
    tokens: int, length: int, heads: int, kv_heads: int, head_dim: int, kv_bytes: int, sparse: SparseConfig | None
) -> tuple[int, int]:
    """Return (cache bytes read, operations) of ``tokens`` rows that end at ``length``, each in the gear of its position."""
    if sparse is None or length < max(sparse.dense_len, 0):
        return 2 * length * kv_heads * head_dim * kv_bytes, 4 * tokens * length * heads * head_dim
    visible = min(length, sparse.budget * sparse.block_size)
    kernels = infllm.kernel_count(length, sparse.kernel_size, sparse.kernel_stride)
    kernels += 0 if sparse.lse == "exact" else infllm.kernel_count(length, sparse.coarse_size, sparse.coarse_stride)
    read = (2 * visible + kernels) * kv_heads * head_dim * kv_bytes
    return read, (4 * visible + 2 * kernels) * tokens * heads * head_dim
