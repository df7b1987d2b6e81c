"""Append: normalise (Qwen3) and rotate new queries and keys, and write keys and values into the cache."""

from __future__ import annotations

from typing import Any

from arkinfer.exporters.kernels.tir.attention_tile import LANES, Caches, hold
from arkinfer.exporters.kernels.tir.isa import Isa
from arkinfer.exporters.kernels.tir.source import Source, cast, fma, intrinsic, ramp, real, splat, vector_type


def append(
    isa: Isa,
    tokens: str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv: str,
    norm_eps: float | None = None,
    nope: bool = False,
) -> Any:
    """Return a PrimFunc for tokens at ``position``, ``position`` + 1, ...

    qkv (n, (heads + 2 * kv_heads) * head_dim) float32, rotation (n, head_dim) float32 (cosines, then sines), with
    ``norm_eps`` the norms' weights of queries and keys (head_dim,), layer, position, k, v, for int8 k_scale and
    v_scale, with ``nope`` a cache of the keys before rotation laid out as k -> q (n, heads, head_dim) rotated, float32,
    and with ``nope`` the queries before rotation. ``kv`` is the caches' dtype; int8 codes have a scale per token and
    head.
    """
    del isa  # 16-lane vectors legalise everywhere, and this is a small part of a step
    return _Append(heads, kv_heads, head_dim, kv, norm_eps, nope).build(tokens)


