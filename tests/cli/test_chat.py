"""`arkinfer chat`: a conversation typed line by line."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cli.conftest import Arkinfer
from tests.runtime.scripted import ScriptedExecutor, write_artifact


def test_a_conversation(arkinfer: Arkinfer, ark: str) -> None:
    done = arkinfer("chat", ark, stdin="2+2?\n/stats\n/reset\nagain?\n/quit\nnever read\n")
    assert done.status == 0
    assert done.out == "Hm.\n\nIt is 4, 你好.\n" * 2
    assert "a new conversation" in done.err and "verified" in done.err
    assert "1 so far" in done.err and "% of the memory-bandwidth limit" in done.err


def test_the_end_of_input_ends_it(arkinfer: Arkinfer, ark: str) -> None:
    done = arkinfer("chat", "--artifact", ark, stdin="\n\n2+2?")
    assert (done.status, done.out) == (0, "Hm.\n\nIt is 4, 你好.\n")


def test_later_turns_keep_the_context(arkinfer: Arkinfer, ark: str) -> None:
    done = arkinfer("chat", ark, stdin="one?\ntwo?\n/stats\n")
    stats = next(line for line in done.err.splitlines() if line.startswith("prompts"))
    assert int(stats.split(",")[1].split()[0]) > 5


def test_commands_are_explained_and_misspellings_caught(arkinfer: Arkinfer, ark: str) -> None:
    done = arkinfer("chat", ark, stdin="/help\n/rest\n")
    assert "/no_think" in done.err and "did you mean `/reset`?" in done.err


def test_thinking_can_be_switched(arkinfer: Arkinfer, ark: str, bare_ark: str) -> None:
    done = arkinfer("chat", ark, stdin="/no_think\n/think\n2+2?\n")
    assert "thinking is off" in done.err and "thinking is on" in done.err
    assert "no thinking mode" in arkinfer("chat", bare_ark, stdin="/think\n").err


def test_an_error_does_not_end_the_conversation(arkinfer: Arkinfer, tmp_path: Path) -> None:
    place = write_artifact(tmp_path, "ok", context=60)
    done = arkinfer("chat", str(place), stdin="x" * 100 + "\nshort\n")
    assert "does not fit into the context" in done.err
    assert (done.status, done.out) == (0, "ok\n")


def test_ctrl_c_ends_the_answer_and_not_the_program(
    arkinfer: Arkinfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_artifact(tmp_path, "a very long answer that somebody interrupts", thinking=False)
    step, count = ScriptedExecutor.step, 0

    def interrupted(self: ScriptedExecutor, *arguments: object, **named: object) -> object:
        nonlocal count
        count += 1
        if count == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(ScriptedExecutor, "step", interrupted)
    done = arkinfer("chat", str(place), stdin="go\n/stats\n")
    assert done.status == 0 and "(cancelled)" in done.err and "context" in done.err
    assert done.out == "a very\n"
