"""The compressed keys of InfLLM-v2 that new tokens complete; see arkinfer.ops.infllm for what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

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

    @property
    def fine(self) -> int:
        """Fine kernels that a full cache holds."""
        return max(1, kernel_count(self.context, self.kernel_size, self.kernel_stride))

    @property
    def coarse(self) -> int:
        return max(1, kernel_count(self.context, 4 * self.kernel_size, 4 * self.kernel_stride))


def _arguments(options: Compress) -> tuple[Argument, ...]:
    heads, dim = options.kv_heads, options.head_dim
    scale = [Argument("k_scale", "float32", (heads, options.context))] if options.kv == "int8" else []
    return (
        Argument("k", options.kv, (heads, options.context, dim)),
        *scale,
        Argument("control", "int32", (16,)),
        Argument("fine", "float16", (heads, options.fine, dim), "inout"),
        Argument("coarse", "float16", (heads, options.coarse, dim), "inout"),
        Argument("count", "int32", ("n",), "scalar"),
    )


def _variant(options: Compress, arch: str) -> Variant:
    constants: dict[str, int | float | bool | str] = {
        "DIM": options.head_dim,
        "PADDED_DIM": power_of_two(options.head_dim),
        "CONTEXT": options.context,
        "SIZE": options.kernel_size,
        "STRIDE": options.kernel_stride,
        "TILE": min(32, power_of_two(options.kernel_size)),
        "FINE": options.fine,
        "COARSE": options.coarse,
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
            keys = arguments["k"][:, span].float()
            if options.kv == "int8":
                keys = keys * arguments["k_scale"][:, span, None]
            means = compress_keys(keys.transpose(0, 1), size, stride)  # (kernels, kv_heads, head_dim)
            arguments[name][:, first:last] = means.transpose(0, 1).half()


COMPRESS = Kernel("compress:compress", Compress, _arguments, _variant, _reference)
