"""How fast the backend decodes and reads prompts at large shapes: its own plan, kernels and graph, random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arkinfer.backends.base import Draw
from tests.gpu import clock
from tests.gpu.shapes import Shape, ShapeExecutor

Row = dict[str, Any]


def opened(folder: Path) -> tuple[ShapeExecutor, dict[str, Any]]:
    shape = Shape(folder)
    return ShapeExecutor(shape, None, None), shape.facts  # type: ignore[arg-type]


def decode(folder: Path, depths: Sequence[int], bandwidth: float, steps: int = 32, repeats: int = 5) -> Iterator[Row]:
    """Yield a row for each depth: graph replays alone, and tokens as the runtime takes them, each read by the host."""
    executor, facts = opened(folder)
    try:
        state = executor.new_state()
        executor.fill(state, max(depths))
        for depth in sorted(depths, reverse=True):
            state.truncate(depth)
            token = executor.sample([7], state, Draw())  # captures the graph
            graph, driver = state.slot.graphs["greedy"], executor.driver

            def replay(graph: Any = graph, driver: Any = driver) -> None:
                for _ in range(steps):
                    driver.replay(graph)

            alone = []
            for _ in range(repeats + 1):
                state.truncate(depth)
                token = executor.sample([token], state, Draw())
                alone.append(clock.by_driver(driver, replay) / steps)
                executor.forget_inputs()
            state.truncate(depth)
            token = executor.sample([token], state, Draw())
            begin = time.perf_counter()
            for _ in range(steps):
                token = executor.sample([token], state, Draw())
            whole = (time.perf_counter() - begin) / steps
            seconds = statistics.median(alone[1:])
            state.truncate(depth)
            read = executor.decode_bytes(depth + steps // 2)
            yield {
                **facts,
                "what": "decode",
                "depth": depth,
                "tok_s": 1 / seconds,
                "tok_s_with_reads": 1 / whole,
                "bytes": read,
                "share_of_copy": read / seconds / bandwidth,
            }
    finally:
        executor.close()


def prefill(folder: Path, lengths: Sequence[int], peak: float) -> Iterator[Row]:
    """Yield a row for each length: prompts from an empty context, by events around all of their steps."""
    executor, facts = opened(folder)
    try:
        state = executor.new_state()
        for length in sorted(lengths):
            tokens = [(7919 * index + 11) % executor.vocab_size for index in range(length)]

            def read(tokens: list[int] = tokens) -> None:
                executor.sample(tokens, state, Draw())

            times = []
            for _ in range(3 if length <= 8192 else 1):
                state.truncate(0)
                if not times:
                    executor.step(tokens[:512], state, "none")  # warms up
                    state.truncate(0)
                times.append(clock.by_driver(executor.driver, read))
            seconds = statistics.median(times)
            work = executor.prefill_ops(length, 0)
            yield {
                **facts,
                "what": "prefill",
                "length": length,
                "tok_s": length / seconds,
                "seconds": seconds,
                "share_of_peak": work / seconds / peak,  # of the linear layers alone
            }
    finally:
        executor.close()


def goals(rows: Sequence[Row]) -> list[Row]:
    """Return the goals of this backend that ``rows`` can tell of, with what was found."""

    def one(**wanted: Any) -> Row | None:
        wanted = {"peer": None, **wanted}
        return next((row for row in rows if all(row.get(name) == value for name, value in wanted.items())), None)

    found: list[Row] = []

    def judge(goal: str, value: float | None, reached: bool) -> None:
        if value is not None:
            found.append({"goal": goal, "value": value, "reached": reached})

    for weights in ("fp16", "int4", "ternary"):
        row = one(shape="minicpm4-8b", weights=weights, what="decode", depth=0)
        share = row["share_of_copy"] if row else None
        judge(f"decode {weights} at 8B: 80 % of the copy bandwidth", share, share is not None and share >= 0.8)
        near, far = (one(shape="minicpm4-8b", weights=weights, what="decode", depth=at) for at in (8192, 131072))
        ratio = near["tok_s"] / far["tok_s"] if near and far else None
        judge(f"decode {weights}: 128K within 1.25 of the time at 8K", ratio, ratio is not None and ratio <= 1.25)
        peer = one(peer=True, shape="minicpm4-8b", weights=weights, what="decode", depth=0)
        gain = row["tok_s"] / peer["tok_s"] if row and peer else None
        judge(f"decode {weights}: faster than torch", gain, gain is not None and gain > 1)
    for what, at, least in (("decode", {"depth": 131072}, 7.0), ("prefill", {"length": 131072}, 2.5)):
        ours = one(shape="minicpm4-8b", weights="fp16", what=what, **at)
        dense = one(shape="qwen3-8b", weights="fp16", what=what, **at)
        ratio = ours["tok_s"] / dense["tok_s"] if ours and dense else None
        judge(f"{what} at 128K: {least} times the dense 8B shape", ratio, ratio is not None and ratio >= least)
    return found
