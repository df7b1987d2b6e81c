"""Compare artifacts of onnx-cpu with onnxruntime-genai on the same weights and formats, in alternating runs.

    python -m onnxruntime_genai.models.builder -m MODEL -i MODEL -o PEER-B32 -p int4 -e cpu -c CACHE
    arkinfer build MODEL --target onnx-cpu --weights int4 --group 32 --head int4 --verify none -o model-b32.ark
    python tests/benchmarks/compare_genai.py --peer-python PEER/bin/python --rounds 4 --out RESULTS.json \
        --pair "int4, groups of 32=model-b32.ark,PEER-B32"

Tokens per second of the process's own processor time, one thread: other work on the machine slows both by less than it
would on the clock. Each round runs every contender once, in turn; ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def measure(artifact: str, threads: int, prompt: int, answer: int, repeat: int) -> dict[str, float]:
    """Return tokens per second of processor time for reading a prompt and for answering, as genai_peer.py does."""
    import numpy as np

    from arkinfer import backends
    from arkinfer.artifact import Artifact

    executor = backends.open(Artifact.open(artifact), threads)
    tokens = [(index * 7919 + 13) % 8000 for index in range(prompt)]
    state = executor.new_state(prompt + answer + 8)

    def prefill() -> float:
        state.truncate(0)
        start = time.process_time()
        int(np.argmax(executor.step(tokens, state)))
        return prompt / (time.process_time() - start)

    def decode() -> float:
        state.truncate(0)
        token = int(np.argmax(executor.step(tokens[:1], state)))
        start = time.process_time()
        for _ in range(answer):
            token = int(np.argmax(executor.step([token], state)))
        return answer / (time.process_time() - start)

    prefill(), decode()
    tests = ((f"pp{prompt}", prefill), (f"tg{answer}", decode))
    return {name: statistics.median(function() for _ in range(repeat)) for name, function in tests}


def run(command: list[str]) -> dict[str, Any]:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--pair", action="append", default=[], metavar="NAME=ARTIFACT,FOLDER")
    parser.add_argument("--measure", help="one artifact, and print its rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-r", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps({"rows": measure(options.measure, options.threads, options.p, options.n, options.r)}))
        return
    sizes = ["-p", str(options.p), "-n", str(options.n), "-r", str(options.r), "--threads", str(options.threads)]
    pairs = {}
    for pair in options.pair:
        name, _, files = pair.rpartition("=")
        pairs[name] = files.split(",")
    rounds: list[dict[str, Any]] = []
    version = ""
    for index in range(options.rounds):
        entry: dict[str, Any] = {}
        for name, (artifact, folder) in pairs.items():
            ours = run([sys.executable, str(Path(__file__)), "--measure", artifact, *sizes])
            theirs = run([options.peer_python, str(HERE / "genai_peer.py"), folder, *sizes])
            version = theirs["version"]
            entry[name] = {"arkinfer": ours["rows"], "genai": theirs["rows"]}
        rounds.append(entry)
        print(f"round {index + 1} of {options.rounds}: {json.dumps(entry)}", file=sys.stderr)
    print("| weights | test | arkinfer | onnxruntime-genai | ratio (median of rounds, range) |\n|---|---|---|---|---|")
    for name in pairs:
        for test in rounds[0][name]["arkinfer"]:
            mine, peer = ([entry[name][who][test] for entry in rounds] for who in ("arkinfer", "genai"))
            ratios = [a / b for a, b in zip(mine, peer, strict=True)]
            print(
                f"| {name} | {test} | {statistics.median(mine):.1f} | {statistics.median(peer):.1f} | "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
    if options.out is not None:
        record = {"processor": platform.processor() or platform.machine(), "genai": version, "rounds": rounds}
        record["threads"] = options.threads
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
