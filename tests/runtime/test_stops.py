"""Stop strings: however the text is cut, the same part of it is shown, and no part of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkinfer.runtime.stops import StopFilter


def run(stops: list[str], parts: list[str]) -> tuple[str, str | None, list[str]]:
    stop_filter = StopFilter(stops)
    shown = [stop_filter.push(part) for part in parts]
    if stop_filter.hit is None:
        shown.append(stop_filter.flush())
    return "".join(shown), stop_filter.hit, shown


@pytest.mark.parametrize(
    ("stops", "text", "shown", "hit"),
    [
        (["END"], "abcENDxyz", "abc", "END"),
        (["END"], "abcEN", "abcEN", None),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo", "\n\n"),
        (["aab"], "aaab", "a", "aab"),
        (["abcd", "bc"], "xabcd", "xa", "bc"),  # completes first
        (["abc", "c"], "xabc", "x", "abc"),  # completes at the same time: the longer
        (["<|im_end|>", "User:"], "Sure. User: again", "Sure. ", "User:"),
        (["。"], "你好。再见", "你好", "。"),
        ([], "anything", "anything", None),
    ],
)
def test_what_is_shown(stops: list[str], text: str, shown: str, hit: str | None) -> None:
    assert run(stops, [text])[:2] == (shown, hit)
    assert run(stops, list(text))[:2] == (shown, hit)


def test_text_that_cannot_begin_a_stop_is_not_held() -> None:
    assert run(["xyz"], ["abx", "a", "xy", "z!"])[2] == ["ab", "xa", "", ""]


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.text("abc", max_size=4), max_size=12))
def test_cutting_the_text_differently_changes_nothing(stops: list[str], parts: list[str]) -> None:
    text = "".join(parts)
    whole, pieces = run(stops, [text]), run(stops, parts)
    assert whole[:2] == pieces[:2] == run(stops, list(text))[:2]
    if whole[1] is None:
        assert whole[0] == text
        assert not any(stop in text for stop in stops)
