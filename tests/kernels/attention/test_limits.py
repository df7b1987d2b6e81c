"""What the attention kernels refuse."""

from __future__ import annotations

from arkinfer.exporters.kernels.tir.attention import unsupported


def test_unsupported_sizes_are_named() -> None:
    assert unsupported(64) == []
    assert unsupported(64, 64, 16) == []
    assert unsupported(40) == ["head_dim 40 is not a multiple of 16"]
    assert "block_size 24 is not a multiple of 16" in unsupported(64, 24, 8)[0]
    assert "not a multiple of kernel_stride 48" in unsupported(64, 64, 48)[0]
