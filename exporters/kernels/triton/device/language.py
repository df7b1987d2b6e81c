"""The one file that imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

jit = triton.jit
__all__ = ["jit", "tl", "triton"]
