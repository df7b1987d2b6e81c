"""One attention layer made of the CPU kernels, with its caches, to be compared with the torch reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import tvm
import tvm_ffi

from arkinfer.config import SparseConfig
from arkinfer.exporters.kernels import tir
from arkinfer.exporters.kernels.tir.isa import ISAS
from arkinfer.ops.attention import LayerCache
from arkinfer.targets.probe import isa_levels
from tests.kernels.emulated import runner as emulated

RUNNABLE = [name for name in ISAS if name in isa_levels()]
EMULATED = emulated.LEVELS
NEVER = 2**62  # a dense_len that no position reaches
CAPACITY = 1280

TINY = SparseConfig(kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=3, dense_len=64)
WIDE = SparseConfig(window_size=128, topk=3, dense_len=300)
"""The published kernel and block sizes with a small budget."""


@dataclass(frozen=True)
class Shape:
    """The static choices of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    kv: str = "float32"
    sparse: SparseConfig | None = TINY
    norm_eps: float | None = None

    @property
    def nope(self) -> bool:
        return self.sparse is not None and self.sparse.use_nope

    @property
    def real(self) -> str:
        """The dtype of the caches that are never quantised."""
        return "float16" if self.kv == "int8" else self.kv

    @property
    def scale(self) -> float:
        return float(self.head_dim) ** -0.5

    def options(self, kernel: str) -> dict[str, Any]:
        options: dict[str, Any] = {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "kv": self.kv,
        }
        sparse = self.sparse
        if kernel == "append":
            return {**options, "norm_eps": self.norm_eps, "nope": self.nope}
        if kernel == "attention_dense":
            return {**options, "scale": self.scale}
        assert sparse is not None
        kernels = {"kernel_size": sparse.kernel_size, "kernel_stride": sparse.kernel_stride}
        if kernel == "compress":
            return {**options, **kernels, **({"kv": self.real} if self.nope else {})}
        chosen = {"scale": self.scale, "block_size": sparse.block_size, "budget": sparse.budget}
        if kernel == "attention":
            return {**options, **chosen}
        rules = {"init_blocks": sparse.init_blocks, "local_blocks": sparse.local_blocks}
        return {**options, **kernels, **chosen, **rules, "local_rule": sparse.local_rule, "lse": sparse.lse}


@cache
def compiled(shape: Shape, kernel: str, tokens: str, isa: str) -> Any:
    """Return the callable of one kernel, or the program that the emulator runs."""
    function = tir.build(kernel, ISAS[isa], tokens, shape.options(kernel)).with_attr("global_symbol", "main")
    if isa in EMULATED:
        return emulated.build(function, ISAS[isa])
    module = tvm.IRModule({"main": function})
    # The pass finds nothing to compact here and takes a fifth of the time.
    with tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"]):
        return tvm.compile(module, target=tvm.target.Target(dict(ISAS[isa].target)))["main"]


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return zeros at a 64-byte boundary."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.zeros(nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def set_threads(count: int) -> None:
    """Set how many threads kernels use."""
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, count)


