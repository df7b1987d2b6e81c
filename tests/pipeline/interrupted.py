"""Builds one small artifact many times, in forked processes that are stopped at chosen moments, and reports as JSON.

python -m tests.pipeline.interrupted FOLDER: the graph is captured once, before the first fork; what follows it
(weights, journal, compiled code from the cache, sealing) is the pipeline's own.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arkinfer import pipeline
from arkinfer.artifact import Artifact, tensors
from arkinfer.artifact.journal import Journal
from arkinfer.artifact.tensors import TensorWriter
from arkinfer.errors import UserError
from arkinfer.exporters.tvm import TvmExporter
from tests.checkpoints import CONFIGS, write_checkpoint

POINTS = 30
BUILDERS = 4


def failpoint(act: Callable[[], None], at: int, count: list[int]) -> None:
    """Call ``act`` before the ``at``-th of the calls that change the disk."""

    def wrapped(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                act()
            return real(*arguments, **options)

        setattr(owner, name, call)

    for owner, name in (
        (os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (TensorWriter, "_write"), (Journal, "append"),
    ):  # fmt: skip
        wrapped(owner, name)


class Bench:
    """The builds of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = write_checkpoint(folder / "model", CONFIGS["minicpm"])
        torch.set_num_threads(1)  # a forked process has no use for threads that were not forked
        tensors.SAVE_SECONDS = 0.0
        self.build(folder / "warm.ark")  # fills the cache of compiled code
        lower = pipeline.lower
        kept: dict[str, Any] = {}

        def once(*arguments: Any) -> Any:
            if not kept:
                kept["graph"] = lower(*arguments)
            return kept["graph"]

        pipeline.lower = once
        self.build(folder / "again.ark")
        TvmExporter.prepare = lambda *_: None  # all code is in the cache: no compiler need start

    def build(self, out: Path, force: bool = False) -> Artifact:
        return pipeline.build(self.checkpoint, out=out, weights="int4", verify="none", force=force)

    def forked(self, body: Callable[[], object]) -> tuple[int, Any]:
        """Run ``body`` in a process of its own; return its wait status and what it returned, as JSON."""
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            try:
                text = json.dumps(body())
            except BaseException as error:
                facts = {name: str(value) for name, value in getattr(error, "facts", {}).items()}
                notes = getattr(error, "__notes__", [])
                text = json.dumps({"error": type(error).__name__, "facts": facts, "notes": notes})
            os.write(writer, text.encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            text = stream.read()
        return os.waitpid(process, 0)[1], json.loads(text) if text else None

    def resumed(self, out: Path) -> dict[str, Any]:
        """Build ``out`` and tell how many of its weights were there before."""
        found = []
        enter = TensorWriter.__enter__

        def entered(writer: TensorWriter) -> TensorWriter:
            result = enter(writer)
            found.append(len(writer.finished))
            return result

        TensorWriter.__enter__ = entered  # type: ignore[method-assign]
        artifact = self.build(out)
        return {"finished": found[0], "files": _digests(artifact)}

    def stopped(self, name: str, act: Callable[[], None], at: int) -> dict[str, Any]:
        """Stop a build before its call number ``at``, look what is left, and build again."""
        out = self.folder / name / "m.ark"

        def first() -> object:
            failpoint(act, at, [0])
            return _digests(self.build(out))

        status, answer = self.forked(first)
        whole = out.exists() and Artifact.open(out, check="full") is not None
        left = sorted(entry.name for entry in out.parent.iterdir()) if out.parent.exists() else []
        report = {"at": at, "status": status, "answer": answer, "whole": whole, "left": left}
        if not whole:
            report["resumed"] = self.forked(lambda: self.resumed(out))[1]
            report["left after"] = sorted(entry.name for entry in out.parent.iterdir())
        return report


def _digests(artifact: Artifact) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in artifact.manifest.files.items()}


def _interrupt() -> None:
    raise KeyboardInterrupt


def _small_files() -> None:
    """Let no file grow beyond its present size, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))


def main(folder: Path) -> None:
    bench = Bench(folder)
    counted = [0]

    def dry() -> object:
        failpoint(lambda: None, -1, counted)
        return [_digests(bench.build(folder / "dry" / "m.ark")), counted[0]]

    digests, calls = bench.forked(dry)[1]
    points = sorted(random.Random(0).sample(range(1, calls + 1), POINTS))
    report: dict[str, Any] = {"files": digests, "calls": calls}
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    report["killed"] = [bench.stopped(f"kill-{at}", kill, at) for at in points]
    report["interrupted"] = bench.stopped("interrupt", _interrupt, calls // 2)
    report["full"] = bench.stopped("full", _small_files, 30)
    report["together"] = together(bench)
    print(json.dumps(report))


def together(bench: Bench) -> list[dict[str, str]]:
    """Let several builders make one artifact at once, beside the work of one that was killed."""
    out = bench.folder / "together" / "m.ark"

    def killed() -> object:
        failpoint(lambda: os.kill(os.getpid(), signal.SIGKILL), 40, [0])
        return str(bench.build(out))

    bench.forked(killed)
    processes = []
    for _ in range(BUILDERS):
        process = os.fork()
        if process == 0:
            try:
                bench.build(out)
            except UserError as error:
                os._exit(10 if error.code == "ARK-E150" else 11)
            except BaseException:
                os._exit(12)
            os._exit(0)
        processes.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    left = sorted(entry.name for entry in out.parent.iterdir())
    return [{"codes": str(codes), "left": str(left), **_digests(Artifact.open(out, check="full"))}]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
