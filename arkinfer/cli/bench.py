"""`arkinfer bench`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from arkinfer.cli import arguments
from arkinfer.cli.progress import Progress
from arkinfer.errors import UnsupportedError, UserError

if TYPE_CHECKING:
    from arkinfer.artifact import Artifact
    from arkinfer.backends.base import Executor, State

CHUNK = 512  # prompt tokens per step, as the runtime reads prompts


class Numbers(click.ParamType[list[int]]):
    """Numbers separated by commas."""

    name = "numbers"

    def __init__(self, low: int) -> None:
        self._low = low

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            numbers = [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 0,8192", parameter, context)
        if min(numbers) < self._low:
            self.fail(f"{min(numbers)} is less than {self._low}", parameter, context)
        return numbers


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``filled``: the context before the test was filled with random values, not computed."""

    test: str
    depth: int
    tok_s: float
    samples: list[float]
    limit_tok_s: float | None
    percent_of_limit: float | None
    ttft_ms: float | None
    filled: bool


@click.command()
@click.argument("bare", required=False, type=click.Path(), metavar="[OUT.ark]")
@arguments.artifact_option
@click.option("-p", "--prompt", "prompts", type=Numbers(0), help="Prompt sizes; 0: none.  [default: 512]")
@click.option("-n", "--generate", "answers", type=Numbers(0), help="Answer sizes; 0: none.  [default: 128]")
@click.option("-d", "--depth", "depths", type=Numbers(0), default="0", show_default=True, help="Tokens in the context.")
@click.option("-r", "--repeat", type=click.IntRange(1), default=5, show_default=True)
@arguments.engine_options
@arguments.json_option
def command(
    bare: str | None,
    named: str | None,
    prompts: list[int] | None,
    answers: list[int] | None,
    depths: list[int],
    repeat: int,
    threads: int | None,
    attention: str | None,
    as_json: bool,
) -> None:
    """Measure prompt reading (pp) and answering (tg) in tokens/s at each depth: medians of warmed repetitions.

    The limit is the measured memory bandwidth over the bytes that a token must read (tg), or the measured arithmetic
    peak over a token's operations (pp).
    """
    place = arguments.one_artifact(named, bare)
    from arkinfer import backends

    artifact = arguments.open_artifact(place)
    arguments.finish(artifact)
    executor = backends.open(artifact, threads, attention)
    try:
        tests = _tests(executor.max_context, prompts, answers, depths)
        with Progress() as progress:
            machine = _machine(executor, artifact)
            rows = _measure(executor, tests, repeat, machine, progress)
    finally:
        executor.close()
    if as_json:
        arguments.print_json({"rows": [asdict(row) for row in rows], "machine": machine})
    else:
        _table(rows, machine)


def _tests(
    context: int, prompts: list[int] | None, answers: list[int] | None, depths: list[int]
) -> list[tuple[str, int, int]]:
    """Return (pp or tg, tokens, depth) of each test. Sizes that were asked for must fit; defaults shrink to fit."""
    tests = []
    for depth in depths:
        for kind, asked, default in (("pp", prompts, 512), ("tg", answers, 128)):
            for count in asked if asked is not None else [min(default, context - depth)]:
                if depth + count > context or (asked is None and count < 1):
                    raise UserError(
                        f"the test {kind}{max(count, 1)} at depth {depth} does not fit into the context",
                        facts={"needs": depth + max(count, 1), "context of the artifact": context},
                        hint="choose smaller -p, -n or -d, or build with a larger --context",
                        code="ARK-E216",
                    )
                if count:
                    tests.append((kind, count, depth))
    return tests


def _measure(
    executor: Executor, tests: Sequence[tuple[str, int, int]], repeat: int, machine: dict[str, Any], progress: Progress
) -> list[Row]:
    rows: list[Row] = []
    state = executor.new_state(max(depth + count for _, count, depth in tests)) if tests else None
    for kind, count, depth in tests:
        assert state is not None
        name = f"{kind}{count}"
        filled = _bring_to(executor, state, depth)
        run = _read if kind == "pp" else _answer
        samples = []
        for index in range(repeat + 1):
            progress(f"{name} d{depth}", index, repeat + 1)
            state.truncate(depth)
            seconds = run(executor, state, count)
            if index:  # the first run warms up
                samples.append(seconds)
        progress(f"{name} d{depth}", repeat + 1, repeat + 1)
        speeds = [count / seconds for seconds in samples]
        speed = statistics.median(speeds)
        limit = _limit(executor, kind, count, depth, machine)
        rows.append(
            Row(
                test=name,
                depth=depth,
                tok_s=round(speed, 3),
                samples=[round(sample, 3) for sample in speeds],
                limit_tok_s=None if limit is None else round(limit, 3),
                percent_of_limit=None if limit is None else round(100 * speed / limit, 2),
                ttft_ms=round(1000 * statistics.median(samples), 3) if kind == "pp" else None,
                filled=filled,
            )
        )
    return rows


