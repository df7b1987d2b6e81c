"""The plan as data: it comes back from JSON as it was, and nothing that leaves its buffers is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkinfer.artifact.plan import (
    Argument,
    Buffer,
    Image,
    Kernel,
    Launch,
    Plan,
    Pointer,
    Schedule,
    Tap,
    evaluate,
)

DOUBLE = Kernel(
    "double",
    {"width": 8},
    (
        Argument("x", "float32", ("n", 8)),
        Argument("out", "float16", ("n", 4), "out", row_stride=8),
        Argument("count", "int32", ("n",), "scalar"),
    ),
    {"sm_89": Image("a.cubin", "a.ptx", "double", ("(n + 3) // 4", 1, 1), 4, 0)},
)


def schedule(tokens: int, rows: int) -> Schedule:
    scratch = (
        Buffer("x", "float32", ("n", 8), "scratch", 0),
        Buffer("y", "float16", ("n", 8), "scratch", 32 * 512),
    )
    launches = (
        Launch(0, (Pointer("x"), Pointer("y"))),
        Launch(0, (Pointer("x"), Pointer("y", 0))),
    )
    return Schedule(tokens, rows, scratch, launches, 1, (Tap("layer.0", "x", 0),))


PLAN = Plan(
    levels=("sm_89",),
    buffers=(
        Buffer("w", "bfloat16", (3, 5), "parameter"),
        Buffer("control", "int32", (16,), "control"),
        Buffer("tokens", "int32", (512,), "input"),
        Buffer("rows", "int32", (64,), "input"),
        Buffer("cos", "float32", (1024, 2), "input"),
        Buffer("sin", "float32", (1024, 2), "input"),
        Buffer("random", "float32", (1024,), "input"),
        Buffer("logits", "float32", (64, 100), "output"),
        Buffer("token", "int32", (1,), "output"),
    ),
    kernels=(DOUBLE,),
    schedules={"decode": schedule(1, 1), "verify": schedule(8, 8), "prefill": schedule(512, 64)},
    sampling={"greedy": schedule(1, 1), "draw": schedule(1, 1)},
    arena=32 * 512 + 16 * 512,
    facts={
        "max_context": 1000,
        "capacity": 1024,
        "vocab_size": 100,
        "sparse": None,
        "rope": {"inverse_frequencies": ["0x1p+0", "0x1p-4"], "magnitude": "0x1p+0"},
    },
)


def test_a_plan_comes_back_from_its_text() -> None:
    text = PLAN.to_json()
    assert Plan.from_json(text) == PLAN
    assert Plan.from_json(text).to_json() == text


def test_people_can_read_it() -> None:
    text = PLAN.dump()
    for words in ("parameter w: bfloat16[3, 5]", "schedule prefill: n <= 512, r <= 64", "head:", "layer.0 = x"):
        assert words in text
    assert "double<width=8>(x=x, out out=y)" in text


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "format": (_set("format", value=9), "format is 9"),
    "kernel": (_set("schedules", "decode", "launches", 0, "kernel", value=1), "kernel 1 of 1"),
    "buffer": (_set("schedules", "decode", "launches", 0, "pointers", 0, "buffer", value="z"), "z, which there is not"),
    "dtype": (_set("kernels", 0, "arguments", 0, "dtype", value="int8"), "x as int8"),
    "end": (_set("schedules", "prefill", "launches", 0, "pointers", 1, "offset", value=16), "beyond y"),
    "before": (_set("schedules", "prefill", "launches", 0, "pointers", 1, "offset", value=-16), "beyond y"),
    "alignment": (_set("schedules", "prefill", "scratch", 1, "offset", value=8), "arena"),
    "arena": (_set("arena", value=1024), "arena"),
    "kind": (_set("buffers", 0, "kind", value="parcel"), "parcel"),
    "extent": (_set("buffers", 0, "shape", value=["open('x')"]), "uses more than"),
    "head": (_set("schedules", "decode", "head", value=3), "head"),
    "tap": (_set("schedules", "decode", "taps", 0, "after", value=7), "layer.0"),
    "sampling": (lambda data: data["sampling"].pop("draw"), "chooses tokens by greedy"),
    "choice": (_set("sampling", "draw", "launches", 0, "kernel", value=1), "sampling draw: a launch calls kernel 1"),
    "capacity": (lambda data: data["facts"].pop("capacity"), "capacity"),
    "missing": (lambda data: data.pop("kernels"), "kernels"),
    "role": (_set("kernels", 0, "arguments", 0, "role", value="both"), "unknown kind"),
    "short": (_set("kernels", 0, "arguments", 0, "shape", value=["n * (512 - n) + 1", 8]), "beyond x"),
    "few": (_set("kernels", 0, "arguments", 0, "shape", value=["520 - n", 8]), "decode: double reaches beyond x"),
    "grid": (_set("kernels", 0, "images", "sm_89", "grid", 1, value="n * 9999"), "a grid of 128 x 5119488 x 1"),
    "no grid": (_set("kernels", 0, "images", "sm_89", "grid", 2, value="1 - n"), "1 x 0 blocks"),
    "warps": (_set("kernels", 0, "images", "sm_89", "warps", value=64), "no GPU has"),
    "scalar": (_set("kernels", 0, "arguments", 2, "shape", value=["n - 9"]), "count beyond 31 bits"),
    "no scalar": (_set("kernels", 0, "arguments", 2, "shape", value=[]), "malformed"),
    "image": (_set("levels", value=["sm_89", "sm_90"]), "no code for sm_90"),
    "decode": (lambda data: data["schedules"].pop("decode"), "no schedule decode"),
    "tokens": (_set("schedules", "verify", "tokens", value=0), "0 tokens"),
    "context": (_set("facts", "max_context", value=2000), "2000 tokens"),
    "vocabulary": (_set("facts", "vocab_size", value=10**6), "logits is not float32"),
    "control": (_set("buffers", 1, "shape", value=[8]), "control is not int32"),
    "rope": (_set("facts", "rope", "inverse_frequencies", 0, value="fast"), "hex"),
    "table": (lambda data: data["facts"]["rope"]["inverse_frequencies"].append("0x1p-8"), "cos is not float32"),
    "sparse": (_set("facts", "sparse", value={"dense_len": 1}), "topk"),
    "number": (_set("buffers", 0, "shape", value=[1.5]), "malformed"),
    "deep": (_set("buffers", 0, "shape", value=["+".join(["1"] * 5000)]), "malformed|not an expression"),
    "endless": (_set("facts", "capacity", value=float("inf")), "malformed"),
    "arguments": (lambda data: data["schedules"]["decode"]["launches"][0]["pointers"].pop(), "takes 2 pointers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_plan_that_is_not_sound_is_refused(case: str) -> None:
    change, words = WRONG[case]
    data = json.loads(PLAN.to_json())
    change(data)
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        Plan.from_json(json.dumps(data))


@given(st.integers(0, 10**6), st.integers(1, 4096))
def test_expressions(n: int, tile: int) -> None:
    assert evaluate(f"(n + {tile - 1}) // {tile} * 2 - r", {"n": n, "r": 3}) == -(-n // tile) * 2 - 3


@pytest.mark.parametrize(
    "text", ["n ** 9", "__import__('os')", "n if n else r", "1.5", "m", "n //", "(n, r)", "n // 0"]
)
def test_other_expressions_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        evaluate(text, {"n": 1, "r": 1})


@given(st.integers(1, 3000), st.sampled_from(["last", "all", "none"]))
def test_pieces_cover_a_step_once_and_in_order(count: int, logits: str) -> None:
    pieces = PLAN.pieces(count, logits)
    assert pieces[0].start == 0 and pieces[-1].stop == count
    assert all(one.stop == two.start for one, two in pairwise(pieces))
    rows = [piece.start + row for piece in pieces for group in piece.groups for row in group]
    assert rows == {"last": [count - 1], "all": list(range(count)), "none": []}[logits]
    for piece in pieces:
        found = PLAN.schedules[piece.schedule]
        assert piece.stop - piece.start <= found.tokens
        assert all(0 < len(group) <= found.rows for group in piece.groups)
