"""Attention over the KV cache: appends the new keys and values, then dense or InfLLM-v2 sparse, row by row.

Row i (its absolute position) is sparse iff sparse attention is on and i + 1 >= dense_len. Deciding by position, not by
the length of a call, gives the same answer however the tokens are chunked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from arkinfer.config import ModelConfig, SparseConfig
from arkinfer.ops import differentiates, infllm


class LayerCache(NamedTuple):
    """The state of one layer, written in place; position p of the sequence lies at index p.

    k, v (kv_heads, capacity, head_dim) in the cache dtype: float32, float16, bfloat16 or int8. fine, coarse (kv_heads,
    kernels, head_dim): compressed keys; nope (kv_heads, capacity, head_dim): keys before rope, for use_nope alone.
    These three are empty (size 0) where unused, and float16 when the cache is int8. k_scale, v_scale (kv_heads,
    capacity) float32 belong to int8 caches: scale = max|row| / 127, value = code * scale.
    """

    k: torch.Tensor
    v: torch.Tensor
    fine: torch.Tensor
    coarse: torch.Tensor
    nope: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


def new_caches(
    config: ModelConfig, capacity: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> list[LayerCache]:
    """Return empty caches for ``capacity`` tokens, one a layer."""
    sparse = config.sparse
    floating = torch.float16 if dtype == torch.int8 else dtype

    def zeros(length: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(config.kv_heads, length, config.head_dim, dtype=kind, device=device)

    def scales() -> torch.Tensor | None:
        return torch.zeros(config.kv_heads, capacity, device=device) if dtype == torch.int8 else None

    fine = coarse = nope = 0
    if sparse is not None:
        fine = infllm.kernel_count(capacity, sparse.kernel_size, sparse.kernel_stride)
        coarse = infllm.kernel_count(capacity, sparse.coarse_size, sparse.coarse_stride)
        nope = capacity if sparse.use_nope else 0
    return [
        LayerCache(
            zeros(capacity),
            zeros(capacity),
            zeros(fine, floating),
            zeros(coarse, floating),
            zeros(nope, floating),
            scales(),
            scales(),
        )
        for _ in range(config.layers)
    ]


def quantise_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes of ``rows`` (..., head_dim), rounded half to even, and scales (...) float32, 0 for zeros."""
    scale = rows.float().abs().amax(dim=-1) / 127
    codes = torch.round(rows.float() / torch.where(scale == 0, 1.0, scale)[..., None]).clamp_(-127, 127)
    return codes.to(torch.int8), scale


def _store(cache: torch.Tensor, scale: torch.Tensor | None, rows: torch.Tensor, start: int) -> None:
    """Write ``rows`` (tokens, kv_heads, head_dim) at positions start, start + 1, ..."""
    rows = rows.transpose(0, 1)
    span = slice(start, start + rows.shape[1])
    if cache.dtype == torch.int8:
        assert scale is not None
        cache[:, span], scale[:, span] = quantise_rows(rows)
    else:
        cache[:, span] = rows.to(cache.dtype)


def _load(cache: torch.Tensor, scale: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    """Return cached rows as float32 (tokens, kv_heads, head_dim)."""
    rows = cache[:, start:stop].float()
    if cache.dtype == torch.int8:
        assert scale is not None
        rows = rows * scale[:, start:stop, None]
    return rows.transpose(0, 1)


def _compress_new(cache: LayerCache, start: int, stop: int, config: SparseConfig) -> None:
    """Store the compressed keys that the tokens [start, stop) complete."""
    keys, scale = (cache.nope, None) if config.use_nope else (cache.k, cache.k_scale)
    for target, size, stride in (
        (cache.fine, config.kernel_size, config.kernel_stride),
        (cache.coarse, config.coarse_size, config.coarse_stride),
    ):
        first, last = (infllm.kernel_count(length, size, stride) for length in (start, stop))
        if last > first:
            new = infllm.compress_keys(_load(keys, scale, first * stride, (last - 1) * stride + size), size, stride)
            target[:, first:last] = new.transpose(0, 1).to(target.dtype)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, scale: float) -> torch.Tensor:
    """Attend rows at positions start, start + 1, ... causally to k, v (keys, kv_heads, head_dim)."""
    rows = q.shape[0]
    stop = start + rows
    queries, keys, values = (part.transpose(0, 1)[None] for part in (q, k[:stop].to(q.dtype), v[:stop].to(q.dtype)))
    mask = None
    if start and rows > 1:
        mask = torch.arange(stop, device=q.device) <= torch.arange(start, stop, device=q.device)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=start == 0, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    scale: float,
    sparse: SparseConfig | None,
    score_q: torch.Tensor,
    fine: torch.Tensor,
    coarse: torch.Tensor,
) -> torch.Tensor:
    """Attend rows from position ``start`` on; k, v from position 0, fine and coarse (kernels, kv_heads, head_dim)."""
    rows = q.shape[0]
    dense = rows if sparse is None else min(max(sparse.dense_len - 1 - start, 0), rows)
    pieces = [_dense(q[:dense], k, v, start, scale)] if dense else []
    if sparse is not None and dense < rows:
        positions = torch.arange(start + dense, start + rows, device=q.device)
        with torch.no_grad():  # the choice of blocks has no gradient
            chosen = [
                infllm.select_blocks(
                    infllm.block_scores(score_q[dense:][tile], fine, coarse, at, sparse, scale), at, sparse
                )
                for tile, at in ((slice(i, i + 512), positions[i : i + 512]) for i in range(0, len(positions), 512))
            ]
        pieces.append(infllm.sparse_attention(q[dense:], k, v, torch.cat(chosen), positions, sparse, scale))
    return torch.cat(pieces)