class Layer:
    """Caches of two layers, of which ``layer`` is used: the other must stay as it is."""

    def __init__(
        self, shape: Shape, isa: str, layer: int = 1, capacity: int = CAPACITY, small_forms: bool = True
    ) -> None:
        self.shape, self.isa, self.layer, self.capacity = shape, isa, layer, capacity
        self.small_forms = small_forms  # whether one token is also appended and compressed by the kernels for one
        heads, dim = shape.kv_heads, shape.head_dim
        panels = (2, heads, capacity // 16, dim, 16)
        self.caches = {"k": aligned(panels, shape.kv), "v": aligned((2, heads, capacity, dim), shape.kv)}
        if shape.kv == "int8":
            self.caches["k_scale"] = aligned((2, heads, capacity), "float32")
            self.caches["v_scale"] = aligned((2, heads, capacity), "float32")
        if shape.sparse is not None:
            for name, stride in (("fine", shape.sparse.kernel_stride), ("coarse", shape.sparse.coarse_stride)):
                self.caches[name] = aligned((2, heads, -(-(capacity // stride) // 16), dim, 16), shape.real)
            if shape.nope:
                self.caches["nope"] = aligned(panels, shape.real)
        generator = np.random.default_rng(7)
        self.norms = [1 + 0.2 * generator.standard_normal(dim, np.float32) for _ in range(2 if shape.norm_eps else 0)]
        self.blocks = np.zeros((0, heads, 0), np.int32)
        self.q = np.zeros((0, shape.heads, dim), np.float32)
        self.q_nope: np.ndarray | None = None

    def _run(self, kernel: str, tokens: str, *arguments: Any) -> None:
        if kernel == "select":
            tokens = "many"  # one kernel serves both
        if self.isa in EMULATED:
            tensors = [argument for argument in arguments if not np.isscalar(argument)]
            program = compiled(self.shape, kernel, tokens, self.isa)
            for tensor, result in zip(tensors, emulated.call(program, self.isa, arguments), strict=True):
                if tensor.flags.writeable:
                    tensor[...] = result
            return
        copies = [argument if np.isscalar(argument) else self._tensor(argument) for argument in arguments]
        compiled(self.shape, kernel, tokens, self.isa)(*copies)

    @staticmethod
    def _tensor(array: np.ndarray) -> Any:
        if array.ctypes.data % 64:
            copy = aligned(array.shape, str(array.dtype))
            copy[...] = array
            array = copy
        return tvm.runtime.from_dlpack(array)

    def step(self, qkv: np.ndarray, start: int, dense_len: int | None = None, tokens: str | None = None) -> np.ndarray:
        """Append ``qkv`` (n, width) at ``start`` and return the attention (n, heads, head_dim)."""
        shape, count = self.shape, len(qkv)
        tokens = tokens or ("one" if count == 1 else "many")
        rows = (count, shape.heads, shape.head_dim)
        self.q, out = aligned(rows, "float32"), aligned(rows, "float32")
        out[...] = np.nan
        kv = [self.caches[name] for name in ("k", "v", "k_scale", "v_scale") if name in self.caches]
        extra = [self.caches["nope"]] if shape.nope else []
        plain = [aligned(rows, "float32")] if shape.nope else []
        table = rotation(shape.head_dim, start, count)
        small = tokens if self.small_forms else "many"
        self._run("append", small, qkv, table, *self.norms, self.layer, start, *kv, *extra, self.q, *plain)
        self.q_nope = plain[0] if plain else None
        if shape.sparse is None:
            self._run("attention_dense", tokens, self.q, self.layer, start, *kv, out)
            return out
        sparse = shape.sparse
        gear = sparse.dense_len if dense_len is None else dense_len
        keys = extra or [self.caches[name] for name in ("k", "k_scale") if name in self.caches]
        compressed = [self.caches["fine"], self.caches["coarse"]]
        self._run("compress", small, self.q, self.layer, start, *keys, *compressed)
        self.blocks = aligned((count, shape.kv_heads, sparse.budget), "int32")
        self.blocks[...] = -7
        scored = plain[0] if plain else self.q
        self._run("select", tokens, scored, self.layer, start, gear, *compressed, self.blocks)
        self._run("attention", tokens, self.q, self.blocks, self.layer, start, gear, *kv, out)
        return out

    def unpacked(self) -> LayerCache:
        """Return this layer's caches in the reference's layout."""

        def plane(name: str) -> torch.Tensor:
            array = self.caches[name][self.layer]
            if array.ndim == 4:  # (kv_heads, panels, head_dim, 16)
                array = array.transpose(0, 1, 3, 2).reshape(array.shape[0], -1, array.shape[2])
            return torch.from_numpy(array.copy())

        empty = torch.zeros(self.shape.kv_heads, 0, self.shape.head_dim)
        names = ("k", "v", "fine", "coarse", "nope")
        parts = [plane(name) if name in self.caches else empty for name in names]
        scales = [plane(name) for name in ("k_scale", "v_scale")] if self.shape.kv == "int8" else [None, None]
        return LayerCache(*parts, *scales)  # type: ignore[arg-type]


def rotation(head_dim: int, start: int, count: int) -> np.ndarray:
    """Return cosines, then sines, (count, head_dim) float32."""
    frequencies = (10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    angles = np.arange(start, start + count, dtype=np.float32)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def projections(shape: Shape, count: int, seed: int = 0) -> np.ndarray:
    """Return random qkv rows (count, (heads + 2 * kv_heads) * head_dim) float32."""
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return 1.5 * np.random.default_rng(seed).standard_normal((count, width), np.float32)
