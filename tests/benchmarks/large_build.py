"""Build a checkpoint and open the result, each in a process of its own; say how long it took and how much memory.

    python tests/benchmarks/random_checkpoint.py m8t --shape 8b --ternary
    python tests/benchmarks/large_build.py m8t m8-ternary.ark --weights ternary
    python tests/benchmarks/large_build.py m8t m8-int4.ark --weights int4 --out RESULTS.json

``peak_mb`` is VmHWM, which counts pages of mapped files; ``peak_anonymous_mb`` is the largest RssAnon that was seen,
which cannot be given back under pressure. ``compilers_peak_mb`` is the largest sum of the compiler processes' memory.
The page cache is emptied of the files in question first, by posix_fadvise. ``other_load`` is what other processes took
of the machine meanwhile, in cores: figures of a busy machine are no better than its neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

BUILD = """
import json, sys, time
from arkinfer import pipeline
model, out, weights, verify = sys.argv[1:]
began, stages = time.monotonic(), []
def progress(stage, done, total):
    if not stages or stages[-1][0] != stage:
        stages.append((stage, time.monotonic() - began))
artifact = pipeline.build(model, out=out, weights=weights, verify=verify, force=True, progress=progress)
ended = time.monotonic() - began
print(json.dumps({"stages_begin_s": stages, "seconds": ended, "parity": artifact.manifest.parity,
                  "bytes": sum(entry.size for entry in artifact.manifest.files.values())}))
"""
OPEN = """
import json, sys, time
began = time.monotonic()
import arkinfer
imported = time.monotonic()
engine = arkinfer.load(sys.argv[1])
opened = time.monotonic()
engine.session().step([1])
first = time.monotonic()
engine.generate("x", max_tokens=8, temperature=0)
print(json.dumps({"import_s": imported - began, "open_s": opened - imported, "first_step_s": first - opened}))
"""


def cpu_seconds() -> tuple[float, float]:
    """Return the seconds that all processes, and this one's dead children, have used."""
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]
    return busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[2:4])


def status(process: int) -> dict[str, int]:
    """Return the memory fields of a process in kB; empty if it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("Vm", "Rss"))}


def children(process: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{process}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def measured(code: str, arguments: list[str]) -> dict[str, Any]:
    """Run ``code`` in a Python of its own; return what it prints, its time and its memory."""
    peak = {"VmHWM": 0, "RssAnon": 0, "compilers": 0}
    before, began = cpu_seconds(), time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)

    def watch() -> None:
        while process.poll() is None:
            fields = status(process.pid)
            for name in ("VmHWM", "RssAnon"):
                peak[name] = max(peak[name], fields.get(name, 0))
            total = sum(status(child).get("VmRSS", 0) for child in children(process.pid))
            peak["compilers"] = max(peak["compilers"], total)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    text = process.communicate()[0]
    watcher.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    after, seconds = cpu_seconds(), time.monotonic() - began
    own = after[1] - before[1]
    return {
        **json.loads(text.splitlines()[-1]),
        "process_s": seconds,
        "cpu_s": own,
        "other_load": max(0.0, after[0] - before[0] - own) / seconds,
        "peak_mb": peak["VmHWM"] * 1024 / 1e6,
        "peak_anonymous_mb": peak["RssAnon"] * 1024 / 1e6,
        "compilers_peak_mb": peak["compilers"] * 1024 / 1e6,
    }


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--verify", default="none")
    parser.add_argument("--out", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    forget(options.model)
    results = {"weights": options.weights, "verify": options.verify}
    results["build"] = measured(BUILD, [str(options.model), str(options.artifact), options.weights, options.verify])
    results["open_warm"] = measured(OPEN, [str(options.artifact)])
    forget(options.artifact)
    results["open_cold"] = measured(OPEN, [str(options.artifact)])
    text = json.dumps(results, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
