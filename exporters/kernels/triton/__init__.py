"""CUDA kernels by name: what each takes, how it is launched, what it computes. Nothing here loads triton.

A file of this folder describes kernels; the file of the same name in `device/` holds their code, which only the
compiling process (`compiler.py`) imports. To add a kernel: its code, its description with a torch reference, one line
here, a case in tests/kernels/triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from arkinfer.errors import InternalError
from arkinfer.exporters.kernels.triton.kernel import Kernel

KERNELS: Mapping[str, str] = {
    "add_rms_norm": "norm:ADD_RMS_NORM",
    "argmax": "sampling:ARGMAX",
    "argmax_partial": "sampling:ARGMAX_PARTIAL",
    "attention_combine": "attention:COMBINE",
    "attention_decode": "attention:DECODE",
    "attention_prefill": "attention:PREFILL",
    "attention_sparse": "attention:SPARSE",
    "compress": "compress:COMPRESS",
    "embedding": "embedding:EMBEDDING",
    "linear_gemm": "linear:GEMM",
    "linear_gemv": "linear:GEMV",
    "rms_norm": "norm:RMS_NORM",
    "rope_append": "append:ROPE_APPEND",
    "sample": "sampling:SAMPLE",
    "sample_mass": "sampling:SAMPLE_MASS",
    "sample_narrow": "sampling:SAMPLE_NARROW",
    "scale": "elementwise:SCALE",
    "select_blocks": "select:BLOCKS_OF_ROWS",
    "select_lse": "select:LSE",
    "select_scores": "select:SCORES",
    "swiglu": "elementwise:SWIGLU",
    "take_rows": "elementwise:TAKE_ROWS",
}


def kernel(name: str) -> Kernel:
    """Return the description of the kernel called ``name``."""
    if name not in KERNELS:
        raise InternalError(f"no CUDA kernel {name!r}", facts={"known": ", ".join(KERNELS)})
    module, attribute = KERNELS[name].split(":")
    found: Kernel = getattr(import_module(f"{__name__}.{module}"), attribute)
    return found
