"""What the attention kernels refuse, and that they compile for processors that this machine is not."""

from __future__ import annotations

import pytest
import tvm

from arkinfer.exporters.kernels import tir
from arkinfer.exporters.kernels.tir.attention import unsupported
from arkinfer.exporters.kernels.tir.isa import AARCH64_DOTPROD
from tests.kernels.attention.layer import Shape


def test_unsupported_sizes_are_named() -> None:
    assert unsupported(64) == []
    assert unsupported(64, 64, 16) == []
    assert unsupported(40) == ["head_dim 40 is not a multiple of 16"]
    assert "block_size 24 is not a multiple of 16" in unsupported(64, 24, 8)[0]
    assert "not a multiple of kernel_stride 48" in unsupported(64, 64, 48)[0]


@pytest.mark.parametrize("kernel", ["append", "compress", "select", "attention"])
def test_aarch64_code_calls_no_mathematical_library(kernel: str) -> None:
    shape = Shape(4, 2, 32, "float16")
    function = tir.build(kernel, AARCH64_DOTPROD, "one", shape.options(kernel)).with_attr("global_symbol", "main")
    target = tvm.target.Target(dict(AARCH64_DOTPROD.target))
    executable = tvm.compile(tvm.IRModule({"main": function}), target=target)
    modules = [executable.mod, *executable.mod.imports]
    text = "".join(module.inspect_source("asm") for module in modules if module.kind == "llvm")
    called = {line.split()[1] for line in text.splitlines() if line.split()[:1] == ["bl"]}
    assert text
    assert not [name for name in called if name in ("expf", "logf", "fmaf", "rintf", "sqrtf")]
