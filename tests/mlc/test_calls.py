"""The calls that MLC's engine makes, each against the same tokens read one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from arkinfer.artifact import Artifact
from arkinfer.backends.mlc import MlcExecutor
from arkinfer.errors import UserError

CLOSE: dict[str, float] = {"rtol": 0, "atol": 2e-4}


def ids(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 2000, count).astype(np.int32)


def alone(executor: MlcExecutor, tokens: Sequence[int]) -> np.ndarray:
    """Return the logits (n, vocab) of one sequence, token by token."""
    state = executor.new_state(len(tokens))
    return np.concatenate([executor.step([int(token)], state) for token in tokens])


class Engine:
    """What MLC's engine does with a cache of several sequences."""

    def __init__(self, executor: MlcExecutor, sequences: int) -> None:
        self.executor, self.cache = executor, executor.new_cache(1024, sequences)

    def call(self, name: str, *arguments: Any) -> Any:
        return self.executor.call(f"vm.builtin.{name}", self.cache, *arguments)

    def add(self, sequence: int) -> None:
        self.call("kv_state_add_sequence", sequence)

    def forward(self, name: str, pieces: dict[int, np.ndarray], *tree: Any) -> np.ndarray:
        lengths = [len(piece) for piece in pieces.values()]
        joined = np.concatenate(list(pieces.values()))
        logits = self.executor.forward(name, joined, self.cache, list(pieces), lengths, *tree)[0]
        return np.from_dlpack(logits)


def test_the_package_was_verified_with_its_rotation_and_scalings(package: Artifact) -> None:
    config, parity = package.manifest.model["config"], package.manifest.parity
    assert max(config["rope_scaling"]["long_factor"]) > 1.1 and config["scale_emb"] == 12
    assert parity is not None and parity["passed"] and parity["path"] == "float" and parity["top1"] == 1.0
    assert parity["evidence"].startswith("compiled, the library's x86-64-v3 form called as MLC's engine does")


def test_prompts_in_pieces_give_the_logits_of_single_tokens(executor: MlcExecutor) -> None:
    tokens = ids(75, 1)
    want = alone(executor, tokens)
    state = executor.new_state(100)
    got = [executor.step(list(tokens[a:b]), state) for a, b in ((0, 1), (1, 18), (18, 50), (50, 66), (66, 75))]
    np.testing.assert_allclose(np.concatenate(got), want[[0, 17, 49, 65, 74]], **CLOSE)
    np.testing.assert_allclose(executor.step(list(tokens), executor.new_state(), "all"), want, **CLOSE)


def test_a_prompt_longer_than_the_engine_reads_at_once(executor: MlcExecutor) -> None:
    tokens = list(ids(executor.plan["prefill_chunk_size"] + 37, 2))
    state, other = executor.new_state(), executor.new_state()
    whole = executor.step(tokens, state)
    executor.step(tokens[:300], other, "none")
    np.testing.assert_allclose(executor.step(tokens[300:], other), whole, **CLOSE)


def test_several_sequences_are_read_and_answered_together(executor: MlcExecutor) -> None:
    engine, texts = Engine(executor, 3), {5: ids(33, 3), 0: ids(1, 4), 9: ids(48, 5)}
    for sequence in texts:
        engine.add(sequence)
    first = {sequence: text[: max(1, len(text) - 4)] for sequence, text in texts.items()}
    got = engine.forward("batch_prefill", first)
    assert got.shape == (1, 3, executor.vocab_size)
    for row, (sequence, text) in enumerate(first.items()):
        np.testing.assert_allclose(got[0, row], alone(executor, text)[-1], err_msg=str(sequence), **CLOSE)
    follow = ids(6, 6).reshape(2, 3)
    said = {sequence: list(text) for sequence, text in first.items()}
    for tokens in follow:
        pieces = {sequence: tokens[i : i + 1] for i, sequence in enumerate(said)}
        got = engine.forward("batch_decode", pieces)
        assert got.shape == (3, 1, executor.vocab_size)
        for row, sequence in enumerate(said):
            said[sequence].append(int(tokens[row]))
            np.testing.assert_allclose(got[row, 0], alone(executor, said[sequence])[-1], **CLOSE)
    more = {sequence: ids(count, 7 + count) for sequence, count in zip(said, (3, 17, 1), strict=True)}
    got = engine.forward("batch_verify", more)
    assert got.shape == (1, 21, executor.vocab_size)
    start = 0
    for sequence, piece in more.items():
        want = alone(executor, [*said[sequence], *piece])[-len(piece) :]
        np.testing.assert_allclose(got[0, start : start + len(piece)], want, **CLOSE)
        start += len(piece)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 40])
