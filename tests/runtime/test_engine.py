"""A program that embeds arkinfer: it opens an artifact once and asks from wherever it likes."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from arkinfer.errors import UnsupportedError, UserError
from arkinfer.runtime.result import Piece
from arkinfer.runtime.stream import CHUNK
from tests.runtime.scripted import BOS, ScriptedExecutor, engine_that_says, user


def test_messages_are_answered_and_the_answer_ends_where_the_model_ends_it() -> None:
    with engine_that_says("Paris, of course.") as engine:
        result = engine.generate(user("Capital of France?"))
    assert (result.text, result.reasoning, result.finish_reason) == ("Paris, of course.", "", "stop")
    assert result.usage.completion_tokens == len(result.tokens) == len("Paris, of course.")
    assert engine.tokenizer.decode(result.tokens) == result.text
    assert result.timing.first_token >= result.timing.prefill > 0


def test_text_is_continued_as_it_stands_and_gets_the_bos_that_the_model_wants() -> None:
    engine = engine_that_says(" lived a fox.", add_bos=True)
    session = engine.session()
    assert session.generate("There once:").text == " lived a fox."
    assert session.tokens[0] == BOS and session.tokens.count(BOS) == 1
    session.generate("<s>There once:")
    assert session.tokens.count(BOS) == 1  # the text spelled it: no second one


def test_ids_are_a_prompt_too() -> None:
    engine = engine_that_says("yes")
    assert engine.generate(engine.tokenizer.encode("well:")).text == "yes"


def test_pieces_arrive_in_order_and_join_to_the_text() -> None:
    engine = engine_that_says("Grüße aus 北京 🦊!")
    with engine.stream(user("?")) as stream:
        pieces = list(stream)
    assert all(isinstance(piece, Piece) and piece.text for piece in pieces)
    assert "".join(piece.text for piece in pieces) == "Grüße aus 北京 🦊!"
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert stream.result is not None and stream.result.text == "Grüße aus 北京 🦊!"


def test_max_tokens_bounds_the_answer() -> None:
    result = engine_that_says("a very long story").generate(user("?"), max_tokens=6)
    assert (result.text, result.finish_reason) == ("a very", "length")


def test_a_character_cut_by_max_tokens_is_shown_as_the_replacement_character() -> None:
    assert engine_that_says("北京").generate(user("?"), max_tokens=4).text == "北\ufffd"


def test_a_full_context_ends_the_answer() -> None:
    engine = engine_that_says("abcdefghijklmnop", max_context=16)
    result = engine.generate("question:", max_tokens=100)
    assert result.finish_reason == "length"
    assert result.usage.prompt_tokens + result.usage.completion_tokens <= 17


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers() -> None:
    engine = engine_that_says("no", max_context=16)
    with pytest.raises(UserError) as failure:
        engine.generate("a prompt of 30 characters here")
    assert "30 tokens" in failure.value.render() and "16 tokens" in failure.value.render()


@pytest.mark.parametrize("stop", ["fox", ["zebra", "fox"], ("the fox", "fox")])
def test_a_stop_string_ends_the_answer_before_it(stop: str | list[str]) -> None:
    result = engine_that_says("I saw a fox and a wolf").generate(user("?"), stop=stop)
    assert (result.text, result.finish_reason) == ("I saw a ", "stop")


def test_a_prompt_is_read_in_chunks_and_progress_is_told() -> None:
    engine = engine_that_says("ok")
    calls: list[tuple[int, int]] = []
    engine.generate("x" * 1200 + ":", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(512, 1201), (1024, 1201), (1201, 1201)]
    executor = engine.executor
    assert isinstance(executor, ScriptedExecutor) and max(executor.steps) <= CHUNK


def test_the_same_seed_gives_the_same_text() -> None:
    engine = engine_that_says("anything at all")
    first, again, other = (
        engine.generate(user("?"), temperature=3.0, seed=seed, max_tokens=40).tokens for seed in (1, 1, 2)
    )
    assert first == again != other


def test_scores_do_not_depend_on_how_tokens_are_cut() -> None:
    engine = engine_that_says("!")
    ids = engine.tokenizer.encode("some tokens to score " * 40)
    whole = engine.score(ids)
    assert whole.shape == (len(ids), engine.vocab_size) and whole.dtype == np.float32
    session = engine.session()
    parts = [session.step(ids[start : start + 7]) for start in range(0, len(ids), 7)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temprature": 1.0}, "did you mean `temperature`"),
        ({"temperature": -1}, "temperature must be a number from 0"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"top_p": 0}, "top_p must be a number above 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"thinking": "yes"}, "thinking"),
        ({"progress": 3}, "progress"),
    ],
)
def test_a_wrong_option_is_an_error_that_says_what_is_right(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as failure:
        engine_that_says("no").generate(user("?"), **options)  # type: ignore[arg-type]
    assert words in failure.value.render()


@pytest.mark.parametrize("prompt", ["", [], [{"content": "no role"}], [-1], [10**6], ["text"]])
def test_a_prompt_that_is_none_is_an_error(prompt: object) -> None:
    with pytest.raises(UserError):
        engine_that_says("no").generate(prompt)  # type: ignore[arg-type]


def test_messages_need_a_template() -> None:
    with pytest.raises(UserError, match="no chat template"):
        engine_that_says("no", template=None).generate(user("?"))


def test_cancel_takes_effect_within_one_step() -> None:
    engine = engine_that_says("x" * 1000)
    stream = engine.stream(user("?"), max_tokens=2000)
    shown = [next(stream) for _ in range(5)]
    stream.cancel()
    shown += list(stream)
    assert stream.result is not None and stream.result.finish_reason == "cancelled"
    assert len(shown) <= 6 and stream.result.text == "".join(piece.text for piece in shown)


def test_cancel_while_the_prompt_is_read_waits_for_one_chunk_at_most() -> None:
    engine = engine_that_says("never")
    executor = engine.executor
    assert isinstance(executor, ScriptedExecutor)
    executor.before_step = engine.cancel
    result = engine.generate("x" * 3000)
    assert (result.finish_reason, result.text, executor.steps) == ("cancelled", "", [CHUNK])


def test_cancelling_everything_leaves_later_requests_alone() -> None:
    engine = engine_that_says("fine")
    engine.cancel()
    assert engine.generate(user("?")).text == "fine"


def test_cancelling_one_stream_leaves_the_others_alone() -> None:
    engine = engine_that_says("a long enough answer")
    first, second = engine.stream(user("1")), engine.stream(user("2"))
    next(first)
    next(second)
    first.cancel()
    assert first.finish().finish_reason == "cancelled"
    assert second.finish().text == "a long enough answer"


def test_many_threads_share_one_engine() -> None:
    engine = engine_that_says(lambda prompt: f"echo {prompt[-6:]}")
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = engine.generate(user(f"number {number:04d}")).text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: f"echo r {number:04d}" for number in range(12)}
    assert engine.metrics.requests == 12 and engine.metrics.failed == 0


def test_closing_twice_is_harmless_and_a_closed_engine_says_so() -> None:
    engine = engine_that_says("x")
    engine.close()
    engine.close()
    executor = engine.executor
    assert isinstance(executor, ScriptedExecutor) and executor.closed == 1
    with pytest.raises(UserError, match="closed"):
        engine.generate(user("?"))


def test_an_engine_refuses_to_work_in_a_forked_child() -> None:
    engine = engine_that_says("x")
    engine._process = os.getpid() + 1  # what a child would see
    with pytest.raises(UnsupportedError, match="parent process"):
        engine.generate(user("?"))


def test_a_failing_step_raises_and_frees_the_session() -> None:
    engine = engine_that_says("fine again")
    executor = engine.executor
    assert isinstance(executor, ScriptedExecutor)
    session = engine.session()

    def fail() -> None:
        raise RuntimeError("device lost")

    executor.before_step = fail
    with pytest.raises(RuntimeError, match="device lost"):
        session.generate(user("?"))
    executor.before_step = lambda: None
    assert session.generate(user("?")).text == "fine again"
    assert (engine.metrics.requests, engine.metrics.failed) == (2, 1)


def test_metrics_add_up() -> None:
    engine = engine_that_says("four")
    engine.generate(user("?"))
    engine.generate(user("?"))
    metrics = engine.metrics
    assert (metrics.requests, metrics.completion_tokens, metrics.cancelled) == (2, 8, 0)
    assert metrics.prefill_seconds > 0
