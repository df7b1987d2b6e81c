"""Print what quantising costs, as a table: KL, top-1 and perplexity against the checkpoint's own weights.

python tests/benchmarks/quantising.py [MODEL] [--json FILE]

MODEL is a bundled model or a checkpoint folder, tiny-minicpm unless given. No artifact is built and nothing is timed:
the figures are those that `arkinfer build --quality on` seals for the same options.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from arkinfer import pipeline, quality, targets
from arkinfer.checkpoint import open_checkpoint
from arkinfer.checkpoint.base import Checkpoint
from arkinfer.graph import ModelGraph
from arkinfer.ops.linear import weight_bytes
from arkinfer.passes import formats
from arkinfer.quant import pgptq
from arkinfer.recipe import Recipe, Rounding, choose
from arkinfer.runtime.tokenizer import Tokenizer
from arkinfer.weights import CheckpointWeights


def rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield weights and wishes of each row of the table."""
    for method in ("search", "pgptq"):
        yield "int8", {"method": method, "head": "int8"}
    yield "int8", {"method": "search", "head": "int4"}
    for group in (128, 64, 32):
        for method in ("search", "pgptq"):
            yield "int4", {"group": group, "method": method, "head": "int8"}
    for method in ("search", "pgptq"):
        yield "int4", {"group": 64, "method": method, "head": "int4"}


def examine(
    checkpoint: Checkpoint, encode: Callable[[str], Sequence[int]], weights: str, wishes: dict[str, Any]
) -> dict[str, Any]:
    """Return the figures of one row, as a manifest holds them, and the bytes that matrices and tables take."""
    rounding = Rounding.of(targets.load("cpu").defaults, **wishes)

    def recipe(graph: ModelGraph) -> Recipe:
        used = [source for weight in graph.weights.values() for source in weight.sources]
        return choose(weights, "int8", formats.body(graph), used, checkpoint, rounding=rounding)

    lowered = pipeline.lower(checkpoint.config, 512, recipe, checkpoint.layouts(), "fp32")
    with tempfile.TemporaryDirectory() as folder:
        rounded = checkpoint
        if lowered.recipe.method == "pgptq":
            rounded = pgptq.quantise(checkpoint, lowered.recipe, encode, lambda name: Path(folder) / name, _quiet)
        source = CheckpointWeights(rounded)
        figures = quality.examine(checkpoint, lowered.graph, lowered.recipe, source, encode, True, _quiet)
    assert figures is not None
    stored = [weight for weight in lowered.graph.weights.values() if weight.part == "weight" and len(weight.shape) == 2]
    total = sum(weight_bytes(*weight.shape, weight.format, weight.group) for weight in stored)
    return {"weights": weights, **wishes, "bytes": total, **figures}


def _quiet(stage: str, done: int, total: int) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-minicpm")
    parser.add_argument("--json", type=Path, help="also write the figures, text by text, to FILE")
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_bytes(checkpoint.asset("tokenizer.json") or b"")
        encode = Tokenizer.from_file(file).encode
    print("| weights | group | head | method | MB | mean KL | top-1 | perplexity | within its gate |")
    print("|---|---|---|---|---|---|---|---|---|")
    found = []
    for weights, wishes in rows():
        row = examine(checkpoint, encode, weights, wishes)
        found.append(row)
        cells = (weights, row.get("group", ""), row["head"], row["method"], f"{row['bytes'] / 1e6:.2f}")
        figures = f"{row['mean_kl']:.4f} | {row['top1']:.1%} | x{row['ratio']:.3f} | {'yes' if row['passed'] else 'no'}"
        print(f"| {' | '.join(map(str, cells))} | {figures} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"written: {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
