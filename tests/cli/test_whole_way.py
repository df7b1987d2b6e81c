"""The whole way as a new user walks it: build a bundled model, run it, talk with it, measure it, check it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arkinfer as package
from arkinfer.runtime.engine import Engine
from tests.cli.conftest import Arkinfer

ROOT = Path(package.__file__).resolve().parent.parent
STORY = "Tell me a story about a fox."


def shell(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, two threads wide."""
    return subprocess.run(
        [sys.executable, "-m", "arkinfer", *arguments],
        cwd=ROOT,
        env={**os.environ, "ARKINFER_THREADS": "2"},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def report(*arguments: str) -> Any:
    done = shell(*arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    # A build says beforehand what it will take, in one line.
    assert len(done.stderr.splitlines()) == (1 if arguments[0] == "build" else 0), done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("built") / "tiny.ark"
    facts: dict[str, Any] = report("build", "tiny-minicpm", "-o", str(place))
    return facts


@pytest.fixture(scope="module")
def ark(built: dict[str, Any]) -> str:
    return str(built["artifact"])


@pytest.fixture(scope="module")
def engine(ark: str) -> Engine:
    return package.load(ark, threads=2)


def test_the_build_is_verified_and_says_what_it_made(built: dict[str, Any]) -> None:
    assert built["parity"]["passed"] is True and built["parity"]["positions"] > 1000
    assert built["target"] == "cpu" and built["bytes"] < 12e6
    assert Path(built["artifact"]).name == "tiny.ark"


def test_building_again_does_not_replace_it_unasked(arkinfer: Arkinfer, ark: str) -> None:
    done = arkinfer("build", "tiny-minicpm", "-o", ark, "--verify", "none")
    assert done.status == 1 and "--force" in done.err


def test_it_tells_a_story(ark: str) -> None:
    done = shell("run", "--artifact", ark, STORY, "--no-think", "--temperature", "0", "--max-tokens", "60")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 20
    assert "% of the memory-bandwidth limit" in done.stderr and "verified: mean KL" in done.stderr


def test_the_prompt_of_make_demo_is_answered(ark: str) -> None:
    prompt = re.search(r"^PROMPT \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert prompt is not None
    for seed in ("1", "2", "3"):
        assert len(report("run", ark, prompt[1], "--seed", seed)["text"].split()) > 20


def test_greedy_text_is_the_same_every_time_and_with_any_threads(ark: str) -> None:
    options = ("run", ark, STORY, "--temperature", "0", "--max-tokens", "80")
    one, two = (report(*options, "--threads", threads) for threads in ("1", "2"))
    assert one["tokens"] == two["tokens"]
    assert one["text"] == two["text"]


def test_it_thinks_when_asked_to_and_not_otherwise(ark: str) -> None:
    options = ("run", ark, "Who has the red ball?", "--temperature", "0", "--max-tokens", "120")
    thinking, not_thinking = report(*options, "--think"), report(*options, "--no-think")
    assert thinking["reasoning"] and not_thinking["reasoning"] == ""
    assert thinking["text"] and not_thinking["text"]
    assert "think>" not in thinking["text"] + thinking["reasoning"] + not_thinking["text"]


def test_a_conversation_keeps_its_context(ark: str) -> None:
    talk = "My name is Mia. /no_think\n/stats\nWhat is my name? /no_think\n/stats\n/quit\n"
    done = shell("chat", ark, "--temperature", "0", stdin=talk)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    kept = [int(line.split(",")[1].split()[0]) for line in done.stderr.splitlines() if line.startswith("prompts")]
    assert kept[0] == 0 < kept[1]


def test_a_session_computes_what_a_fresh_start_computes(engine: Engine) -> None:
    session = engine.session()
    history: list[dict[str, object]] = []
    for question in ("Who is Suki?", "And what does she like?"):
        history.append({"role": "user", "content": question})
        kept = session.chat(question, temperature=0, max_tokens=40, thinking=False)
        fresh = engine.generate(history, temperature=0, max_tokens=40, thinking=False)
        assert kept.tokens == fresh.tokens
        history.append({"role": "assistant", "content": kept.text})
    assert kept.usage.cached_tokens > 10


def test_logits_do_not_depend_on_how_tokens_are_cut(engine: Engine) -> None:
    ids = engine.tokenizer.encode("The little fox lived near the river and liked to look at the stars. " * 8)
    whole = engine.score(ids)
    assert whole.shape == (len(ids), engine.vocab_size) and whole.dtype == np.float32
    session = engine.session()
    cut = [session.step(ids[:1]), session.step(ids[1:38]), session.step(ids[38:])]
    assert np.array_equal(np.concatenate(cut), whole)
    session.truncate(5)
    assert np.array_equal(session.step(ids[5:]), whole[5:])


def test_forks_and_threads_do_not_disturb_each_other(engine: Engine) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = ["A dog", "The moon", "One day", "In winter"]
    alone = [engine.generate(prompt, temperature=0, max_tokens=12).tokens for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: engine.generate(prompt, temperature=0, max_tokens=12).tokens, prompts))
    assert together == alone
    session = engine.session()
    session.step(engine.tokenizer.encode(prompts[0]))
    twin = session.fork()
    session.step([20, 21])
    assert np.array_equal(twin.step([30, 31]), engine.score([*engine.tokenizer.encode(prompts[0]), 30, 31])[-2:])


def test_it_is_measured(ark: str) -> None:
    facts = report("bench", ark, "-p", "32", "-n", "8", "-d", "0,256", "-r", "2")
    assert [row["test"] for row in facts["rows"]] == ["pp32", "tg8"] * 2
    assert all(row["tok_s"] > 0 and len(row["samples"]) == 2 for row in facts["rows"])
    assert all(row["percent_of_limit"] > 0 for row in facts["rows"] if row["test"] == "tg8")
    assert facts["machine"]["threads"] == 2 and facts["machine"]["read_bandwidth_gb_s"] > 0


def test_it_can_be_verified_and_inspected_afterwards(arkinfer: Arkinfer, ark: str) -> None:
    assert json.loads(arkinfer("verify", ark, "--json").out)["passed"] is True
    assert json.loads(arkinfer("inspect", ark, "--json").out)["model"]["family"] == "minicpm"
    assert "arkinfer.attention" in arkinfer("inspect", ark, "--graph").out


def test_a_model_can_be_inspected_before_it_is_built(arkinfer: Arkinfer) -> None:
    done = arkinfer("inspect", "tiny-minicpm", "--graph")
    assert done.status == 0 and "arkinfer.attention" in done.out, done.err
    assert json.loads(arkinfer("inspect", "tiny-minicpm", "--json").out)["config"]["family"] == "minicpm"


def test_the_ternary_model_and_forced_attention(tmp_path: Path) -> None:
    place = str(tmp_path / "bitcpm.ark")
    facts = report("build", "tiny-bitcpm", "-o", place, "--verify", "none")
    assert facts["weights"] == "ternary" and facts["parity"] is None
    done = shell("run", place, STORY, "--max-tokens", "20", "--attention", "dense")
    assert done.returncode == 0 and "unverified" in done.stderr
    done = shell("run", place, STORY, "--attention", "sparse")
    assert done.returncode == 1 and "no sparse" in done.stderr


def test_wrong_ways_end_with_an_explanation(arkinfer: Arkinfer, tmp_path: Path) -> None:
    for arguments, status, words in (
        (("build", "tiny-minicpn"), 1, "tiny-minicpm"),
        (("build", "tiny-minicpm", "--target", "cup"), 1, "cpu"),
        (("build", "tiny-minicpm", "--context", "99999999"), 1, "2048"),
        (("build", str(tmp_path)), 1, "config.json"),
        (("verify", str(tmp_path)), 5, "manifest.json"),
        (("run", "tiny-minicpm", "hello"), 1, "arkinfer build"),
    ):
        done = arkinfer(*arguments)
        assert done.status == status, (arguments, done.err)
        assert words in done.err, (arguments, done.err)
