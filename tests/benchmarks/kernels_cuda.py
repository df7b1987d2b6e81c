"""Compile the CUDA kernels with other choices than the tuning tables': registers, shared memory, instructions.

``python tests/benchmarks/kernels_cuda.py [KERNEL ...] [--arch sm_89]``. Needs triton and no GPU, so it says what fits
and how many instructions the code has, not how long anything takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from arkinfer.exporters.kernels import triton as kernels
from arkinfer.exporters.kernels.triton import cubin
from arkinfer.exporters.kernels.triton.kernel import ARCHS

MATRIX = {"rows": 4096, "width": 4096}
FORMATS: Mapping[str, Mapping[str, Any]] = {
    "float16": {"format": "dense"},
    "int8": {"format": "int8", "group": 128},
    "int4": {"format": "int4", "group": 128},
    "ternary": {"format": "ternary"},
}
ATTENTION = {"heads": 32, "kv_heads": 2, "head_dim": 128, "context": 32768, "scale": 0.09}


def choices(name: str) -> Iterator[tuple[str, Mapping[str, Any], dict[str, int], int, int]]:
    """Yield (title, options, constants to replace, warps or 0, stages or 0)."""
    if name == "linear_gemv":
        for title, options in FORMATS.items():
            for tile in (1, 2, 4, 8):
                yield f"{title} rows {tile}", {**MATRIX, **options}, {"TILE": tile}, 0, 0
    elif name == "linear_gemm":
        sizes = itertools.product((64, 128), (64, 128), (4, 8), (2, 3))
        for (title, options), (m, n, warps, stages) in itertools.product(FORMATS.items(), sizes):
            what = f"{title} {m}x{n} warps {warps} stages {stages}"
            yield what, {**MATRIX, **options}, {"TILE_M": m, "TILE_N": n}, warps, stages
    elif name == "attention_decode":
        for kv, warps, stages in itertools.product(("float16", "int8"), (2, 4, 8), (1, 2, 3)):
            yield f"{kv} warps {warps} stages {stages}", {**ATTENTION, "kv": kv, "splits": 64}, {}, warps, stages
    elif name == "attention_prefill":
        for tokens, warps, stages in itertools.product((4, 8), (4, 8), (2, 3)):
            yield f"rows {16 * tokens} warps {warps} stages {stages}", ATTENTION, {"TOKENS": tokens}, warps, stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("linear_gemv", "linear_gemm", "attention_decode", "attention_prefill")
    parser.add_argument("kernels", nargs="*", default=names)
    parser.add_argument("--arch", default="sm_89", choices=ARCHS)
    arguments = parser.parse_args()
    package = find_spec("triton")
    assert package is not None and package.origin is not None, "pip install triton"
    disassembler = Path(package.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    for name in arguments.kernels:
        assert name in kernels.KERNELS, name
        for title, options, constants, warps, stages in choices(name):
            job = cubin.Job(name, options, arguments.arch).describe()
            job["constants"] |= constants
            job["num_warps"] = warps or job["num_warps"]
            job["num_stages"] = stages or job["num_stages"]
            try:
                made = cubin.compile_described([json.dumps(job)])[0]
            except cubin.InternalError as error:
                print(f"{name:18} {title:36} fails: {error.facts['last words']}")
                continue
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(made.code)
                file.flush()
                text = subprocess.run(
                    [disassembler, "-c", file.name], capture_output=True, text=True, check=True
                ).stdout
            instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,5}\*/", text, re.MULTILINE))
            print(
                f"{name:18} {title:36} registers {made.registers:3} stack {made.stack:4} "
                f"shared {made.shared:6} warps {made.num_warps:2} instructions {instructions}"
            )


if __name__ == "__main__":
    main()