def _bring_to(executor: Executor, state: State, depth: int) -> bool:
    """Make ``state`` ``depth`` tokens long; True if that was done with random values, because computing takes long."""
    if depth == 0:
        state.truncate(0)
        return False
    try:
        executor.fill(state, depth)
        return True
    except UnsupportedError:
        state.truncate(0)
        _read(executor, state, depth)
        return False


def _tokens(executor: Executor, count: int) -> list[int]:
    # Any tokens do: no step's cost depends on which they are. A fixed spread keeps runs comparable.
    return [(7919 * index + 11) % executor.vocab_size for index in range(count)]


def _read(executor: Executor, state: State, count: int) -> float:
    """Return the seconds from the prompt to its first logits."""
    tokens = _tokens(executor, count)
    begin = time.perf_counter()
    for start in range(0, count, CHUNK):
        chunk = tokens[start : start + CHUNK]
        logits = executor.step(chunk, state, "last" if start + CHUNK >= count else "none")
    _ = int(logits[-1].argmax())
    return time.perf_counter() - begin


def _answer(executor: Executor, state: State, count: int) -> float:
    """Return the seconds of ``count`` steps of one token, each chosen (by the executor if it can) from the logits."""
    from arkinfer.backends.base import Draw

    token, largest = _tokens(executor, 1)[0], Draw()
    begin = time.perf_counter()
    for _ in range(count):
        if executor.draws:
            token = executor.sample([token], state, largest)
        else:
            token = int(executor.step([token], state, "last")[0].argmax())
    return time.perf_counter() - begin


def _limit(executor: Executor, kind: str, count: int, depth: int, machine: dict[str, Any]) -> float | None:
    """Return the tokens/s that the machine allows, or None where the backend cannot count or no peak was measured."""
    try:
        if kind == "tg":
            per_token: float = executor.decode_bytes(depth + count // 2)
            rate = 1e9 * machine["read_bandwidth_gb_s"]
        else:
            per_token = executor.prefill_ops(count, depth) / count
            rate = 1e9 * machine["peak_gop_s"] if machine["peak_gop_s"] is not None else 0.0
    except UnsupportedError:
        return None
    return rate / per_token if rate and per_token else None


def _machine(executor: Executor, artifact: Artifact) -> dict[str, Any]:
    import os
    import platform

    import numpy

    import arkinfer
    from arkinfer.targets import probe

    machine = probe.machine()
    peak = _optional(lambda: executor.peak_ops())
    return {
        "processor": machine.processor,
        "cores": machine.cores,
        "memory_bytes": machine.memory,
        "load_average": round(os.getloadavg()[0], 2),
        "threads": executor.threads,
        "isa": executor.isa,
        "read_bandwidth_gb_s": round(executor.bandwidth() / 1e9, 2),
        "peak_gop_s": None if peak is None else round(peak / 1e9, 1),
        "artifact": {
            "name": artifact.manifest.name,
            "digest": artifact.manifest.digest,
            "weights": artifact.manifest.weights,
            "kv": artifact.manifest.kv,
            "attention": artifact.manifest.attention,
            "bytes": arguments.artifact_size(artifact),
        },
        "versions": {
            "arkinfer": arkinfer.__version__,
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            **{str(name): str(version) for name, version in artifact.manifest.toolchain.items()},
        },
    }


def _optional(measure: Callable[[], float]) -> float | None:
    try:
        return measure()
    except UnsupportedError:
        return None


def _table(rows: Sequence[Row], machine: dict[str, Any]) -> None:
    click.echo("| test | depth | tok/s | min-max | limit tok/s | of limit | first token ms |")
    click.echo("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        limit = "-" if row.limit_tok_s is None else f"{row.limit_tok_s:,.1f}"
        share = "-" if row.percent_of_limit is None else f"{row.percent_of_limit:.0f} %"
        first = "-" if row.ttft_ms is None else f"{row.ttft_ms:,.1f}"
        spread = f"{min(row.samples):,.1f}-{max(row.samples):,.1f}"
        depth = f"{row.depth}{' (filled)' if row.filled else ''}"
        click.echo(f"| {row.test} | {depth} | {row.tok_s:,.1f} | {spread} | {limit} | {share} | {first} |")
    artifact = machine["artifact"]
    peak = "not measured" if machine["peak_gop_s"] is None else f"{machine['peak_gop_s']:,.0f} GOP/s"
    click.echo()
    click.echo(
        f"{artifact['name']}: weights {artifact['weights']}, kv {artifact['kv']}, attention {artifact['attention']}, "
        f"{arguments.size(artifact['bytes'])}; {machine['processor']}, {machine['threads']} threads, {machine['isa']}; "
        f"read {machine['read_bandwidth_gb_s']:.1f} GB/s, peak {peak}; arkinfer {machine['versions']['arkinfer']}"
    )
