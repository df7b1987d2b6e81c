"""The kernels against arkinfer.ops: each stage on the caches that the kernels themselves wrote."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from arkinfer.config import SparseConfig
from arkinfer.ops import infllm
from arkinfer.ops.attention import LayerCache, quantise_rows
from tests.kernels.attention.layer import EMULATED, RUNNABLE, TINY, WIDE, Layer, Shape, projections, rotation

CHUNKS = (15, 1, 1, 15, 1, 14, 1, 1, 14, 1, 1, 62, 1, 2, 3, 17, 65, 1)
"""Chunks that begin and end on both sides of every boundary: panels, blocks, dense_len."""

SHAPES = (
    Shape(1, 1, 16, "float32", replace(TINY, lse="exact")),
    Shape(4, 2, 32, "float16", TINY),
    Shape(6, 2, 48, "float32", replace(TINY, local_rule="exclusive")),
    Shape(4, 1, 64, "int8", replace(TINY, lse="exact", use_nope=True)),
    Shape(16, 2, 64, "float16", WIDE),
    Shape(16, 1, 128, "float16", replace(TINY, use_nope=True)),
    Shape(11, 1, 96, "float32", replace(TINY, kernel_size=16, block_size=32, window_size=64, topk=1)),
    Shape(3, 3, 80, "int8", TINY, norm_eps=1e-6),
    Shape(8, 2, 64, "float16", None, norm_eps=1e-5),
    Shape(4, 4, 32, "int8", None),
)


def split(shape: Shape, qkv: np.ndarray, start: int) -> tuple[torch.Tensor, ...]:
    """Return q, k, v as the reference makes them, then q and k before rotation, of float32 projections."""
    x = torch.from_numpy(qkv).unflatten(1, (-1, shape.head_dim))
    q, k, v = x.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    if shape.norm_eps is not None:
        weights = [torch.from_numpy(weight) for weight in Layer(shape, RUNNABLE[0]).norms]
        q = torch.nn.functional.rms_norm(q, (shape.head_dim,), weights[0], shape.norm_eps)
        k = torch.nn.functional.rms_norm(k, (shape.head_dim,), weights[1], shape.norm_eps)
    cos, sin = torch.from_numpy(rotation(shape.head_dim, start, len(qkv)))[:, None].chunk(2, dim=-1)

    def rotate(z: torch.Tensor) -> torch.Tensor:
        first, second = z.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return rotate(q), rotate(k), v, q, k


def loaded(cache: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Return a cache as float32 (tokens, kv_heads, head_dim)."""
    values = cache.float() if scale is None else cache.float() * scale[..., None]
    return values.transpose(0, 1)


def check_blocks(shape: Shape, layer: Layer, cache: LayerCache, start: int, dense: int) -> None:
    """Chosen blocks must be the reference's, but for scores within rounding of the last one taken."""
    sparse = shape.sparse
    assert sparse is not None
    positions = torch.arange(start + dense, start + len(layer.q))
    scored = torch.from_numpy(layer.q if layer.q_nope is None else layer.q_nope)[dense:]
    scores = infllm.block_scores(
        scored, cache.fine.transpose(0, 1).float(), cache.coarse.transpose(0, 1).float(), positions, sparse, shape.scale
    )
    want = infllm.select_blocks(scores, positions, sparse)
    have = torch.from_numpy(layer.blocks)[dense:].long()
    assert (layer.blocks[:dense] == -7).all()
    for row, head in (want != have).any(dim=2).nonzero().tolist():
        ours, theirs = set(have[row, head].tolist()) - {-1}, set(want[row, head].tolist()) - {-1}
        taken = [b for b in have[row, head].tolist() if b >= 0]
        assert len(ours) == len(theirs) == len(taken)
        assert taken == sorted(taken)
        edge = [float(scores[row, head, b]) for b in ours ^ theirs]
        assert max(edge) - min(edge) <= 1e-4 * max(edge), (start + dense + row, head)


