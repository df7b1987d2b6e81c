"""Compare artifacts with llama.cpp on the same shapes, in alternating runs, and write the table of the README.

    python tests/benchmarks/compare_llama_cpp.py --peer-python PEER/bin/python --rounds 5 --out RESULTS.json \
        --pair int4=model-int4.ark,model-Q4_0.gguf --pair ternary=model-ternary.ark,model-TQ2_0.gguf

Each round runs every contender once, in turn, so that a machine whose speed drifts is unfair to all of them alike; the
figure of a contender is the median over rounds of its own medians, and ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run(command: list[str]) -> dict[str, Any]:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    answer: Any = json.loads(result.stdout)
    return {"rows": answer, "machine": {}} if isinstance(answer, list) else answer


def figures(answer: dict[str, Any]) -> dict[str, float]:
    return {row["test"]: float(row["tok_s"]) for row in answer["rows"] if row["depth"] == 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--pair", action="append", required=True, metavar="NAME=ARTIFACT,GGUF")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pairs = {}
    for pair in options.pair:
        name, _, files = pair.partition("=")
        pairs[name] = files.split(",")
    sizes = ["-p", str(options.p), "-n", str(options.n), "-r", "3", "--threads", str(options.threads)]
    rounds: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    for index in range(options.rounds):
        entry: dict[str, Any] = {}
        for name, (artifact, gguf) in pairs.items():
            ours = run([sys.executable, "-m", "arkinfer", "bench", "--artifact", artifact, *sizes, "--json"])
            theirs = run([options.peer_python, str(HERE / "llama_cpp_peer.py"), gguf, *sizes])
            machine = ours["machine"] or machine
            entry[name] = {"arkinfer": figures(ours), "llama.cpp": figures(theirs), "rows": ours["rows"]}
        rounds.append(entry)
        print(
            f"round {index + 1} of {options.rounds}: "
            + json.dumps({name: [figure["arkinfer"], figure["llama.cpp"]] for name, figure in entry.items()}),
            file=sys.stderr,
        )
    lines = [
        "| weights | test | arkinfer tok/s | llama.cpp tok/s | ratio (median of rounds, range) |",
        "|---|---|---|---|---|",
    ]
    for name in pairs:
        for test in rounds[0][name]["arkinfer"]:
            ours_all = [entry[name]["arkinfer"][test] for entry in rounds]
            theirs_all = [entry[name]["llama.cpp"][test] for entry in rounds]
            ratios = [a / b for a, b in zip(ours_all, theirs_all, strict=True)]
            lines.append(
                f"| {name} | {test} | {statistics.median(ours_all):.1f} | {statistics.median(theirs_all):.1f} | "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
    print("\n".join(lines))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"processor": platform.processor() or platform.machine(), "machine": machine, "rounds": rounds}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
