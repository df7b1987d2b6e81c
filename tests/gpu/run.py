"""All that is to be shown on a real GPU: ``python3 tests/gpu/run.py PART ... [--carried DIR] [--out results.json]``.

Needs a checkout and torch with CUDA, triton, cuda-bindings; nothing is installed. All parts of a call end after
``--minutes``: which did not finish is in the results, and several calls on one GPU gather theirs in one file.
``--carried`` is what prepare.py made; without it artifacts and plans are made on the spot. ``--dry`` runs the parts at
tiny shapes on a driver in memory: it shows that they run, and measures nothing. Exit status 1 if anything deviates or
is not finished, 3 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.pop("TRITON_INTERPRET", None)

import torch

from arkinfer.exporters.kernels.triton.kernel import ARCHS
from tests.gpu import clock, dry, engine, peers, shapes, speed

Row = dict[str, Any]
DEPTHS = (0, 8192, 32768, 131072)
LENGTHS = (512, 8192, 32768, 131072)
NEEDLES = (8192, 32768, 131072)
TARGETS = {"sm_87": "jetson-orin-cuda", "sm_89": "rtx-4090", "sm_90": "h100"}


@dataclass(frozen=True)
class Call:
    """One call of this script."""

    level: str
    folder: Path  # carried, or made on the spot
    seed: int
    only: list[str]
    dry: bool
    seen: list[Row]  # rows of every part so far
    bandwidth: float
    peak: float

    @property
    def timed(self) -> tuple[tuple[str, str], ...]:
        return shapes.TINY if self.dry else shapes.TIMED

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Depths of decoding, lengths of prompts."""
        return ((0, 200), (100,)) if self.dry else (DEPTHS, LENGTHS)

    def shape(self, shape: str, weights: str) -> Path:
        folder = self.folder / f"shape-{shape}-{weights}"
        if not folder.exists():
            shapes.write(folder, shape, weights, self.level, 1024 if self.dry else shapes.CONTEXT, not self.dry)
        return folder


def kernel_checks(call: Call) -> Iterator[Row]:
    from tests.gpu import kernels

    if call.dry:  # the launches themselves: tests/kernels/triton/interpret.py runs their code
        yield {"case": f"{len(list(kernels.larger()))} launches described", "ok": True}
        return
    yield from kernels.checks(call.level, call.seed, call.only)


def kernel_timings(call: Call) -> Iterator[Row]:
    from tests.gpu import kernels

    if not call.dry:
        yield from kernels.timings(call.level, call.bandwidth)


def whole_engine(call: Call) -> Iterator[Row]:
    if not list(call.folder.glob("*.expected.json")):
        from tests.gpu import prepare

        for name in prepare.ARTIFACTS:
            prepare.artifact(call.folder, name, TARGETS[call.level])
    for file in sorted(call.folder.glob("*.expected.json")):
        with dry.gpu(call.folder / f"{file.name.removesuffix('.expected.json')}.ark", call.dry):
            yield engine.tokens(file)


def needle(call: Call) -> Iterator[Row]:
    artifact = call.folder / "needle.ark"
    if not artifact.exists():
        from tests.gpu import prepare

        prepare.needle(call.folder, TARGETS[call.level], 1024 if call.dry else 131136)
    for length in (300,) if call.dry else NEEDLES:
        for attention in ("auto", "dense"):
            with dry.gpu(artifact, call.dry):
                yield engine.needles(artifact, length, attention)


def decode(call: Call) -> Iterator[Row]:
    for shape, weights in call.timed:
        folder = call.shape(shape, weights)
        with dry.gpu(folder, call.dry):
            yield from speed.decode(folder, call.sizes[0], call.bandwidth, *((2, 1) if call.dry else (32, 5)))


def prefill(call: Call) -> Iterator[Row]:
    for shape, weights in call.timed:
        folder = call.shape(shape, weights)
        with dry.gpu(folder, call.dry):
            yield from speed.prefill(folder, call.sizes[1], call.peak)


def torch_peers(call: Call) -> Iterator[Row]:
    large, other = (call.timed[0][0], call.timed[-1][0])
    for shape, weights in ((large, "fp16"), (large, "int4"), (other, "fp16")):
        yield from peers.rows(shape, weights, *call.sizes)


