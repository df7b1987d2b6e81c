"""Every CUDA kernel compiles for every arch without a GPU: nothing spilled, shared memory within limits, wide loads."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import pytest

from arkinfer.exporters.kernels import triton as kernels
from arkinfer.exporters.kernels.triton.cubin import Cubin, Job, compile_all
from arkinfer.exporters.kernels.triton.kernel import ARCHS, SHARED_LIMIT

pytest.importorskip("triton")

SHAPE = {"heads": 32, "kv_heads": 2, "head_dim": 128, "context": 32768}
ATTENTION = {**SHAPE, "scale": 0.088}
WINDOWS = {"kernel_size": 32, "kernel_stride": 16}
SELECT = {
    **ATTENTION,
    **WINDOWS,
    "context": 131072,
    "block_size": 64,
    "init_blocks": 1,
    "local_blocks": 32,
    "budget": 96,
}
MATRIX = {"rows": 4096, "width": 4096}

# One set of options for each kernel and weight format, in the sizes of MiniCPM4-8B.
OPTIONS: dict[str, tuple[str, dict[str, object]]] = {
    "embedding": ("embedding", {"format": "int4", "rows": 73448, "width": 4096, "group": 128}),
    "rms_norm": ("rms_norm", {"width": 4096, "eps": 1e-5}),
    "add_rms_norm": ("add_rms_norm", {"width": 4096, "eps": 1e-5, "scale": 0.2}),
    "gemv bfloat16": ("linear_gemv", {**MATRIX, "format": "dense", "dtype": "bfloat16"}),
    "gemv int8": ("linear_gemv", {**MATRIX, "format": "int8", "group": 128}),
    "gemv int4": ("linear_gemv", {**MATRIX, "format": "int4", "group": 128, "zeros": True}),
    "gemv ternary": ("linear_gemv", {**MATRIX, "format": "ternary", "group": 128}),
    "gemv gated": ("linear_gemv", {"rows": 32768, "width": 4096, "format": "ternary", "gated": True}),
    "gemm float16": ("linear_gemm", {**MATRIX, "format": "dense"}),
    "gemm int8": ("linear_gemm", {**MATRIX, "format": "int8"}),
    "gemm int4": ("linear_gemm", {**MATRIX, "format": "int4", "group": 128}),
    "gemm ternary": ("linear_gemm", {**MATRIX, "format": "ternary", "group": 128}),
    "gemm gated": ("linear_gemm", {"rows": 32768, "width": 4096, "format": "ternary", "gated": True}),
    "gemm few": ("linear_gemm", {**MATRIX, "format": "int4", "group": 128, "count": "r", "out": "float32"}),
    "rope_append": ("rope_append", {**SHAPE, "kv": "int8", "norm_eps": 1e-6}),
    "rope_append nope": ("rope_append", {**SHAPE, "nope": True}),
    "decode": ("attention_decode", {**ATTENTION, "splits": 64, "budget": 96}),
    "decode int8": ("attention_decode", {**ATTENTION, "splits": 64, "kv": "int8"}),
    "combine": ("attention_combine", {**ATTENTION, "splits": 64}),
    "prefill": ("attention_prefill", ATTENTION),
    "prefill int8": ("attention_prefill", {**ATTENTION, "kv": "int8", "budget": 96}),
    "sparse": ("attention_sparse", {**ATTENTION, "budget": 96}),
    "sparse int8": ("attention_sparse", {**ATTENTION, "budget": 96, "kv": "int8"}),
    "compress": ("compress", {"kv_heads": 2, "head_dim": 128, "context": 131072, **WINDOWS, "kv": "int8"}),
    "select_lse": ("select_lse", {**SELECT, "splits": 16}),
    "select_scores": ("select_scores", {**SELECT, "splits": 16}),
    "select_scores many": ("select_scores", {**SELECT, "kernel_size": 8, "kernel_stride": 4}),
    "select_blocks": ("select_blocks", SELECT),
    "select_blocks many": ("select_blocks", {**SELECT, "block_size": 16}),
    "swiglu": ("swiglu", {"width": 16384}),
    "take_rows": ("take_rows", {"width": 4096}),
    "scale": ("scale", {"width": 73448, "factor": 0.0625}),
    "argmax_partial": ("argmax_partial", {"vocab": 73448}),
    "sample_narrow": ("sample_narrow", {"vocab": 151936}),
    "sample_mass": ("sample_mass", {"vocab": 151936}),
    "sample": ("sample", {"vocab": 151936, "context": 32768}),
    "argmax": ("argmax", {"vocab": 73448}),
}
AGAIN = ("gemv ternary", "gemm int4", "decode int8")  # compiled a second time


@dataclass(frozen=True)
class Compiled:
    cubins: dict[tuple[str, str], Cubin]

    def of(self, name: str, arch: str) -> Cubin:
        return self.cubins[name, arch]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    keys = [(name, arch) for arch in ARCHS for name in OPTIONS]
    jobs = [Job(*OPTIONS[name], arch) for name, arch in keys]
    return Compiled(dict(zip(keys, compile_all(jobs), strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_code_fits_the_device(compiled: Compiled, name: str, arch: str) -> None:
    cubin = compiled.of(name, arch)
    assert cubin.stack == 0  # bytes of local memory: what spills
    assert cubin.registers * 32 * cubin.num_warps <= 65536
    assert cubin.shared <= SHARED_LIMIT[arch]
    assert f".target {arch}" in cubin.ptx
    assert f".entry {cubin.entry}(" in cubin.ptx
    assert os.getcwd() not in cubin.ptx
    assert os.getcwd().encode() not in cubin.code


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIONS if name.startswith("gemv")])
def test_weights_are_read_sixteen_bytes_at_a_time(compiled: Compiled, name: str) -> None:
    for arch in ARCHS:
        loads = re.findall(r"ld\.global\S*", compiled.of(name, arch).ptx)
        assert any("evict_first" in load and ".v4" in load for load in loads)
        assert not any("evict_first" in load and ".v4" not in load for load in loads)
        # Codes are subnormal factors: flushing those to zero would lose the weights.
        assert "fma.rn.f32" in compiled.of(name, arch).ptx
        assert ".ftz" not in compiled.of(name, arch).ptx


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemm int4", "gemm ternary", "decode", "prefill"])
def test_tiles_arrive_by_asynchronous_copies_and_meet_tensor_cores(compiled: Compiled, name: str) -> None:
    for arch in ARCHS:
        ptx = compiled.of(name, arch).ptx
        assert re.search(r"cp\.async\.cg\.shared\.global[^;]*0x10", ptx)  # 16 bytes
        assert re.search(r"\bw?g?mma\.", ptx)


@pytest.mark.slow
def test_the_same_job_gives_the_same_bytes(compiled: Compiled) -> None:
    for arch in ARCHS:
        jobs = [Job(*OPTIONS[name], arch) for name in AGAIN]
        again = [cubin.digest for cubin in compile_all(jobs, keep=False)]
        assert again == [compiled.of(name, arch).digest for name in AGAIN]


@pytest.mark.slow
def test_what_was_compiled_is_kept(compiled: Compiled) -> None:
    """A process would be started for what is missing; there is no triton in it to compile with."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = "/nowhere"
    try:
        assert compile_all([Job(*OPTIONS["swiglu"], "sm_89")]) == [compiled.of("swiglu", "sm_89")]
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def test_every_kernel_is_compiled() -> None:
    assert {kernel for kernel, _ in OPTIONS.values()} == set(kernels.KERNELS)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="widht"):
        kernels.kernel("swiglu").parse({"widht": 3})
