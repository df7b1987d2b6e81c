"""The backend itself, on a driver and a runtime in memory: real engines of TensorRT's builder, run by onnxruntime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from arkinfer import backends
from arkinfer.artifact import Artifact
from arkinfer.errors import UnsupportedError, UserError
from tests.tensorrt import decoder, runtime
from tests.tensorrt.conftest import Orin

TOKENS = [(13 * index + index * index) % decoder.VOCABULARY for index in range(120)]


class Plain:
    """The decoder's file in onnxruntime, every step copied in and out."""

    def __init__(self, artifact: Artifact) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        file = str(artifact.file("model.onnx"))
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = [each for each in self.session.get_inputs() if each.name.startswith("layers.")]
        self.caches = {each.name: np.zeros(each.shape, np.float16) for each in names}
        self.length = 0

    def step(self, tokens: list[int]) -> np.ndarray:
        inputs = {
            "tokens": np.array(tokens),
            "position": np.array([self.length]),
            "rows": np.arange(len(tokens)),
            "span": np.arange(decoder.CONTEXT),
            **self.caches,
        }
        logits, *updated = self.session.run(None, inputs)
        self.caches = dict(zip(self.caches, updated, strict=True))
        self.length += len(tokens)
        return np.asarray(logits)


@pytest.mark.parametrize("sizes", [[120], [3, 1, 1, 9, 1, 40, 1, 8, 2]])
def test_it_computes_what_the_file_says(jetson: Artifact, orin: Orin, sizes: list[int]) -> None:
    driver = orin(jetson)
    executor = backends.open(jetson)
    reference, state = Plain(jetson), executor.new_state()
    start = 0
    for turn, size in enumerate(sizes):
        tokens, wanted = TOKENS[start : start + size], ("all", "last", "none")[turn % 3]
        expected = reference.step(tokens)
        got = executor.step(tokens, state, wanted)  # type: ignore[arg-type]
        expected = {"all": expected, "last": expected[-1:], "none": expected[:0]}[wanted]
        # Both run the same file; only how the tokens are cut differs, and so the rounding of sums in float16.
        assert got.shape == expected.shape and np.allclose(got, expected, atol=0.02)
        start += size
    assert state.length == start
    assert (driver.replays > 0) == (len(sizes) > 1)
    executor.close()
    assert driver.used() == 0


def test_each_step_takes_the_smallest_profile(jetson: Artifact, orin: Orin) -> None:
    orin(jetson)
    executor = backends.open(jetson)
    executor.step(TOKENS[:100], executor.new_state())
    executor.step(TOKENS[:20], executor.new_state(), "all")
    executor.step(TOKENS[:1], executor.new_state(), "none")
    assert runtime.CURRENT[-1].executed == [(2, 96, 1), (1, 4, 1), (2, 16, 16), (1, 4, 4), (0, 1, 1)]


def test_one_graph_decodes_every_token(jetson: Artifact, orin: Orin) -> None:
    driver = orin(jetson)
    executor = backends.open(jetson)
    state, other = executor.new_state(), executor.new_state()
    executor.step(TOKENS[:5], state)
    executor.step(TOKENS[:5], other)
    plain = [executor.step([token], other, "last") for token in TOKENS[5:7]]
    captured = [executor.step([token], state, "last") for token in TOKENS[5:15]]
    assert (driver.captures, driver.replays) == (2, 10)  # the first of each sequence runs as it is
    assert all(np.array_equal(one, two) for one, two in zip(plain, captured, strict=False))


def test_a_step_reads_no_more_of_the_caches_than_it_needs(jetson: Artifact, orin: Orin) -> None:
    driver = orin(jetson)
    executor = backends.open(jetson)
    state = executor.new_state()
    executor.fill(state, 252)
    for token in TOKENS[:8]:
        executor.step([token], state)
    assert (driver.captures, driver.replays) == (2, 6)  # 256 keys, then 512
    recipe = executor.recipe  # type: ignore[attr-defined]
    assert [recipe.span(length) for length in (1, 256, 257, 512, 513, 640)] == [256, 256, 512, 512, 640, 640]


def test_fork_truncate_and_several_states(jetson: Artifact, orin: Orin) -> None:
    driver = orin(jetson)
    executor = backends.open(jetson)
    state = executor.new_state()
    executor.step(TOKENS[:30], state, "none")
    twin = state.fork()
    first = executor.step(TOKENS[30:31], state)
    executor.step(TOKENS[:20], state)
    state.truncate(30)
    assert np.array_equal(executor.step(TOKENS[30:31], state), first)
    assert np.array_equal(executor.step(TOKENS[30:31], twin), first)
    used = driver.used()
    del state, twin
    executor.new_state().fork()
    assert driver.used() == used  # the caches of states that are gone serve the next ones
    with pytest.raises(UserError, match="vocabulary"):
        executor.step([decoder.VOCABULARY], executor.new_state())
    with pytest.raises(UserError, match="context is full"):
        executor.step([1] * (decoder.CONTEXT + 1), executor.new_state())


def test_it_is_measured_like_the_others(jetson: Artifact, orin: Orin) -> None:
    driver = orin(jetson, 1 << 25)
    executor = backends.open(jetson)
    state = executor.new_state()
    executor.fill(state, 600)
    assert state.length == 600 and np.isfinite(executor.step([5], state)).all()
    assert executor.decode_bytes(100) - executor.decode_bytes(0) == 100 * 256
    assert executor.prefill_ops(2, 0) == 10_000
    used = driver.used()
    assert executor.bandwidth(0.0) > 0 and driver.used() == used
    with pytest.raises(UnsupportedError, match="no inner values"):
        executor.trace(TOKENS[:3], executor.new_state())


def test_too_little_memory_is_said_before_anything_is_loaded(jetson: Artifact, orin: Orin) -> None:
    driver = orin(jetson, 1 << 20)
    with pytest.raises(UnsupportedError) as caught:
        backends.open(jetson)
    assert caught.value.code == "ARK-E343" and driver.used() == 0


def test_another_gear_than_the_engines_is_refused(jetson: Artifact, orin: Orin) -> None:
    orin(jetson)
    with pytest.raises(UserError) as caught:
        backends.open(jetson, attention="sparse")
    assert caught.value.code == "ARK-E213"