def test_what_was_popped_is_forgotten(executor: MlcExecutor, length: int) -> None:
    tokens, other = ids(40, 8), ids(5, 9)
    state = executor.new_state(64)
    executor.step(list(tokens), state, "none")
    state.truncate(length)
    got = executor.step(list(other), state)
    np.testing.assert_allclose(got[0], alone(executor, [*tokens[:length], *other])[-1], **CLOSE)


@pytest.mark.parametrize("length", [0, 7, 16, 32, 45])
def test_forks_share_a_past_and_nothing_else(executor: MlcExecutor, length: int) -> None:
    past, one, two = ids(length, 10), ids(6, 11), ids(9, 12)
    state = executor.new_state(64)
    if length:
        executor.step(list(past), state, "none")
    twin = state.fork()
    executor.step(list(one[:3]), state, "none")
    got_two = executor.step(list(two), twin)
    got_one = executor.step(list(one[3:]), state)
    np.testing.assert_allclose(got_one[0], alone(executor, [*past, *one])[-1], **CLOSE)
    np.testing.assert_allclose(got_two[0], alone(executor, [*past, *two])[-1], **CLOSE)
    third = twin.fork()
    twin.truncate(length)
    np.testing.assert_allclose(executor.step([7], third)[0], alone(executor, [*past, *two, 7])[-1], **CLOSE)


def test_forks_are_answered_in_one_batch(executor: MlcExecutor) -> None:
    """Their shared pages are one part of the attention, read by the kernel for several queries, and merged."""
    engine, past = Engine(executor, 3), ids(37, 13)
    engine.add(0)
    engine.forward("prefill", {0: past})
    engine.call("kv_state_fork_sequence", 0, 1, -1)
    engine.call("kv_state_fork_sequence", 0, 2, 20)
    said = {0: [*past], 1: [*past], 2: [*past[:20]]}
    for tokens in ids(9, 14).reshape(3, 3):
        got = engine.forward("batch_decode", {s: tokens[s : s + 1] for s in said})
        for sequence, text in said.items():
            text.append(int(tokens[sequence]))
            np.testing.assert_allclose(got[sequence, 0], alone(executor, text)[-1], **CLOSE)


@pytest.mark.parametrize("past", [0, 21])
def test_a_drafted_tree_is_verified_at_once(executor: MlcExecutor, past: int) -> None:
    """Nodes see what came before and their ancestors; the accepted branch stays in the cache."""
    parents = [-1, 0, 0, 1, 1, 2, 5]
    before, nodes = ids(past, 15), ids(len(parents), 16)
    engine = Engine(executor, 2)
    engine.add(0)
    if past:
        engine.forward("prefill", {0: before})

    def branch(node: int) -> list[int]:
        return [] if node < 0 else [*branch(parents[node]), int(nodes[node])]

    got = engine.forward("batch_verify", {0: nodes}, parents)
    for node in range(len(parents)):
        np.testing.assert_allclose(got[0, node], alone(executor, [*before, *branch(node)])[-1], **CLOSE)
    accepted, shape = 6, executor.ffi.Shape
    engine.call("attention_kv_cache_commit_accepted_token_tree_nodes", shape([0]), shape([accepted]))
    got = engine.forward("decode", {0: ids(1, 17)})
    want = alone(executor, [*before, *branch(accepted), *ids(1, 17)])[-1]
    np.testing.assert_allclose(got[0, 0], want, **CLOSE)


def test_a_full_context_is_refused(executor: MlcExecutor) -> None:
    state = executor.new_state(16)
    executor.step([5] * 16, state, "none")
    with pytest.raises(UserError, match="context is full"):
        executor.step([5], state)
