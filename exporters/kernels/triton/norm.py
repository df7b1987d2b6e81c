"""RMSNorm of the float32 residual stream to float16, with or without adding a branch to it first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from arkinfer.exporters.kernels.triton.kernel import Argument, Kernel, Variant, power_of_two


@dataclass(frozen=True)
class Norm:
    """x (n, width); ``scale`` multiplies the branch that add_rms_norm adds; ``count`` is "n" or "r"."""

    width: int
    eps: float
    scale: float = 1.0
    count: str = "n"


def _arguments(options: Norm) -> tuple[Argument, ...]:
    shape = (options.count, options.width)
    return (
        Argument("x", "float32", shape),
        Argument("weight", "float32", (options.width,)),
        Argument("out", "float16", shape, "out"),
    )


def _add_arguments(options: Norm) -> tuple[Argument, ...]:
    shape = (options.count, options.width)
    return (
        Argument("residual", "float32", shape, "inout"),
        Argument("delta", "float32", shape),
        Argument("weight", "float32", (options.width,)),
        Argument("out", "float16", shape, "out"),
    )


def _variant(options: Norm, arch: str) -> Variant:
    block = power_of_two(options.width)
    warps = max(1, min(16, block // 256))
    constants: dict[str, int | float | bool | str] = {"WIDTH": options.width, "EPS": options.eps, "BLOCK": block}
    return Variant(constants, (options.count, "1", "1"), warps, 1)


def _add_variant(options: Norm, arch: str) -> Variant:
    plain = _variant(options, arch)
    return Variant({**plain.constants, "SCALE": options.scale}, plain.grid, plain.num_warps, 1)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def _reference(options: Norm, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    arguments["out"].copy_(_normed(arguments["x"], arguments["weight"], options.eps))


def _add_reference(options: Norm, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    residual = arguments["residual"]
    residual += arguments["delta"] * options.scale
    arguments["out"].copy_(_normed(residual, arguments["weight"], options.eps))


RMS_NORM = Kernel("norm:rms_norm", Norm, _arguments, _variant, _reference)
ADD_RMS_NORM = Kernel("norm:add_rms_norm", Norm, _add_arguments, _add_variant, _add_reference)
