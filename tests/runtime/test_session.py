"""A conversation: what has been read once is not read again, and nobody talks over anybody."""

from __future__ import annotations

import threading

import pytest

from arkinfer.errors import UserError
from tests.runtime.scripted import ScriptedExecutor, engine_that_says, user


def test_a_second_turn_reads_only_what_is_new() -> None:
    engine = engine_that_says(lambda prompt: f"answer {prompt.count('<|user|>')}")
    session = engine.session(system="Be brief.")
    assert session.chat("First question, rather long").text == "answer 1"
    second = session.chat("Second?")
    assert second.text == "answer 2"
    assert second.usage.cached_tokens > len("First question, rather long")
    fresh = second.usage.prompt_tokens - second.usage.cached_tokens
    assert fresh <= len("Second?") + 4
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_session_answers_as_a_fresh_one_would() -> None:
    engine = engine_that_says(lambda prompt: f"[{len(prompt)}]")
    session = engine.session()
    history: list[dict[str, object]] = []
    for question in ("one", "two", "three"):
        history += user(question)
        kept, fresh = session.chat(question), engine.generate(history)
        assert kept.text == fresh.text
        history.append({"role": "assistant", "content": kept.text})


def test_a_prompt_that_differs_early_is_read_anew_from_there() -> None:
    engine = engine_that_says("ok")
    session = engine.session()
    session.generate("aaaaaaaaaa:")
    result = session.generate("aaaaabbbbb:")
    assert (result.text, result.usage.cached_tokens) == ("ok", 5)


def test_the_same_prompt_again_computes_one_token() -> None:
    engine = engine_that_says("ok")
    session = engine.session()
    session.generate("the same:")
    assert session.generate("the same:").usage.cached_tokens == len("the same:") - 1


def test_truncating_forgets_exactly_the_end() -> None:
    engine = engine_that_says("!")
    session = engine.session()
    before = session.step([20, 21, 22, 23])
    session.truncate(2)
    assert (session.length, session.tokens) == (2, (20, 21))
    assert (session.step([22, 23]) == before[2:]).all()
    for length in (-1, 5):
        with pytest.raises(UserError, match="cannot cut"):
            session.truncate(length)


def test_a_fork_goes_its_own_way() -> None:
    engine = engine_that_says(lambda prompt: prompt[-3:])
    session = engine.session()
    session.chat("abc")
    twin = session.fork()
    assert twin.chat("def").text == "def"
    assert len(session.messages) == 2 and session.length < twin.length


def test_reset_keeps_the_system_message() -> None:
    session = engine_that_says("x").session(system="Be kind.")
    session.chat("hello")
    session.reset()
    assert (session.length, session.messages) == (0, ({"role": "system", "content": "Be kind."},))


def test_a_step_beyond_the_context_changes_nothing() -> None:
    session = engine_that_says("x", max_context=8).session()
    session.step([10] * 6)
    with pytest.raises(UserError, match="context is full") as failure:
        session.step([10] * 3)
    assert failure.value.facts == {"in the context": 6, "new tokens": 3, "capacity": 8}
    assert session.length == 6


def test_an_unfinished_stream_keeps_the_session_busy_until_it_is_closed() -> None:
    session = engine_that_says("a long answer").session()
    stream = session.chat_stream("?")
    next(stream)
    with pytest.raises(UserError, match="at work"):
        session.chat("again?")
    with pytest.raises(UserError, match="at work"):
        session.truncate(0)
    stream.close()
    assert session.chat("again?").text == "a long answer"


def test_leaving_the_loop_frees_the_session() -> None:
    session = engine_that_says("a long answer").session()
    for piece in session.chat_stream("?"):
        assert piece.text == "a"
        break
    assert session.messages[-1] == {"role": "assistant", "content": "a"}
    assert session.chat("again?").text == "a long answer"


def test_a_stream_that_was_never_read_frees_the_session() -> None:
    session = engine_that_says("fine").session()
    session.chat_stream("?")
    assert session.messages == ()
    assert session.chat("?").text == "fine"


def test_two_threads_on_one_session_are_told_so() -> None:
    engine = engine_that_says("slow")
    executor = engine.executor
    assert isinstance(executor, ScriptedExecutor)
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(10)

    executor.before_step = wait
    session = engine.session()
    worker = threading.Thread(target=session.chat, args=("?",))
    worker.start()
    assert inside.wait(10)
    try:
        with pytest.raises(UserError, match="at work") as failure:
            session.step([10])
    finally:
        go_on.set()
        worker.join()
    assert "one session per thread" in failure.value.hint
    assert session.messages[-1]["content"] == "slow"


def test_cancel_from_another_thread_keeps_what_was_said() -> None:
    engine = engine_that_says("one two three four")
    session = engine.session()
    stream = session.chat_stream("count")
    next(stream)
    canceller = threading.Thread(target=session.cancel)
    canceller.start()
    canceller.join()
    result = stream.finish()
    assert (result.finish_reason, result.text) == ("cancelled", "o")
    assert session.messages[-1]["content"] == "o"


def test_an_error_leaves_the_conversation_as_it_was() -> None:
    engine = engine_that_says("x")
    executor = engine.executor
    assert isinstance(executor, ScriptedExecutor)
    session = engine.session()
    session.chat("hello")
    before = session.messages

    def fail() -> None:
        raise RuntimeError("device lost")

    executor.before_step = fail
    with pytest.raises(RuntimeError):
        session.chat("and now?")
    assert session.messages == before


def test_a_step_that_fails_half_way_leaves_the_context_as_it_was() -> None:
    engine = engine_that_says("x")
    executor = engine.executor
    assert isinstance(executor, ScriptedExecutor)
    session = engine.session()
    expected = engine.session().step([10, 11, 12])
    session.step([10, 11])

    def fail(context: list[int]) -> int:
        raise RuntimeError("device lost")

    reply, executor.reply = executor.reply, fail
    with pytest.raises(RuntimeError):
        session.step([13])
    executor.reply = reply
    assert session.length == len(session.tokens) == 2
    assert (session.step([12]) == expected[2:]).all()


@pytest.mark.parametrize("message", ["", "  \n"])
def test_an_empty_message_is_refused(message: str) -> None:
    with pytest.raises(UserError, match="empty"):
        engine_that_says("x").session().chat(message)
