"""`arkinfer bench`: llama-bench's columns, the machine's limits beside them."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Arkinfer
from tests.runtime.scripted import ScriptedExecutor

ROW = {"test", "depth", "tok_s", "samples", "limit_tok_s", "percent_of_limit", "ttft_ms", "filled"}


def test_json_rows_and_machine(arkinfer: Arkinfer, ark: str) -> None:
    done = arkinfer("bench", ark, "-p", "16", "-n", "8", "-d", "0,100", "-r", "3", "--json")
    report = json.loads(done.out)
    assert [(row["test"], row["depth"]) for row in report["rows"]] == [
        ("pp16", 0),
        ("tg8", 0),
        ("pp16", 100),
        ("tg8", 100),
    ]
    for row in report["rows"]:
        assert set(row) == ROW
        assert len(row["samples"]) == 3 and min(row["samples"]) <= row["tok_s"] <= max(row["samples"])
        assert row["filled"] is (row["depth"] > 0)
        assert (row["ttft_ms"] is not None) is row["test"].startswith("pp")
    answer = report["rows"][1]
    assert answer["limit_tok_s"] == pytest.approx(2e9 / (1_000_000 + 100 * 4), rel=1e-6)
    assert answer["percent_of_limit"] == pytest.approx(100 * answer["tok_s"] / answer["limit_tok_s"], abs=0.01)
    machine = report["machine"]
    assert machine["threads"] == 1 and machine["isa"] == "scripted" and machine["read_bandwidth_gb_s"] == 2.0
    assert machine["peak_gop_s"] is None  # this backend measures none: no limit is made up
    assert report["rows"][0]["limit_tok_s"] is None
    assert {"arkinfer", "python", "numpy", "scriptkit"} <= set(machine["versions"])


def test_a_peak_gives_prompts_a_limit(arkinfer: Arkinfer, ark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedExecutor, "peak_ops", lambda self: 4e10)
    row = json.loads(arkinfer("bench", ark, "-p", "16", "-n", "0", "-r", "1", "--json").out)["rows"][0]
    assert row["limit_tok_s"] == pytest.approx(4e10 / 2_000_000)


def test_the_table_is_markdown(arkinfer: Arkinfer, ark: str) -> None:
    lines = arkinfer("bench", "--artifact", ark, "-p", "16", "-n", "4", "-r", "1").out.splitlines()
    assert lines[0].startswith("| test | depth | tok/s |") and lines[1].startswith("|---|")
    assert lines[2].startswith("| pp16 | 0 |") and lines[3].startswith("| tg4 | 0 |")
    assert "read 2.0 GB/s" in lines[-1] and "weights int4" in lines[-1]


def test_threads_come_from_the_option_or_the_environment(
    arkinfer: Arkinfer, ark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("bench", ark, "-p", "1", "-n", "0", "-r", "1", "--json")
    monkeypatch.setenv("ARKINFER_THREADS", "3")
    assert json.loads(arkinfer(*small).out)["machine"]["threads"] == 3
    assert json.loads(arkinfer(*small, "--threads", "2").out)["machine"]["threads"] == 2


def test_default_sizes_shrink_to_a_small_context_and_asked_ones_do_not(arkinfer: Arkinfer, bare_ark: str) -> None:
    rows = json.loads(arkinfer("bench", bare_ark, "-r", "1", "--json").out)["rows"]
    assert [row["test"] for row in rows] == ["pp64", "tg64"]
    done = arkinfer("bench", bare_ark, "-p", "65")
    assert done.status == 1 and "does not fit" in done.err and "64" in done.err


@pytest.mark.parametrize("depths", ["0,x", "-1", ""])
def test_a_list_that_is_none_is_a_usage_error(arkinfer: Arkinfer, ark: str, depths: str) -> None:
    assert arkinfer("bench", ark, "-d", depths).status == 2
