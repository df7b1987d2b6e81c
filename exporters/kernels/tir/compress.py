"""Compress: mean-pool cached keys into the kernels by which InfLLM-v2 chooses blocks (arXiv 2506.07900, 2.2)."""

from __future__ import annotations

from typing import Any

from arkinfer.exporters.kernels.tir.attention_tile import LANES, hold
from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.source import Source, cast, fma, real

COARSE = 4  # coarse kernels are so many times as long and as far apart as fine ones


def compress(
    isa: Isa,
    tokens: str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv: str,
    kernel_size: int,
    kernel_stride: int,
) -> Any:
    """Return a PrimFunc that stores the fine and coarse keys which the positions from ``position`` on complete.

    q (n, heads, head_dim) float32 (gives n alone), layer, position, keys (layers, kv_heads, panels, head_dim, 16) in
    dtype ``kv``, for int8 k_scale, then fine and coarse (layers, kv_heads, panels, head_dim, 16), updated in place.
    Kernel j is the float32 mean of the cached, hence rounded, keys [stride * j, stride * j + size), summed in order:
    the same bits however the tokens were fed, and again after a truncation.
    """
    del isa
    source = Source("compress")
    real_kv = "float16" if kv == "int8" else kv
    source.buffer("q", ("n", heads, head_dim), "float32")
    source.scalar("layer")
    source.scalar("position")
    source.buffer("k", ("layers", kv_heads, "k_panels", head_dim, LANES), kv)
    if kv == "int8":
        source.buffer("k_scale", ("layers", kv_heads, "capacity"), "float32")
    for name in ("fine", "coarse"):
        source.buffer(name, ("layers", kv_heads, f"{name}_panels", head_dim, LANES), real_kv)
    kind = "serial" if tokens == "one" else "parallel"
    for name, factor in (("fine", 1), ("coarse", COARSE)):
        _pool(source, name, kv, kv_heads, head_dim, factor * kernel_size, factor * kernel_stride, kind)
    return source.build()


def _pool(source: Source, name: str, kv: str, kv_heads: int, head_dim: int, size: int, stride: int, kind: str) -> None:
    """Emit the kernels of one kind that end in the new tokens."""
    # Kernel j ends at position stride * j + size - 1; those that end before `position` exist already.
    before = source.let("before", f"T.max(T.int64(0), (position - {size} + {stride}) // {stride})")
    after = source.let("after", f"T.max(T.int64(0), (position + n - {size} + {stride}) // {stride})")
    with source.block(f"if {after} > {before}"), source.loop("item", f"({after} - {before}) * {kv_heads}", kind):
        head = hold(source, "head", f"item % {kv_heads}")
        kernel = hold(source, "kernel", f"{before} + item // {kv_heads}")
        with source.loop("j", head_dim):
            cell = source.local("sum", 1, "float32")
            source.line(f"{cell}[0] = T.float32(0)")
            with source.loop("t", size):
                token = hold(source, "token", f"{kernel} * {stride} + t")
                key = f"k[layer, {head}, {token} // {LANES}, j, {token} % {LANES}]"
                key = key if kv == "float32" else cast("float32", key)
                if kv == "int8":
                    # The dequantised key is rounded before it is added, as in the reference.
                    key = fma(key, f"k_scale[layer, {head}, {token}]", real(0.0), 1)
                source.line(f"{cell}[0] = {cell}[0] + {key}")
            mean = f"{cell}[0] / T.float32({size})"
            stored = mean if kv == "float32" else cast("float16", mean)
            source.line(f"{name}[layer, {head}, {kernel} // {LANES}, j, {kernel} % {LANES}] = {stored}")
