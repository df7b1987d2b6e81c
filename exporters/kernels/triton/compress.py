"""The compressed keys of InfLLM-v2 that new tokens complete; see arkinfer.ops.infllm for what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from arkinfer.exporters.kernels.triton import layout
from arkinfer.exporters.kernels.triton.kernel import Argument, Kernel, Variant, power_of_two
from arkinfer.ops.infllm import compress_keys, kernel_count


@dataclass(frozen=True)
class Compress:
    """Means of ``kernel_size`` cached keys every ``kernel_stride`` (fine), and of four times both (coarse).

    ``kv`` is the dtype of the keys that are read: the cache's, or float16 where they are those before rope.
    """

    kv_heads: int
    head_dim: int
    context: int
    kernel_size: int
    kernel_stride: int
    kv: str = "float16"


def _arguments(options: Compress) -> tuple[Argument, ...]:
    heads, dim = options.kv_heads, options.head_dim
    scale = [Argument("k_scale", "float32", ("c", heads))] if options.kv == "int8" else []
    fine, coarse = (layout.compressed_rows(factor * options.kernel_stride) for factor in (1, 4))
    return (
        Argument("k", options.kv, ("c", heads, dim)),
        *scale,
        Argument("control", "int32", (16,)),
        Argument("fine", "float16", (fine, heads, dim), "inout"),
        Argument("coarse", "float16", (coarse, heads, dim), "inout"),
        Argument("count", "int32", ("n",), "scalar"),
    )


def _variant(options: Compress, arch: str) -> Variant:
    constants: dict[str, int | float | bool | str] = {
        "DIM": options.head_dim,
        "PADDED_DIM": power_of_two(options.head_dim),
        "KV_HEADS": options.kv_heads,
        "SIZE": options.kernel_size,
        "STRIDE": options.kernel_stride,
        "TILE": min(32, power_of_two(options.kernel_size)),
        "INT8": options.kv == "int8",
    }
    # n tokens complete at most this many fine kernels; coarse ones are fewer.
    return Variant(constants, (f"n // {options.kernel_stride} + 1", str(options.kv_heads), "2"), 4, 1)


def _reference(options: Compress, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    start = int(arguments["control"][0])
    for name, factor in (("fine", 1), ("coarse", 4)):
        size, stride = factor * options.kernel_size, factor * options.kernel_stride
        first, last = (kernel_count(length, size, stride) for length in (start, start + n))
        if last > first:
            span = slice(first * stride, (last - 1) * stride + size)
            keys = arguments["k"][span].float()
            if options.kv == "int8":
                keys = keys * arguments["k_scale"][span, :, None]
            arguments[name][first:last] = compress_keys(keys, size, stride).half()


COMPRESS = Kernel("compress:compress", Compress, _arguments, _variant, _reference)
