"""Compile CUDA kernels ahead of time, without a GPU. Runs in a process of its own, which alone loads triton.

``python -m arkinfer.exporters.kernels.triton.compiler OUT`` reads a list of jobs as JSON from standard input (see
cubin.Job) and writes OUT/INDEX.cubin, OUT/INDEX.ptx and OUT/INDEX.json (entry, shared) for each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # line tables hold paths of this machine, and are most of a cubin

from arkinfer.exporters.kernels.triton.device.language import triton

PTX_VERSION = 85  # CUDA 12.5's: drivers of JetPack 6 still translate it
_POINTERS = {
    "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32", "int8": "*i8", "uint8": "*u8",
}  # fmt: skip


def source(job: Mapping[str, Any]) -> Any:
    """Return Triton's description of a job: types of the arguments in order, constants, and what is aligned."""
    file, function = job["code"].split(":")
    code = getattr(import_module(f"arkinfer.exporters.kernels.triton.device.{file}"), function)
    arguments = {name: "i32" if role == "scalar" else _POINTERS[dtype] for name, dtype, role in job["arguments"]}
    constants = dict(job["constants"])
    # What these options have no use for: the code does not reach it.
    constants |= {name: None for name in code.arg_names if name not in arguments and name not in constants}
    if list(arguments) != [name for name in code.arg_names if name in arguments]:
        raise ValueError(f"{job['code']} takes its arguments in the order {code.arg_names}, not {list(arguments)}")
    types = {name: arguments.get(name, "constexpr") for name in code.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(code.arg_names) if types[name].startswith("*")
    }
    return triton.compiler.ASTSource(fn=code, signature=types, constexprs=constants, attrs=aligned)


def compile_job(job: Mapping[str, Any]) -> Any:
    """Return Triton's compiled kernel for a job."""
    target = triton.backends.compiler.GPUTarget("cuda", int(job["arch"].removeprefix("sm_")), 32)
    options = {
        "num_warps": job["num_warps"],
        "num_stages": job["num_stages"],
        "enable_fp_fusion": True,  # products and sums fuse, whatever the version's default is
        "ptx_version": PTX_VERSION,
    }
    kernel = triton.compile(source(job), target=target, options=options)
    scratch = (kernel.metadata.global_scratch_size, kernel.metadata.profile_scratch_size)
    if any(scratch):
        raise ValueError(f"{job['code']} wants scratch memory {scratch}, which no launch passes")
    return kernel


def main(arguments: Sequence[str]) -> None:
    out = Path(arguments[0])
    for index, job in enumerate(json.load(sys.stdin)):
        kernel = compile_job(job)
        out.joinpath(f"{index}.cubin").write_bytes(kernel.asm["cubin"])
        out.joinpath(f"{index}.ptx").write_text(kernel.asm["ptx"], encoding="utf-8")
        facts = {"entry": kernel.metadata.name, "shared": kernel.metadata.shared}
        out.joinpath(f"{index}.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
