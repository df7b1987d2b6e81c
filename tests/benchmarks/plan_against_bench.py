"""Compare what `arkinfer plan` estimates with what the artifact does, in alternating rounds.

python tests/benchmarks/plan_against_bench.py MODEL OUT.ark [--threads 1 --own-time] [--rounds 5] [--depths 0,8192]

OUT.ark is a build of MODEL. Each round measures the machine's rates, as plan does, then pp512 and steps of one token at
each depth; the record holds every round and the medians of the ratios. ``--own-time`` counts the time that the calling
thread was running instead of the clock's, with one thread: other work on the machine then matters less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from arkinfer import backends, planning, targets
from arkinfer import rates as measuring
from arkinfer.artifact import Artifact
from arkinfer.backends.base import Executor, State
from arkinfer.estimate import Factors
from arkinfer.targets import probe

STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("artifact")
    parser.add_argument("--threads", type=int, default=probe.cores())
    parser.add_argument("--own-time", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depths", default="0,8192,32768")
    options = parser.parse_args()
    if options.own_time and options.threads != 1:
        parser.error("--own-time needs --threads 1: the time of other threads would not count")
    artifact = Artifact.open(options.artifact)
    manifest = artifact.manifest
    executor = backends.open(artifact, options.threads, None)
    clock = time.thread_time if options.own_time else time.perf_counter
    depths = [depth for depth in map(int, options.depths.split(",")) if depth + planning.PROMPT <= manifest.context]
    state = executor.new_state(max(depths) + planning.PROMPT)
    rows: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for depth in depths:
            _bring(executor, state, depth)
            found = measuring.rates(targets.load("cpu"), Factors(), options.threads)
            plan = planning.plan(
                options.model, weights=manifest.weights, kv=manifest.kv, context=manifest.context, rates=found
            )
            speed = next(speed for speed in plan.speeds if speed.depth == depth)
            taken = {
                "pp512": planning.PROMPT / _seconds(executor, state, depth, clock, planning.PROMPT, 1),
                "tg": 1 / _seconds(executor, state, depth, clock, 1, STEPS),
            }
            for test, planned in (("pp512", speed.prefill_tok_s), ("tg", speed.decode_tok_s)):
                assert planned is not None
                rows.append(
                    {
                        "test": test,
                        "depth": depth,
                        "planned": round(planned, 2),
                        "measured": round(taken[test], 2),
                        "ratio": round(planned / taken[test], 3),
                        "rates": found.to_dict(),
                        "load": round(os.getloadavg()[0], 2),
                    }
                )
    summary = [
        {"test": test, "depth": depth, "ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
        for test in ("pp512", "tg")
        for depth in depths
        if (ratios := [row["ratio"] for row in rows if row["test"] == test and row["depth"] == depth])
    ]
    record = {
        "artifact": manifest.name,
        "weights": manifest.weights,
        "processor": probe.machine().processor,
        "threads": options.threads,
        "clock": "the calling thread's own time" if options.own_time else "wall",
        "factors": Factors().to_dict(),
        "summary": summary,
        "rows": rows,
    }
    print(json.dumps(record, indent=1))


def _bring(executor: Executor, state: State, depth: int) -> None:
    if depth:
        executor.fill(state, depth)
    else:
        state.truncate(0)


def _seconds(executor: Executor, state: State, depth: int, clock: Any, tokens: int, steps: int) -> float:
    """Return the seconds of a step of ``tokens`` tokens at ``depth``: the median of ``steps`` after one to warm up."""
    ids = [(7919 * index + 11) % executor.vocab_size for index in range(tokens)]
    times = []
    for _ in range(steps + 1):
        state.truncate(depth)
        begin = clock()
        executor.step(ids, state, "last")
        times.append(clock() - begin)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
