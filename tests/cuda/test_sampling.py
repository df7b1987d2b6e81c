"""Tokens chosen on the device: those that the host would choose, at one graph launch and one read a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

import arkinfer
from arkinfer.artifact import Artifact
from arkinfer.backends import cuda_driver
from arkinfer.backends.base import Draw
from arkinfer.errors import InternalError, UserError
from arkinfer.interpreter import PlanInterpreter
from arkinfer.runtime.engine import Engine
from arkinfer.runtime.sampling import Sampler, Sampling, distribution, drawing
from arkinfer.targets import probe
from tests.cuda.fake_driver import GPU, FakeDriver

PROMPT = [(13 * index + index * index) % 400 for index in range(21)]
OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.7, "top_k": 20, "seed": 2},
    {"temperature": 0.8, "top_p": 0.7, "seed": 3},
    {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "seed": 4},
    {"temperature": 1.5, "top_k": 1, "seed": 5},
]


@pytest.fixture
def opened(llama: Artifact, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, FakeDriver]]:
    """An engine on a made-up GPU."""
    fake = FakeDriver(llama)
    monkeypatch.setattr(cuda_driver, "bindings", lambda: fake)
    monkeypatch.setattr(probe, "gpu", lambda: GPU)
    with arkinfer.load(llama.path) as engine:
        yield engine, fake


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], None]:
    """Return what makes an engine choose on the host."""
    return lambda engine: monkeypatch.setattr(engine.executor, "draws", False)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_tokens_are_those_of_the_host(
    opened: tuple[Engine, FakeDriver], on_host: Callable[[Engine], None], options: dict[str, float]
) -> None:
    engine, _ = opened
    device = engine.generate(PROMPT, max_tokens=24, **options)  # type: ignore[arg-type]
    on_host(engine)
    assert engine.generate(PROMPT, max_tokens=24, **options).tokens == device.tokens  # type: ignore[arg-type]
    assert len(set(device.tokens)) > 1


@pytest.mark.parametrize("options", [Sampling(0.0), Sampling(1.3, top_k=30, top_p=0.9, seed=7)])
def test_a_token_costs_one_graph_launch_and_four_bytes(opened: tuple[Engine, FakeDriver], options: Sampling) -> None:
    engine, fake = opened
    executor, draw = engine.executor, drawing(options, len(PROMPT), 22)
    state = executor.new_state()
    token = executor.sample([executor.sample(PROMPT, state, draw)], state, draw)

    def counted() -> tuple[int, ...]:
        return fake.replays, fake.captures, fake.uploads, fake.downloads, fake.downloaded

    before = counted()
    for _ in range(20):
        token = executor.sample([token], state, draw)
    assert np.subtract(counted(), before).tolist() == [20, 0, 0, 20, 80]


def test_what_needs_the_logits_is_chosen_on_the_host(opened: tuple[Engine, FakeDriver]) -> None:
    engine, fake = opened
    for options in ({"min_p": 0.1}, {"repetition_penalty": 1.2}, {"frequency_penalty": 0.5}):
        before = fake.downloaded
        answer = engine.generate(PROMPT, max_tokens=3, temperature=1.0, seed=1, **options)  # type: ignore[arg-type]
        steps = len(answer.tokens) + (answer.finish_reason == "stop")  # the end of an answer is chosen from logits too
        assert fake.downloaded - before == 4 * steps * engine.vocab_size


def test_requests_that_take_turns_do_not_show_in_each_other(opened: tuple[Engine, FakeDriver]) -> None:
    engine, _ = opened
    requests = [{"temperature": 1.4, "seed": 11}, {"temperature": 0.0}, {"temperature": 1.4, "seed": 12, "top_k": 30}]
    alone = [engine.generate(PROMPT[place:], max_tokens=12, **request) for place, request in enumerate(requests)]  # type: ignore[arg-type]
    streams = [engine.stream(PROMPT[place:], max_tokens=12, **request) for place, request in enumerate(requests)]  # type: ignore[arg-type]
    running = list(streams)
    while running:
        running = [stream for stream in running if next(stream, None) is not None]
    assert [stream.result.tokens for stream in streams if stream.result] == [result.tokens for result in alone]


def test_cancel_truncate_and_go_on(opened: tuple[Engine, FakeDriver]) -> None:
    engine, fake = opened
    session = engine.session()
    whole = session.generate(PROMPT, max_tokens=20, temperature=0.0).tokens
    with session.stream(PROMPT, max_tokens=20, temperature=0.0) as stream:
        for _ in range(3):
            next(stream)
        replays = fake.replays
        stream.cancel()
        list(stream)
    assert fake.replays - replays <= 1
    assert stream.result is not None and stream.result.finish_reason == "cancelled"
    kept = stream.result.tokens
    assert kept == whole[: len(kept)]
    session.truncate(len(PROMPT) + 2)
    assert session.generate([*PROMPT, *whole[:5]], max_tokens=15, temperature=0.0).tokens == whole[5:]
    assert session.generate(PROMPT, max_tokens=20, temperature=0.0).tokens == whole


@pytest.mark.parametrize("where", ["interpreter", "driver"])
def test_logits_that_are_no_numbers_are_reported(
    llama: Artifact, opened: tuple[Engine, FakeDriver], where: str
) -> None:
    engine, fake = opened
    executor = PlanInterpreter(llama) if where == "interpreter" else engine.executor
    norm = next(buffer.name for buffer in fake.plan.of_kind("parameter") if buffer.name == "model.norm.weight:vector")
    memory = executor._fixed[norm] if isinstance(executor, PlanInterpreter) else None
    if memory is None:
        memory = fake.at(executor._addresses[norm], 4)  # type: ignore[attr-defined]
    memory[:4] = 0xFF
    for draw in (Draw(), Draw(1.0, 0, 1.0, np.full(9, 0.5, np.float32), len(PROMPT))):
        with pytest.raises(InternalError, match="not numbers") as caught:
            executor.sample(PROMPT, executor.new_state(), draw)
        assert caught.value.code == "ARK-E710"


@pytest.mark.parametrize("options", [Sampling(1.3), Sampling(0.9, top_k=7), Sampling(1.5, top_k=40, top_p=0.8)])
def test_draws_follow_the_distribution(llama: Artifact, options: Sampling) -> None:
    """Numbers at equal distances: each token's share of them is its probability, up to two of them."""
    executor = PlanInterpreter(llama)
    state = executor.new_state()
    logits = executor.step(PROMPT, state)[0]
    ids, shares = distribution(logits, options)
    count = 100
    found = []
    for index in range(count):
        state.truncate(len(PROMPT) - 1)
        number = np.array([(index + 0.5) / count], np.float32)
        draw = Draw(options.temperature, options.top_k, options.top_p, number, len(PROMPT))
        executor.sample(PROMPT[:1], state, Draw())  # another request in between
        state.truncate(len(PROMPT) - 1)
        found.append(executor.sample(PROMPT[-1:], state, draw))
    counts = np.bincount(found, minlength=executor.vocab_size)
    assert set(found) <= set(ids.tolist()) and found == sorted(found)
    # The last prompt token ran in another schedule than its logits above: float16 rounding moves the shares a little.
    assert np.abs(counts[ids] / count - shares).max() <= 2 / count
    executor.close()


def test_a_token_without_a_number_is_refused(llama: Artifact) -> None:
    executor = PlanInterpreter(llama)
    state = executor.new_state()
    draw = Draw(1.0, 0, 1.0, np.full(1, 0.5, np.float32), len(PROMPT))
    token = executor.sample(PROMPT, state, draw)
    with pytest.raises(UserError, match="no random number"):
        executor.sample([token], state, draw)
    assert state.length == len(PROMPT)


def test_the_numbers_of_a_seed_are_those_of_the_host() -> None:
    """Over a whole vocabulary that leaves one candidate now and then: every token takes one number all the same."""
    options = Sampling(top_p=0.5, seed=9)
    sampler = Sampler(options, 3, [])
    numbers = drawing(options, 1, 20).numbers
    for index, number in enumerate(numbers):
        logits = np.log(np.array([0.9, 0.05, 0.05] if index % 2 else [0.3, 0.3, 0.4], np.float32))
        expected = 0 if index % 2 else 0 if number * 0.7 < 0.3 else 2
        assert sampler(logits) == expected
