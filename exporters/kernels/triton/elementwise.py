"""SwiGLU, the rows whose logits are wanted, and products with a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from arkinfer.exporters.kernels.triton.kernel import Argument, Kernel, Variant, ceil_div

_BLOCK = 1024


@dataclass(frozen=True)
class Rows:
    """``width`` values a row; ``count`` is "n" or "r"."""

    width: int
    count: str = "n"


@dataclass(frozen=True)
class Taken:
    """``width`` values of ``dtype`` a row."""

    width: int
    dtype: str = "float16"


@dataclass(frozen=True)
class Scaled:
    """``width`` float32 values a row, multiplied in place by ``factor``."""

    width: int
    factor: float
    count: str = "n"


def _grid(count: str, width: int) -> tuple[str, str, str]:
    return (count, str(ceil_div(width, _BLOCK)), "1")


def _swiglu_arguments(options: Rows) -> tuple[Argument, ...]:
    return (
        Argument("gate_up", "float16", (options.count, 2 * options.width)),
        Argument("out", "float16", (options.count, options.width), "out"),
    )


def _swiglu_variant(options: Rows, arch: str) -> Variant:
    return Variant({"WIDTH": options.width, "BLOCK": _BLOCK}, _grid(options.count, options.width), 4, 1)


def _swiglu_reference(options: Rows, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    gate, up = arguments["gate_up"].float().chunk(2, dim=1)
    arguments["out"].copy_(torch.nn.functional.silu(gate) * up)


def _take_arguments(options: Taken) -> tuple[Argument, ...]:
    return (
        Argument("x", options.dtype, ("n", options.width)),
        Argument("rows", "int32", ("r",)),
        Argument("out", options.dtype, ("r", options.width), "out"),
    )


def _take_variant(options: Taken, arch: str) -> Variant:
    return Variant({"WIDTH": options.width, "BLOCK": _BLOCK}, _grid("r", options.width), 4, 1)


def _take_reference(options: Taken, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    arguments["out"].copy_(arguments["x"][arguments["rows"].long()])


def _scale_arguments(options: Scaled) -> tuple[Argument, ...]:
    return (Argument("x", "float32", (options.count, options.width), "inout"),)


def _scale_variant(options: Scaled, arch: str) -> Variant:
    constants: dict[str, int | float | bool | str] = {
        "WIDTH": options.width,
        "FACTOR": options.factor,
        "BLOCK": _BLOCK,
    }
    return Variant(constants, _grid(options.count, options.width), 4, 1)


def _scale_reference(options: Scaled, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    arguments["x"].mul_(options.factor)


SWIGLU = Kernel("elementwise:swiglu", Rows, _swiglu_arguments, _swiglu_variant, _swiglu_reference)
TAKE_ROWS = Kernel("elementwise:take_rows", Taken, _take_arguments, _take_variant, _take_reference)
SCALE = Kernel("elementwise:scale", Scaled, _scale_arguments, _scale_variant, _scale_reference)
