"""Split the joined projection, normalise and rotate queries and keys, append keys and values to the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from arkinfer.exporters.kernels.triton import layout
from arkinfer.exporters.kernels.triton.kernel import Argument, Kernel, Variant, power_of_two
from arkinfer.ops.attention import quantise_rows


@dataclass(frozen=True)
class Append:
    """``kv`` is float16 or int8; ``norm_eps`` normalises q and k first; ``nope`` keeps them as they were too.

    ``context`` is the most that the caches may hold and the length of the tables.
    """

    heads: int
    kv_heads: int
    head_dim: int
    context: int
    kv: str = "float16"
    norm_eps: float | None = None
    nope: bool = False


def _arguments(options: Append) -> tuple[Argument, ...]:
    heads, kv_heads, dim, context = options.heads, options.kv_heads, options.head_dim, options.context
    arguments = [
        Argument("qkv", "float16", ("n", (heads + 2 * kv_heads) * dim)),
        Argument("cos", "float32", (context, dim // 2)),
        Argument("sin", "float32", (context, dim // 2)),
        Argument("control", "int32", (16,)),
    ]
    if options.norm_eps is not None:
        arguments += [Argument("q_norm", "float32", (dim,)), Argument("k_norm", "float32", (dim,))]
    arguments.append(Argument("q", "float16", ("n", heads, dim), "out"))
    if options.nope:
        arguments.append(Argument("q_nope", "float16", ("n", heads, dim), "out"))
    cache = ("c", kv_heads, dim)
    arguments += [Argument("k", options.kv, cache, "inout"), Argument("v", options.kv, cache, "inout")]
    if options.kv == "int8":
        arguments += [Argument(name, "float32", ("c", kv_heads), "inout") for name in ("k_scale", "v_scale")]
    if options.nope:
        arguments.append(Argument("nope", "float16", cache, "inout"))
    return tuple(arguments)


def _variant(options: Append, arch: str) -> Variant:
    layout.check_cache(options.kv_heads, options.context, options.head_dim)
    constants: dict[str, int | float | bool | str] = {
        "HEADS": options.heads,
        "KV_HEADS": options.kv_heads,
        "DIM": options.head_dim,
        "HALF": power_of_two(options.head_dim // 2),
        "INT8": options.kv == "int8",
        "NORM": options.norm_eps is not None,
        "EPS": options.norm_eps or 0.0,
        "NOPE": options.nope,
    }
    return Variant(constants, ("n", str(options.heads + 2 * options.kv_heads), "1"), 1, 1)


def _reference(options: Append, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    heads, kv_heads = options.heads, options.kv_heads
    start = int(arguments["control"][0])
    span = slice(start, start + n)
    parts = arguments["qkv"].float().view(n, -1, options.head_dim)  # (n, heads + 2 * kv_heads, head_dim)
    q, k, v = parts[:, :heads], parts[:, heads:-kv_heads], parts[:, -kv_heads:]
    if options.norm_eps is not None:
        q, k = (
            torch.nn.functional.rms_norm(part, (options.head_dim,), arguments[f"{name}_norm"], options.norm_eps)
            for name, part in (("q", q), ("k", k))
        )
    cos, sin = (arguments[name][span, None] for name in ("cos", "sin"))  # (n, 1, head_dim / 2)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    arguments["q"].copy_(rotated(q))
    if options.nope:
        arguments["q_nope"].copy_(q)
        arguments["nope"][span] = k.half()
    for name, rows in (("k", rotated(k)), ("v", v)):
        if options.kv == "int8":
            arguments[name][span], arguments[f"{name}_scale"][span] = quantise_rows(rows)
        else:
            arguments[name][span] = rows.half()


ROPE_APPEND = Kernel("append:rope_append", Append, _arguments, _variant, _reference)
