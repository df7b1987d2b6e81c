"""The cached attention operator: chunking, int8 caches, export; and rope against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer.config import ModelConfig, SparseConfig
from arkinfer.ops import infllm
from arkinfer.ops.attention import LayerCache, attention, cost, new_caches, quantise_rows, stateless
from arkinfer.ops.rope import rope

SPARSE = SparseConfig(kernel_size=4, kernel_stride=2, block_size=8, init_blocks=1, window_size=8, topk=2, dense_len=30)


def model_config(sparse: SparseConfig | None) -> ModelConfig:
    return ModelConfig("minicpm", 32, 1, 4, 2, 8, 32, 50, 1e-6, 256, sparse=sparse)


def random_inputs(tokens: int, seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, heads, 8, generator=draw) for heads in (4, 2, 2, 4, 2)]  # q, k, v, q_nope, k_nope


def feed(inputs: list[torch.Tensor], cache: LayerCache, cuts: list[int], sparse: SparseConfig | None) -> torch.Tensor:
    """Run the operator over chunks that end at ``cuts``."""
    out, start = [], 0
    for stop in cuts:
        q, k, v, q_nope, k_nope = (part[start:stop] for part in inputs)
        nope = (q_nope, k_nope) if sparse is not None and sparse.use_nope else (None, None)
        out.append(attention(q, k, v, cache, torch.arange(start, stop), 8**-0.5, sparse, *nope))
        start = stop
    return torch.cat(out)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8]),
    st.sampled_from([None, SPARSE, SparseConfig(**{**vars(SPARSE), "use_nope": True, "lse": "exact"})]),
    st.integers(0, 1 << 16),
)
def test_chunking_changes_nothing(sizes: list[int], dtype: torch.dtype, sparse: SparseConfig | None, seed: int) -> None:
    cuts = np.cumsum(sizes).tolist()
    inputs = random_inputs(cuts[-1], seed)
    config = model_config(sparse)
    whole, parts, single = (new_caches(config, 256, dtype)[0] for _ in range(3))
    expected = feed(inputs, whole, cuts[-1:], sparse)
    torch.testing.assert_close(feed(inputs, parts, cuts, sparse), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        feed(inputs, single, list(range(1, cuts[-1] + 1)), sparse), expected, rtol=1e-4, atol=1e-5
    )
    for one, other, third in zip(whole, parts, single, strict=True):
        assert (one is None and other is None) or (torch.equal(one, other) and torch.equal(one, third))


def test_without_a_cache_the_answer_is_the_same() -> None:
    inputs = random_inputs(100, 0)
    cached = feed(inputs, new_caches(model_config(SPARSE), 128)[0], [100], SPARSE)
    torch.testing.assert_close(stateless(*inputs[:3], 8**-0.5, SPARSE), cached, rtol=1e-5, atol=1e-6)


def test_the_gear_changes_exactly_at_dense_len() -> None:
    inputs = random_inputs(60, 3)
    dense = feed(inputs, new_caches(model_config(None), 64)[0], [60], None)
    mixed = feed(inputs, new_caches(model_config(SPARSE), 64)[0], [60], SPARSE)
    always = SparseConfig(**{**vars(SPARSE), "dense_len": -1})
    sparse = feed(inputs, new_caches(model_config(always), 64)[0], [60], always)
    torch.testing.assert_close(mixed[:29], dense[:29])
    torch.testing.assert_close(mixed[29:], sparse[29:])
    assert not torch.allclose(mixed[45:], dense[45:])


def test_rewriting_after_truncation_forgets_the_old_tokens() -> None:
    inputs, other = random_inputs(90, 1), random_inputs(90, 2)
    mixed = [torch.cat([a[:41], b[41:]]) for a, b in zip(inputs, other, strict=True)]
    fresh, reused = (new_caches(model_config(SPARSE), 128)[0] for _ in range(2))
    feed(inputs, reused, [90], SPARSE)
    q, k, v = (part[41:] for part in mixed[:3])
    again = attention(q, k, v, reused, torch.arange(41, 90), 8**-0.5, SPARSE)
    torch.testing.assert_close(again, feed(mixed, fresh, [90], SPARSE)[41:], rtol=1e-5, atol=1e-6)


def test_compressed_keys_are_means_of_the_rounded_cache() -> None:
    inputs = random_inputs(50, 4)
    for dtype in (torch.float16, torch.int8):
        cache = new_caches(model_config(SPARSE), 64, dtype)[0]
        feed(inputs, cache, [7, 20, 50], SPARSE)
        stored = cache.k.float() * (1 if cache.k_scale is None else cache.k_scale[..., None])
        expected = infllm.compress_keys(stored[:, :50].transpose(0, 1), 4, 2).half()
        assert cache.fine.dtype == torch.float16
        assert torch.equal(cache.fine[:, : len(expected)], expected.transpose(0, 1))


def test_int8_rows_follow_the_definition() -> None:
    rows = torch.tensor([[254.0, 1.0, 3.0, -5.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scales = quantise_rows(rows)
    assert codes.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]] and scales.tolist() == [2.0, 0.0]


def test_misuse_is_refused() -> None:
    inputs = random_inputs(10, 0)
    cache = new_caches(model_config(None), 8)[0]
    with pytest.raises(ValueError, match="capacity"):
        feed(inputs, cache, [10], None)
    with pytest.raises(ValueError, match="ascend"):
        attention(*(part[:2] for part in inputs[:3]), cache, torch.tensor([3, 5]), 1.0, None)
    with pytest.raises(ValueError, match="gradients"):
        attention(inputs[0][:2].requires_grad_(), inputs[1][:2], inputs[2][:2], cache, torch.arange(2), 1.0, None)


def test_operators_declare_what_they_do() -> None:
    q, k, v = random_inputs(5, 0)[:3]
    cache = new_caches(model_config(SPARSE), 64)[0]
    arguments = (
        q,
        k,
        v,
        *cache,
        None,
        None,
        torch.arange(5),
        0.3,
        True,
        4,
        2,
        8,
        1,
        8,
        2,
        False,
        30,
        "inclusive",
        "coarse",
    )
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.arkinfer.attention.default, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.arkinfer.rope.default, (q, torch.arange(5), torch.ones(4), 1.0), test_utils=checks)
    torch.library.opcheck(torch.ops.arkinfer.linear.default, (torch.randn(5, 8), torch.randn(3, 8)), test_utils=checks)


@pytest.mark.parametrize("position", [0, 1, 77, 131071])
def test_rope_rotates_half_split_pairs(position: int) -> None:
    draw = np.random.default_rng(position)
    x = draw.normal(size=(1, 3, 8)).astype(np.float32)
    inverse = (10000.0 ** -(np.arange(4) / 4)).astype(np.float32)
    out = rope(torch.from_numpy(x), torch.tensor([position]), torch.from_numpy(inverse), 1.5).numpy()
    angle = (np.float32(position) * inverse).astype(np.float64)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle) * 1.5
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-6)


def test_rope_keeps_the_dtype_and_computes_in_float32() -> None:
    x = torch.randn(4, 2, 8).half()
    positions, inverse = torch.arange(4) + 9000, torch.rand(4)
    assert torch.equal(rope(x, positions, inverse, 1.0), rope(x.float(), positions, inverse, 1.0).half())


def test_cost_of_dense_rows_is_the_causal_triangle() -> None:
    pairs = sum(row + 1 for row in range(90, 100))
    moved, flops = cost(10, 100, 4, 2, 8, None, 2)
    assert flops == 4 * 4 * 8 * pairs
    assert moved == (2 * 100 + 2 * 10) * 2 * 8 * 2
    crossing = SparseConfig(**{**vars(SPARSE), "dense_len": 96})
    assert cost(10, 100, 4, 2, 8, crossing)[1] == cost(5, 95, 4, 2, 8)[1] + infllm.cost(5, 100, 4, 2, 8, crossing)[1]