def sanitizer(call: Call) -> Iterator[Row]:
    tool = shutil.which("compute-sanitizer")
    if tool is None or call.dry:
        yield {"skipped": "compute-sanitizer is not installed" if tool is None else "there is no GPU"}
        return
    carried = ["--carried", str(call.folder)]
    for parts, more in ((["kernels"], []), (["engine"], carried)):
        command = [tool, "--error-exitcode", "9", sys.executable, __file__, *parts, *more, "--minutes", "3"]
        command += ["--out", os.devnull]  # what is slow under the tool need not come to its end
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
        yield {
            "parts": parts,
            "status": done.returncode,
            "summary": last[-1:],
            "ok": bool(last) and done.returncode != 9,
        }


PARTS: dict[str, Callable[[Call], Iterator[Row]]] = {
    "kernels": kernel_checks,
    "engine": whole_engine,
    "needle": needle,
    "decode": decode,
    "prefill": prefill,
    "peers": torch_peers,
    "timings": kernel_timings,
    "sanitizer": sanitizer,
}


def present(as_dry: bool) -> str | None:
    """Return the level of the GPU here, or None with a word on why not."""
    if as_dry:
        return "sm_89"
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked", file=sys.stderr)
        return None
    major, minor = torch.cuda.get_device_capability()
    if f"sm_{major}{minor}" not in ARCHS:
        print(f"sm_{major}{minor} has no tuning table; known: {', '.join(ARCHS)}", file=sys.stderr)
        return None
    return f"sm_{major}{minor}"


def hardware(level: str, as_dry: bool) -> Row:
    import triton

    name = "a driver in memory" if as_dry else torch.cuda.get_device_name()
    return {"device": name, "level": level, "torch": torch.__version__, "triton": triton.__version__,
            "cuda": torch.version.cuda, "python": platform.python_version()}  # fmt: skip


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", default="gpu-results.json")
    parser.add_argument("--carried", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="kernels to check")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args(words)
    wanted = arguments.parts or list(PARTS)
    if unknown := [part for part in wanted if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    level = present(arguments.dry)
    if level is None:
        return 3
    out, stop = Path(arguments.out), time.monotonic() + 60 * arguments.minutes
    facts = hardware(level, arguments.dry)
    results: Row = {"hardware": facts, "parts": {}}
    if out.is_file():
        before = json.loads(out.read_text(encoding="utf-8"))
        if before["hardware"] != facts:
            parser.error(f"{out} is of other hardware: {before['hardware']}")
        results = before
    with tempfile.TemporaryDirectory(prefix="arkinfer-gpu-") as made:
        bandwidth, peak = (1.0, 1.0) if arguments.dry else (clock.copy_bandwidth(), clock.matrix_peak())
        seen = [row for part in results["parts"].values() for row in part["rows"]]
        folder = (arguments.carried or Path(made)).resolve()
        call = Call(level, folder, arguments.seed, arguments.only, arguments.dry, seen, bandwidth, peak)
        for name in wanted:
            part = results["parts"][name] = {
                "date": time.strftime("%Y-%m-%d %H:%M"), "seed": arguments.seed, "copy_bytes_per_second": bandwidth,
                "matrix_operations_per_second": peak, "rows": [], "complete": False,
            }  # fmt: skip
            _run(name, call, part, stop)
            results["goals"] = speed.goals([row for each in results["parts"].values() for row in each["rows"]])
            if arguments.out != os.devnull:
                out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    rows = [row for name in wanted for row in results["parts"][name]["rows"]]
    wrong = [row for row in rows if row.get("ok") is False]
    left = [name for name in wanted if not results["parts"][name]["complete"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} rows are right on {facts['device']}; {arguments.out} written")
    if left:
        print(f"not finished: {', '.join(left)}")
    return 1 if wrong or left else 0


def _run(name: str, call: Call, part: Row, stop: float) -> None:
    begin = time.monotonic()
    try:
        for row in PARTS[name](call):
            part["rows"].append(row)
            print(name, json.dumps(row), flush=True)
            if time.monotonic() > stop:
                break
        else:
            part["complete"] = True
    except Exception:
        part["rows"].append({"ok": False, "failure": traceback.format_exc().strip().splitlines()[-1]})
        print(name, traceback.format_exc(), flush=True)
    part["seconds"] = time.monotonic() - begin


if __name__ == "__main__":
    sys.exit(main())
