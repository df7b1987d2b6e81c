"""`arkinfer run`: one prompt in, the answer on stdout, everything else on stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Arkinfer
from tests.runtime.scripted import write_artifact

ANSWER = "It is 4, 你好.\n"


def test_the_answer_alone_is_on_stdout(arkinfer: Arkinfer, ark: str) -> None:
    done = arkinfer("run", "--artifact", ark, "2+2?")
    assert (done.status, done.out) == (0, ANSWER)
    speed, parity = done.err.splitlines()
    assert "answer 25 tokens" in speed and "tok/s" in speed and "% of the memory-bandwidth limit" in speed
    assert parity == "verified: mean KL 1.1e-07, top-1 100.00 % over 2048 positions"


def test_the_artifact_may_be_the_first_argument(arkinfer: Arkinfer, ark: str) -> None:
    assert arkinfer("run", ark, "2+2?").out == ANSWER


def test_a_prompt_from_a_file_or_a_pipe(arkinfer: Arkinfer, ark: str, prompt_file: Path) -> None:
    assert arkinfer("run", ark, "-f", str(prompt_file)).out == ANSWER
    assert arkinfer("run", ark, "-", stdin="2+2?\n").out == ANSWER
    assert arkinfer("run", ark, stdin="2+2?\n").out == ANSWER


def test_json_holds_everything_and_nothing_else_is_printed(arkinfer: Arkinfer, ark: str) -> None:
    done = arkinfer("run", ark, "2+2?", "--json", "--max-tokens", "400")
    result = json.loads(done.out)
    assert (result["text"], result["reasoning"], result["finish_reason"]) == ("It is 4, 你好.", "Hm.", "stop")
    assert result["usage"]["completion_tokens"] == len(result["tokens"]) == 25
    assert result["parity"]["passed"] and set(result["timing"]) == {"prefill", "first_token", "decode"}
    assert done.err == ""


def test_no_think_and_stop_reach_the_model(arkinfer: Arkinfer, ark: str) -> None:
    assert arkinfer("run", ark, "2+2?", "--stop", ",").out == "It is 4\n"
    assert arkinfer("run", ark, "2+2?", "--no-think").status == 0


def test_an_answer_of_reasoning_alone_is_said_to_be_that(arkinfer: Arkinfer, tmp_path: Path) -> None:
    done = arkinfer("run", str(write_artifact(tmp_path, "<think>\nHm.")), "2+2?")
    assert (done.status, done.out) == (0, "\n") and "reasoning: --no-think" in done.err


def test_a_cut_answer_is_said_to_be_cut(arkinfer: Arkinfer, bare_ark: str) -> None:
    done = arkinfer("run", bare_ark, "Once:", "--max-tokens", "4")
    assert done.out == " and\n" and "cut at the limit" in done.err


def test_a_model_without_a_template_continues_the_text(arkinfer: Arkinfer, bare_ark: str) -> None:
    assert arkinfer("run", bare_ark, "Once:").out == " and so on\n"
    assert arkinfer("run", bare_ark, "Once:", "--raw").out == " and so on\n"


def test_sampling_repeats_with_a_seed(arkinfer: Arkinfer, ark: str) -> None:
    options = ("run", ark, "?", "--temperature", "5", "--max-tokens", "20", "--json", "--seed")
    first, again, other = (json.loads(arkinfer(*options, seed).out)["tokens"] for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("run",), 2, "Missing the artifact"),
        (("run", "ARK"), 2, "Missing the prompt"),
        (("run", "ARK", "a", "b"), 2, "put quotation marks around it"),
        (("run", "ARK", "a", "-f", "x"), 2, "not both"),
        (("run", "ARK", "x", "--treads", "2"), 2, "--threads"),
        (("run", "ARK", "x", "--max-tokens", "0"), 2, "--max-tokens"),
        (("run", "ARK", "x", "--raw", "--system", "y"), 2, "leave --raw out"),
        (("run", "ARK", "-f", "absent.txt"), 1, "cannot be read"),
        (("run", "ARK", "  "), 1, "the prompt is empty"),
        (("run", "ARK", "x", "--temperature", "-1"), 1, "temperature must be"),
        (("run", "ARK", "x" * 3000), 1, "3002 tokens"),
        (("run", "absent.ark", "x"), 1, "absent.ark"),
    ],
)
def test_mistakes_are_explained(
    arkinfer: Arkinfer, ark: str, arguments: tuple[str, ...], status: int, words: str
) -> None:
    done = arkinfer(*(ark if argument == "ARK" else argument for argument in arguments))
    assert (done.status, done.out) == (status, "")
    assert words in done.err and "Traceback" not in done.err


def test_thinking_on_a_model_without_it(arkinfer: Arkinfer, bare_ark: str) -> None:
    done = arkinfer("run", bare_ark, "x", "--think")
    assert done.status == 1 and "thinking needs messages" in done.err


def test_errors_are_json_too(arkinfer: Arkinfer, ark: str) -> None:
    done = arkinfer("run", ark, "x", "--top-p", "7", "--json")
    error = json.loads(done.out)["error"]
    assert done.status == 1 and error["code"] == "ARK-E221" and "top_p" in error["message"]
    assert done.err == ""


def test_a_damaged_artifact_is_refused(arkinfer: Arkinfer, tmp_path: Path) -> None:
    from tests.runtime.scripted import write_artifact

    place = write_artifact(tmp_path)
    (place / "payload" / "script.txt").write_text("something else")
    done = arkinfer("run", str(place), "x")
    assert done.status == 5 and "error ARK-E5" in done.err and done.out == ""


def test_an_unknown_backend_is_refused(arkinfer: Arkinfer, ark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from arkinfer import backends

    monkeypatch.delitem(backends.BACKENDS, "scripted")
    done = arkinfer("run", ark, "x")
    assert done.status == 5 and "needs the backend `scripted`" in done.err


def test_ctrl_c_is_one_line_and_130(arkinfer: Arkinfer, ark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.runtime.scripted import ScriptedExecutor

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ScriptedExecutor, "step", interrupt)
    done = arkinfer("run", ark, "x")
    assert done.status == 130 and done.err.split() == ["interrupted"]


def test_a_failure_of_ours_says_so(arkinfer: Arkinfer, ark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.runtime.scripted import ScriptedExecutor

    monkeypatch.setattr(ScriptedExecutor, "step", lambda *arguments: 1 / 0)
    done = arkinfer("run", ark, "x")
    assert done.status == 70 and "ZeroDivisionError" in done.err and "ARKINFER_DEBUG" in done.err