class _Append:
    def __init__(self, heads: int, kv_heads: int, head_dim: int, kv: str, norm_eps: float | None, nope: bool) -> None:
        self.heads, self.kv_heads, self.dim, self.kv = heads, kv_heads, head_dim, kv
        self.norm_eps, self.nope = norm_eps, nope
        self.width = (heads + 2 * kv_heads) * head_dim
        self.half = LANES if head_dim % (2 * LANES) == 0 else LANES // 2  # lanes that divide half a head
        self.source = Source("append")

    def build(self, tokens: str) -> Any:
        source, dim = self.source, self.dim
        source.buffer("qkv", ("n", self.width), "float32")
        source.buffer("rotation", ("n", dim), "float32")
        if self.norm_eps is not None:
            source.buffer("q_weight", (dim,), "float32")
            source.buffer("k_weight", (dim,), "float32")
        source.scalar("layer")
        source.scalar("position")
        Caches.declare(source, self.kv, self.kv_heads, dim)
        real_kv = "float16" if self.kv == "int8" else self.kv
        if self.nope:
            source.buffer("nope", ("layers", self.kv_heads, "k_panels", dim, LANES), real_kv)
        source.buffer("q", ("n", self.heads, dim), "float32")
        if self.nope:
            source.buffer("q_nope", ("n", self.heads, dim), "float32")
        Caches.flatten(source, self.kv, self.kv_heads, dim)
        for name, size in (
            ("qkv", self.width),
            ("q", self.heads * dim),
            *([("q_nope", self.heads * dim)] if self.nope else []),
        ):
            source.line(f'{name}_flat = T.decl_buffer((n * {size},), "float32", data={name}.data)')
        if self.nope:
            extent = f"layers * {self.kv_heads} * k_panels * {dim * LANES}"
            source.line(f'nope_flat = T.decl_buffer(({extent},), "{real_kv}", data=nope.data)')
        if tokens == "one":
            with source.loop("i", "n"):
                self._token("i")
        else:
            # Tokens of one panel share cache lines: a thread takes whole panels.
            panels = f"(position + n - 1) // {LANES} - position // {LANES} + 1"
            with source.loop("panel", panels, "parallel"), source.loop("lane", LANES):
                i = hold(source, "i", f"(position // {LANES} + panel) * {LANES} + lane - position")
                with source.block(f"if {i} >= 0 and {i} < n"):
                    self._token(i)
        return source.build()

    def _token(self, i: str) -> None:
        source, dim = self.source, self.dim
        source.line(f'row = T.alloc_buffer(({dim},), "float32", scope="local", align=64)')
        with source.loop("h", self.heads):
            at = hold(source, "at", f"({i} * {self.heads} + h) * {dim}")
            self._normalised(f"{i} * {self.width} + h * {dim}", "q_weight")
            if self.nope:
                self._copy("q_nope_flat", at)
            self._rotate(i)
            self._copy("q_flat", at)
        place = hold(source, "place", f"position + {i}")
        with source.loop("h", self.kv_heads):
            plane = hold(source, "plane", f"layer * {self.kv_heads} + h")
            panel = hold(
                source, "panel", f"({plane} * k_panels + {place} // {LANES}) * {dim * LANES} + {place} % {LANES}"
            )
            token = hold(source, "token", f"{plane} * capacity + {place}")
            self._normalised(f"{i} * {self.width} + {self.heads * dim} + h * {dim}", "k_weight")
            if self.nope:
                with source.loop("j", dim):
                    source.line(f"nope_flat[{panel} + j * {LANES}] = {self._rounded('row[j]', 1, real=True)}")
            self._rotate(i)
            inverse = self._scale("k_scale_flat", token) if self.kv == "int8" else ""
            with source.loop("j", dim):
                source.line(f"k_flat[{panel} + j * {LANES}] = {self._rounded('row[j]', 1, inverse)}")
            base = f"{i} * {self.width} + {(self.heads + self.kv_heads) * dim} + h * {dim}"
            with source.loop("c", dim // LANES):
                source.line(f"row[{ramp(f'c * {LANES}', LANES)}] = qkv_flat[{ramp(f'{base} + c * {LANES}', LANES)}]")
            inverse = self._scale("v_scale_flat", token) if self.kv == "int8" else ""
            with source.loop("c", dim // LANES):
                value = self._rounded(f"row[{ramp(f'c * {LANES}', LANES)}]", LANES, inverse)
                source.line(f"v_flat[{ramp(f'{token} * {dim} + c * {LANES}', LANES)}] = {value}")

    def _copy(self, target: str, at: str) -> None:
        with self.source.loop("c", self.dim // LANES):
            self.source.line(f"{target}[{ramp(f'{at} + c * {LANES}', LANES)}] = row[{ramp(f'c * {LANES}', LANES)}]")

    def _normalised(self, base: str, weight: str) -> None:
        """Load one head to ``row``, through its RMSNorm if there is one."""
        source = self.source
        scale = ""
        if self.norm_eps is not None:
            squares = source.local("squares", LANES, "float32")
            whole = ramp("0", LANES)
            source.line(f"{squares}[{whole}] = {real(0.0, LANES)}")
            with source.loop("c", self.dim // LANES):
                x = source.let("x", f"qkv_flat[{ramp(f'{base} + c * {LANES}', LANES)}]")
                source.line(f"{squares}[{whole}] = {fma(x, x, f'{squares}[{whole}]', LANES)}")
            power = intrinsic("float32", "llvm.vector.reduce.fadd", "T.float32(0)", f"{squares}[{whole}]")
            mean = fma(power, real(1 / self.dim), real(self.norm_eps), 1)
            scale = source.let("scale", splat(f"T.float32(1) / {intrinsic('float32', 'llvm.sqrt', mean)}", LANES))
        with source.loop("c", self.dim // LANES):
            value = f"qkv_flat[{ramp(f'{base} + c * {LANES}', LANES)}]"
            if scale:
                value = f"{value} * {scale} * {weight}[{ramp(f'c * {LANES}', LANES)}]"
            source.line(f"row[{ramp(f'c * {LANES}', LANES)}] = {value}")

    def _rotate(self, i: str) -> None:
        """Rotate ``row`` by the angles of token ``i``: pairs (j, j + head_dim / 2)."""
        source, lanes, half = self.source, self.half, self.dim // 2
        with source.loop("c", half // lanes):
            low, high = f"row[{ramp(f'c * {lanes}', lanes)}]", f"row[{ramp(f'{half} + c * {lanes}', lanes)}]"
            cosine = source.let("cosine", f"rotation[{i}, {ramp(f'c * {lanes}', lanes)}]")
            sine = source.let("sine", f"rotation[{i}, {ramp(f'{half} + c * {lanes}', lanes)}]")
            first, second = source.let("first", low), source.let("second", high)
            opposite = source.let("opposite", f"{real(0.0, lanes)} - {second} * {sine}")
            turned = source.let("turned", f"{second} * {cosine}")
            source.line(f"{low} = {fma(first, cosine, opposite, lanes)}")
            source.line(f"{high} = {fma(first, sine, turned, lanes)}")

    def _scale(self, scales: str, token: str) -> str:
        """Store max|row| / 127 and return the name of that scale, 1 where the row is all zero."""
        source = self.source
        peak = source.local("peak", LANES, "float32")
        whole = ramp("0", LANES)
        source.line(f"{peak}[{whole}] = {real(0.0, LANES)}")
        with source.loop("c", self.dim // LANES):
            size = intrinsic("float32x16", "llvm.fabs", f"row[{ramp(f'c * {LANES}', LANES)}]")
            source.line(f"{peak}[{whole}] = T.max({peak}[{whole}], {size})")
        cell = source.local("scale", 1, "float32")
        source.line(f"{cell}[0] = T.float32(0)")
        with source.loop("l", LANES):
            source.line(f"{cell}[0] = T.max({cell}[0], {peak}[l])")
        source.line(f"{cell}[0] = {cell}[0] / T.float32(127)")
        source.line(f"{scales}[{token}] = {cell}[0]")
        return source.let("step", f"T.Select({cell}[0] == T.float32(0), T.float32(1), {cell}[0])")

    def _rounded(self, value: str, lanes: int, step: str = "", real: bool = False) -> str:
        """Return ``value`` in the dtype of the cache, rounded half to even."""
        if self.kv == "float32":
            return value
        if self.kv == "float16" or real:
            return cast(vector_type("float16", lanes), value)
        # The quotient, not a product with the inverse: the reference divides.
        nearest = intrinsic(
            vector_type("float32", lanes), "llvm.rint", f"{value} / {step if lanes == 1 else splat(step, lanes)}"
        )
        return cast(vector_type("int8", lanes), cast(vector_type("int32", lanes), nearest))