def stateless(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    sparse: SparseConfig | None,
    q_nope: torch.Tensor | None = None,
    k_nope: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend a whole sequence that starts at position 0, without a cache; differentiable.

    q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim); q_nope, k_nope likewise for use_nope.
    """
    fine = coarse = k[:0]
    if sparse is not None and q.shape[0] >= sparse.dense_len:
        with torch.no_grad():
            keys = k_nope if sparse.use_nope and k_nope is not None else k
            fine = infllm.compress_keys(keys, sparse.kernel_size, sparse.kernel_stride)
            coarse = infllm.compress_keys(keys, sparse.coarse_size, sparse.coarse_stride)
    return _attend(q, k, v, 0, scale, sparse, q if q_nope is None else q_nope, fine, coarse)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: LayerCache,
    positions: torch.Tensor,
    scale: float,
    sparse: SparseConfig | None,
    q_nope: torch.Tensor | None = None,
    k_nope: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `attention` in plain torch, float32 inside."""
    start, stop = int(positions[0]), int(positions[0]) + q.shape[0]
    if stop > cache.k.shape[1] or not torch.equal(positions, torch.arange(start, stop, device=positions.device)):
        raise ValueError(f"attention: positions must ascend by one and stay below the capacity {cache.k.shape[1]}")
    _store(cache.k, cache.k_scale, k, start)
    _store(cache.v, cache.v_scale, v, start)
    fine = coarse = q[:0]
    if sparse is not None:
        if sparse.use_nope:
            assert k_nope is not None
            _store(cache.nope, None, k_nope, start)
        _compress_new(cache, start, stop, sparse)
        fine, coarse = cache.fine.transpose(0, 1), cache.coarse.transpose(0, 1)
    keys, values = _load(cache.k, cache.k_scale, 0, stop), _load(cache.v, cache.v_scale, 0, stop)
    score_q = q if q_nope is None else q_nope
    return _attend(q.float(), keys, values, start, scale, sparse, score_q, fine, coarse).to(q.dtype)


@torch.library.custom_op(
    "arkinfer::attention", mutates_args=("k_cache", "v_cache", "fine", "coarse", "nope_cache", "k_scale", "v_scale")
)
def _operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, fine: torch.Tensor, coarse: torch.Tensor, nope_cache: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
    q_nope: torch.Tensor | None, k_nope: torch.Tensor | None,
    positions: torch.Tensor, scale: float, sparse: bool,
    kernel_size: int = 32, kernel_stride: int = 16, block_size: int = 64, init_blocks: int = 1, window_size: int = 2048,
    topk: int = 64, use_nope: bool = False, dense_len: int = 8192, local_rule: str = "inclusive", lse: str = "coarse",
) -> torch.Tensor:  # fmt: skip
    fields = (
        kernel_size,
        kernel_stride,
        block_size,
        init_blocks,
        window_size,
        topk,
        use_nope,
        dense_len,
        local_rule,
        lse,
    )
    config = SparseConfig(*fields) if sparse else None
    cache = LayerCache(k_cache, v_cache, fine, coarse, nope_cache, k_scale, v_scale)
    return reference(q, k, v, cache, positions, scale, config, q_nope, k_nope)


@_operator.register_fake
def _(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(q)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: LayerCache | None,
    positions: torch.Tensor,
    scale: float,
    sparse: SparseConfig | None,
    q_nope: torch.Tensor | None = None,
    k_nope: torch.Tensor | None = None,
) -> torch.Tensor:
    """Append k, v (tokens, kv_heads, head_dim) to ``cache`` and return attention (tokens, heads, head_dim).

    q (tokens, heads, head_dim) and k after rope, q_nope and k_nope before it (only with use_nope); positions (tokens,)
    int64, consecutive. Keys and values are read back as the cache dtype rounded them; compressed keys are float32 means
    of those. Without a cache the tokens are a whole sequence from position 0. Raises ValueError beyond the capacity.
    """
    if cache is None:
        return stateless(q, k, v, scale, sparse, q_nope, k_nope)
    if differentiates(q, k, v):
        raise ValueError("attention: a cache records no gradients; train with caches=None or run under torch.no_grad()")
    fields = () if sparse is None else tuple(getattr(sparse, name) for name in _FIELDS)
    mixed: torch.Tensor = _operator(q, k, v, *cache, q_nope, k_nope, positions, scale, sparse is not None, *fields)
    return mixed


_FIELDS = (
    "kernel_size",
    "kernel_stride",
    "block_size",
    "init_blocks",
    "window_size",
    "topk",
    "use_nope",
    "dense_len",
    "local_rule",
    "lse",
)


def cost(
    tokens: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    sparse: SparseConfig | None = None,
    itemsize: float = 4,
) -> tuple[int, int]:
    """Return (bytes read and written, flops) of ``tokens`` new rows that bring the context to ``length``.

    ``itemsize`` is bytes per cached element (int8 with its scale: 1 + 4 / head_dim).
    """
    written = int(2 * tokens * kv_heads * head_dim * itemsize)
    dense_rows = tokens if sparse is None else max(0, min(length, sparse.dense_len - 1) - (length - tokens))
    moved = flops = 0
    if dense_rows:
        end = length - tokens + dense_rows
        moved = int(2 * end * kv_heads * head_dim * itemsize)
        flops = 4 * heads * head_dim * (dense_rows * end - dense_rows * (dense_rows - 1) // 2)
    if sparse is not None and dense_rows < tokens:
        more = infllm.cost(tokens - dense_rows, length, heads, kv_heads, head_dim, sparse, itemsize)
        moved, flops = moved + more[0], flops + more[1]
    return written + moved, flops
