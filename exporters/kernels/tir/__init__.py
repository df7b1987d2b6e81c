"""CPU kernels by name: each is a function that writes TVMScript for one instruction set and a few static choices."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from arkinfer.exporters.kernels.tir.isa import Isa

KERNELS: Mapping[str, str] = {
    "add_rms_norm": "norm:add_rms_norm",
    "append": "append:append",
    "attention": "attention:attention",
    "attention_dense": "attention:attention_dense",
    "compress": "compress:compress",
    "concatenate": "elementwise:concatenate",
    "embedding": "embedding:embedding",
    "from_heads": "paged:from_heads",
    "linear_float": "linear_float:linear_float",
    "linear_int8": "linear_int8:linear_int8",
    "quantize": "quantize:quantize",
    "rms_norm": "norm:rms_norm",
    "scale": "elementwise:scale",
    "select": "select:select",
    "swiglu": "elementwise:swiglu_float",
    "take_columns": "elementwise:take_columns",
    "take_last": "elementwise:take_last",
    "take_rows": "elementwise:take_rows",
    "to_heads": "paged:to_heads",
}


def build(kernel: str, isa: Isa, tokens: str, options: Mapping[str, Any]) -> Any:
    """Return the PrimFunc of ``kernel`` for ``tokens`` "one" or "many"; ``options`` are its keyword arguments."""
    module, function = KERNELS[kernel].split(":")
    return getattr(import_module(f"{__name__}.{module}"), function)(isa, tokens=tokens, **options)
