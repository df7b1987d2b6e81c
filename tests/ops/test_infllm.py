"""InfLLM-v2 against formulas written as plain loops, and the invariants that the method promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer.config import SparseConfig
from arkinfer.ops import infllm

SMALL = SparseConfig(kernel_size=4, kernel_stride=2, block_size=8, init_blocks=1, window_size=8, topk=2, dense_len=-1)


def config(**changes: object) -> SparseConfig:
    return SparseConfig(**{**vars(SMALL), **changes})  # type: ignore[arg-type]


configs = st.builds(
    lambda stride, per_block, init, local, topk, rule, lse: SparseConfig(
        kernel_size=2 * stride, kernel_stride=stride, block_size=per_block * stride, init_blocks=init,
        window_size=local * per_block * stride, topk=topk, dense_len=-1, local_rule=rule, lse=lse,
    ),
    st.integers(1, 3), st.integers(1, 4), st.integers(0, 2), st.integers(0, 2), st.integers(1, 4),
    st.sampled_from(["inclusive", "exclusive"]), st.sampled_from(["coarse", "exact"]),
)  # fmt: skip


def random_qkv(tokens: int, heads: int, kv_heads: int, head_dim: int, seed: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, count, head_dim, generator=draw) for count in (heads, kv_heads, kv_heads))


def brute_scores(q: np.ndarray, k: np.ndarray, row: int, c: SparseConfig) -> np.ndarray:
    """Return the block scores (kv_heads, blocks) of one row, from the definition."""
    heads, kv_heads = q.shape[1], k.shape[1]
    scale = 1 / math.sqrt(q.shape[2])
    blocks = row // c.block_size + 1

    def pooled(size: int, stride: int) -> list[np.ndarray]:
        # Kernel j covers [stride * j, stride * j + size); a row sees it once its last token is not in the future.
        return [k[start : start + size].mean(axis=0) for start in range(0, row + 1, stride) if start + size - 1 <= row]

    fine, coarse = pooled(c.kernel_size, c.kernel_stride), pooled(4 * c.kernel_size, 4 * c.kernel_stride)
    scores = np.zeros((kv_heads, blocks))
    for head in range(kv_heads):
        total = np.zeros(len(fine))
        for h in range(head * heads // kv_heads, (head + 1) * heads // kv_heads):
            logits = [scale * q[row, h] @ kernel[head] for kernel in fine]
            base = logits if c.lse == "exact" else [scale * q[row, h] @ kernel[head] for kernel in coarse]
            if base:
                total += np.exp(np.array(logits) - math.log(sum(math.exp(value) for value in base)))
        for block in range(blocks):
            low, high = block * c.block_size, (block + 1) * c.block_size
            touching = [
                total[j]
                for j in range(len(fine))
                if c.kernel_stride * j < high and c.kernel_stride * j + c.kernel_size > low
            ]
            scores[head, block] = max(touching, default=0.0)
    return scores


def brute_selection(scores: np.ndarray, row: int, c: SparseConfig) -> list[int]:
    own = row // c.block_size
    local = c.window_size // c.block_size
    first = own - local + (c.local_rule == "exclusive")
    ranked = sorted(range(own + 1), key=lambda b: (-(math.inf if b < c.init_blocks or b >= first else scores[b]), b))
    return sorted(ranked[: c.topk + local])


def brute_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, row: int, blocks: list[list[int]], c: SparseConfig
) -> np.ndarray:
    heads, kv_heads = q.shape[1], k.shape[1]
    out = np.zeros(q.shape[1:])
    for h in range(heads):
        g = h * kv_heads // heads
        tokens = [t for t in range(row + 1) if t // c.block_size in blocks[g]]
        logits = np.array([q[row, h] @ k[t, g] / math.sqrt(q.shape[2]) for t in tokens])
        weights = np.exp(logits - logits.max())
        out[h] = (weights / weights.sum()) @ v[tokens, g]
    return out


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, c: SparseConfig, first: int = 0) -> tuple[torch.Tensor, ...]:
    """Return scores, selection and output of the rows from ``first`` on."""
    fine = infllm.compress_keys(k, c.kernel_size, c.kernel_stride)
    coarse = infllm.compress_keys(k, c.coarse_size, c.coarse_stride)
    positions = torch.arange(first, q.shape[0])
    scores = infllm.block_scores(q[first:], fine, coarse, positions, c)
    blocks = infllm.select_blocks(scores, positions, c)
    return scores, blocks, infllm.sparse_attention(q[first:], k, v, blocks, positions, c)


@settings(max_examples=30, deadline=None)
@given(configs, st.integers(1, 70), st.sampled_from([(1, 1), (2, 1), (6, 2), (5, 5)]), st.integers(0, 1 << 16))
def test_every_step_equals_the_definition(c: SparseConfig, tokens: int, heads: tuple[int, int], seed: int) -> None:
    q, k, v = random_qkv(tokens, *heads, 4, seed)
    scores, blocks, out = run(q, k, v, c)
    assert blocks.shape == (tokens, heads[1], c.budget)
    arrays = [part.double().numpy() for part in (q, k, v)]
    for row in range(0, tokens, 3):
        expected = brute_scores(*arrays[:2], row, c)
        seen = row // c.block_size + 1
        np.testing.assert_allclose(scores[row, :, :seen], expected, rtol=2e-4, atol=1e-6)
        chosen = [brute_selection(scores[row, head].tolist(), row, c) for head in range(heads[1])]
        for head in range(heads[1]):
            padded = chosen[head] + [-1] * (c.budget - len(chosen[head]))
            assert blocks[row, head].tolist() == padded
        np.testing.assert_allclose(out[row], brute_attention(*arrays, row, chosen, c), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 400), st.integers(1, 8), st.integers(1, 4))
def test_visible_kernels_are_the_complete_past_ones(position: int, stride: int, times: int) -> None:
    size = stride * times
    expected = sum(stride * j + size - 1 <= position for j in range(position + 1))
    assert infllm.visible_kernels(torch.tensor([position]), size, stride).item() == expected
    assert infllm.kernel_count(position + 1, size, stride) == expected


def test_visible_kernels_in_the_published_sizes() -> None:
    positions = torch.arange(5000)
    assert torch.equal(infllm.visible_kernels(positions, 32, 16), ((positions + 1) // 16 - 1).clamp(min=0))
    assert torch.equal(infllm.visible_kernels(positions, 128, 64), ((positions + 1) // 64 - 1).clamp(min=0))


@pytest.mark.parametrize("length", range(60))
def test_compressed_keys_do_not_depend_on_later_tokens(length: int) -> None:
    k = torch.randn(60, 2, 3, generator=torch.Generator().manual_seed(1))
    whole = infllm.compress_keys(k, 6, 2)
    part = infllm.compress_keys(k[:length], 6, 2)
    assert len(part) == len(range(0, length - 5, 2))
    assert torch.equal(part, whole[: len(part)])
    for j, kernel in enumerate(part):
        torch.testing.assert_close(kernel, k[2 * j : 2 * j + 6].mean(dim=0))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 90), st.sampled_from(["inclusive", "exclusive"]), st.integers(0, 1 << 16))
def test_budget_for_all_blocks_equals_dense(tokens: int, rule: str, seed: int) -> None:
    c = config(topk=12, local_rule=rule)
    q, k, v = random_qkv(tokens, 4, 2, 8, seed)
    out = run(q, k, v, c)[2]
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(part.transpose(0, 1)[None] for part in (q, k, v)), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(configs, st.integers(2, 90), st.integers(0, 1 << 16))
def test_one_row_equals_its_row_of_the_prefill(c: SparseConfig, tokens: int, seed: int) -> None:
    q, k, v = random_qkv(tokens, 4, 2, 8, seed)
    whole, last = run(q, k, v, c), run(q, k, v, c, first=tokens - 1)
    assert torch.equal(whole[1][-1:], last[1])
    torch.testing.assert_close(whole[2][-1:], last[2], rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lower_block() -> None:
    c = config(window_size=0, init_blocks=0, topk=3, local_rule="exclusive")
    scores = torch.tensor([[[0.5, 0.25, 0.5, 0.25, 0.25, 0.5, 0.125, 9.0]]])
    assert infllm.select_blocks(scores, torch.tensor([6 * 8]), c).tolist() == [[[0, 2, 5]]]
    scores[..., 0] = 0
    assert infllm.select_blocks(scores, torch.tensor([6 * 8 + 7]), c).tolist() == [[[1, 2, 5]]]
    negative = -torch.arange(8.0)[None, None]
    assert infllm.select_blocks(negative, torch.tensor([60]), c).tolist() == [[[0, 1, 2]]]


def test_neighbours_that_share_their_best_kernel_tie_exactly() -> None:
    # Kernel 3 covers tokens 6..9 and so touches blocks 0 and 1; the query agrees with it alone.
    q, k = torch.ones(1, 1, 2), torch.zeros(40, 1, 2)
    k[6:10] = 5
    fine, coarse = infllm.compress_keys(k, 4, 2), infllm.compress_keys(k, 16, 8)
    scores = infllm.block_scores(q, fine, coarse, torch.tensor([39]), SMALL)[0, 0]
    assert scores[0] == scores[1] > scores[2]


@pytest.mark.parametrize(("rule", "forced"), [("inclusive", [0, 3, 4, 5]), ("exclusive", [0, 4, 5])])
def test_local_rules(rule: str, forced: list[int]) -> None:
    c = config(window_size=16, topk=2, local_rule=rule)
    scores = torch.full((1, 1, 6), 0.5)
    scores[..., 1] = 1e30
    chosen = infllm.select_blocks(scores, torch.tensor([45]), c)[0, 0].tolist()
    assert c.budget == 4
    assert chosen == sorted(forced + [1] * (4 - len(forced)))


def test_published_budget_and_dynamic_blocks() -> None:
    c = SparseConfig()
    assert (c.budget, c.local_blocks, c.coarse_size, c.coarse_stride) == (96, 32, 128, 64)
    blocks = 512
    scores = torch.arange(blocks, dtype=torch.float32)[None, None]
    chosen = infllm.select_blocks(scores, torch.tensor([blocks * 64 - 1]), c)[0, 0].tolist()
    # 34 blocks are forced (1 first, 33 local), the other 62 are the best of the rest.
    assert chosen == [0, *range(blocks - 33 - 62, blocks)]


def test_a_budget_below_the_forced_blocks_keeps_the_lowest() -> None:
    c = config(window_size=16, topk=1)
    chosen = infllm.select_blocks(torch.zeros(1, 1, 6), torch.tensor([45]), c)
    assert chosen.tolist() == [[[0, 3, 4]]]


def test_rows_without_a_coarse_kernel_score_zero_and_large_scores_stay_finite() -> None:
    q, k = torch.full((40, 1, 2), 1.0), torch.ones(40, 1, 2)
    fine, coarse = infllm.compress_keys(k, 4, 2), infllm.compress_keys(k, 16, 8)
    scores = infllm.block_scores(q, fine, coarse, torch.arange(40), SMALL)
    assert torch.all(scores[:15] == 0) and torch.all(scores[15:, :, 0] > 0)
    k[:4] = 1e4
    fine, coarse = infllm.compress_keys(k, 4, 2), infllm.compress_keys(k, 16, 8)
    scores = infllm.block_scores(q, fine, coarse, torch.arange(40), SMALL)
    assert torch.isfinite(scores).all()


def test_gradients_reach_queries_keys_and_values() -> None:
    q, k, v = (part.requires_grad_() for part in random_qkv(40, 4, 2, 8, 0))
    with torch.no_grad():
        blocks = run(q, k, v, SMALL)[1]
    infllm.sparse_attention(q, k, v, blocks, torch.arange(40), SMALL).sum().backward()
    assert all(part.grad is not None and torch.isfinite(part.grad).all() for part in (q, k, v))


def test_no_rows() -> None:
    q, k, v = random_qkv(0, 4, 2, 8, 0)
    scores, blocks, out = run(q, k, v, SMALL)
    assert scores.shape == (0, 2, 0) and blocks.shape == (0, 2, SMALL.budget) and out.shape == (0, 4, 8)


def test_cost_is_bounded_by_the_budget() -> None:
    c = SparseConfig()
    near, far = (infllm.cost(1, length, 32, 2, 128, c, 2)[0] for length in (8192, 131072))
    compressed = 2 * 128 * 2 * (131072 - 8192) * (1 / 16 + 1 / 64)
    assert far - near == pytest.approx(compressed, rel=1e-6)