@pytest.mark.parametrize(
    ("isa", "shape"),
    [(RUNNABLE[0], shape) for shape in SHAPES] + [(EMULATED[0], SHAPES[i]) for i in (1, 3, 8)],
    ids=str,
)
def test_every_stage_is_that_of_the_reference(isa: str, shape: Shape) -> None:
    layer = Layer(shape, isa, small_forms=False)
    # A configuration with the published sizes needs a longer context to become sparse.
    chunks = CHUNKS if shape.sparse is not WIDE else (255, 44, 1, 1, 19, 1, 61, 64, 130, 1)
    qkv = projections(shape, sum(chunks))
    start = 0
    for count in chunks:
        rows = qkv[start : start + count]
        out = torch.from_numpy(layer.step(rows, start))
        cache = layer.unpacked()
        stop = start + count
        q, k, v, _, k_nope = split(shape, rows, start)
        assert torch.allclose(torch.from_numpy(layer.q), q, atol=2e-5)
        for ours, scale, theirs in ((cache.k, cache.k_scale, k), (cache.v, cache.v_scale, v)):
            if shape.kv == "int8":
                _, step = quantise_rows(theirs.transpose(0, 1))
                assert scale is not None
                assert torch.allclose(scale[:, start:stop], step, rtol=1e-5)
                assert ((loaded(ours, scale)[start:stop] - theirs).abs() <= 0.501 * step.T[..., None]).all()
            else:
                assert torch.allclose(loaded(ours, None)[start:stop], theirs, rtol=1e-3, atol=2e-5)
        keys, values = loaded(cache.k, cache.k_scale)[:stop], loaded(cache.v, cache.v_scale)[:stop]
        dense = count if shape.sparse is None else min(max(shape.sparse.dense_len - 1 - start, 0), count)
        if shape.sparse is not None:
            check_compressed(shape, cache, keys, stop)
            check_blocks(shape, layer, cache, start, dense)
            if shape.nope:
                assert torch.allclose(loaded(cache.nope, None)[start:stop], k_nope, rtol=1e-3, atol=2e-5)
        check_rows(shape, layer, out, keys, values, start, dense)
        start = stop


def check_compressed(shape: Shape, cache: LayerCache, keys: torch.Tensor, stop: int) -> None:
    sparse = shape.sparse
    assert sparse is not None
    source = loaded(cache.nope, None)[:stop] if shape.nope else keys
    for ours, size, stride in (
        (cache.fine, sparse.kernel_size, sparse.kernel_stride),
        (cache.coarse, sparse.coarse_size, sparse.coarse_stride),
    ):
        want = infllm.compress_keys(source, size, stride)
        assert torch.allclose(loaded(ours, None)[: len(want)], want, rtol=1e-3, atol=2e-5)
        assert (loaded(ours, None)[len(want) :] == 0).all()


def check_rows(
    shape: Shape, layer: Layer, out: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, dense: int
) -> None:
    count = len(layer.q)
    size = shape.sparse.block_size if shape.sparse is not None else 64
    positions = torch.arange(start, start + count)
    every = torch.arange((start + count - 1) // size + 1).repeat(count, 1)
    every = every.masked_fill(every > (positions // size)[:, None], -1)[:, None].expand(-1, shape.kv_heads, -1)
    config = SparseConfig() if shape.sparse is None else shape.sparse
    config = replace(config, block_size=size)
    q = torch.from_numpy(layer.q)
    want = infllm.sparse_attention(q, keys, values, every, positions, config, shape.scale)
    if dense < count:
        chosen = torch.from_numpy(layer.blocks).long()[dense:]
        picked = infllm.sparse_attention(q[dense:], keys, values, chosen, positions[dense:], config, shape.scale)
        want = torch.cat((want[:dense], picked))
    assert torch.allclose(out, want, rtol=1e-4, atol=5e-6), float((out - want).abs().max())
