"""Compare the sparse gear of one artifact with the same artifact forced dense, in alternating runs at several depths.

    python tests/benchmarks/gears.py model.ark --depths 8192,32768,131000 --rounds 3 --out RESULTS.json

The context is filled with random keys and values, not computed. Beside each measured ratio stands the one that the
bytes alone allow: what a dense step must read over what a sparse step must read, weights included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

GEARS = ("auto", "dense")


def run(artifact: str, gear: str, depths: str, tokens: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "arkinfer", "bench", "--artifact", artifact, "--attention", gear, "--json"]
    command += ["-p", "0", "-n", str(tokens), "-d", depths, "-r", "3", "--threads", str(threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--depths", default="8192,32768,131000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-n", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rounds = [
        {gear: run(options.artifact, gear, options.depths, options.n, options.threads) for gear in GEARS}
        for _ in range(options.rounds)
    ]
    print("| depth | sparse tok/s | dense tok/s | ratio (median of rounds, range) | ratio that the bytes allow |")
    print("|---|---|---|---|---|")
    for place, depth in enumerate(map(int, options.depths.split(","))):
        rows = [[entry[gear]["rows"][place] for gear in GEARS] for entry in rounds]
        ratios = [sparse["tok_s"] / dense["tok_s"] for sparse, dense in rows]
        allowed = statistics.median(
            (sparse["limit_tok_s"] / entry["auto"]["machine"]["read_bandwidth_gb_s"])
            / (dense["limit_tok_s"] / entry["dense"]["machine"]["read_bandwidth_gb_s"])
            for entry, (sparse, dense) in zip(rounds, rows, strict=True)
        )
        medians = [statistics.median(pair[side]["tok_s"] for pair in rows) for side in (0, 1)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {depth} | {medians[0]:.1f} | {medians[1]:.1f} | {spread} | {allowed:.2f} |")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"rounds": rounds}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
