"""Random arguments for a launch of a CUDA kernel, what it must give, and how far the kernel is from that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from arkinfer.exporters.kernels import triton as kernels
from arkinfer.exporters.kernels.triton import layout
from arkinfer.exporters.kernels.triton.kernel import Argument, Kernel
from arkinfer.quant.packed import Packed, pack_crumbs, pack_nibbles

CODES = {"int8": 256, "int4": 16, "int2": 4, "ternary": 3}


@dataclass(frozen=True)
class Case:
    """A kernel, its options, and the step that it runs in: ``n`` tokens from ``position`` on, ``r`` wanted rows."""

    kernel: str
    options: Mapping[str, Any]
    n: int = 1
    r: int = 1
    position: int = 0
    dense_len: int = 1 << 30
    values: Mapping[str, Any] = field(default_factory=dict)  # arguments given instead of drawn
    note: str = ""

    def __str__(self) -> str:
        shown = [f"{name}={value}" for name, value in self.options.items() if value not in (False, None)]
        return " ".join(
            [self.kernel, *shown, f"n={self.n} r={self.r} at {self.position}", self.note or " ".join(self.values)]
        )

    @property
    def described(self) -> Kernel:
        return kernels.kernel(self.kernel)

    @property
    def parsed(self) -> Any:
        return self.described.parse(self.options)

    def extent(self, value: int | str) -> int:
        sizes = {"n": self.n, "r": self.r, "c": self.options.get("context", 0)}
        return value if isinstance(value, int) else int(eval(value, sizes))


Values = dict[str, torch.Tensor | int]


def draw(case: Case, seed: int = 0) -> Values:
    """Return every argument of the launch by name; outputs hold NaN or a number that no kernel writes."""
    generator = torch.Generator().manual_seed(seed)
    arguments = case.described.arguments(case.parsed)
    weight = _weight(case, generator) if hasattr(case.parsed, "format") else {}
    values: Values = {}
    for argument in arguments:
        shape = tuple(case.extent(extent) for extent in argument.shape)
        if argument.role == "scalar":
            values[argument.name] = shape[0]
        elif argument.name in case.values:
            given = torch.as_tensor(case.values[argument.name], dtype=layout.TORCH[argument.dtype])
            assert given.shape == shape, (argument.name, given.shape, shape)
            values[argument.name] = given.clone()
        elif argument.name in weight:
            assert weight[argument.name].shape == shape, (argument.name, weight[argument.name].shape, shape)
            values[argument.name] = weight[argument.name]
        else:
            values[argument.name] = _drawn(case, argument, shape, generator)
    return values


def _drawn(case: Case, argument: Argument, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    dtype = layout.TORCH[argument.dtype]
    if argument.name == "control":
        control = torch.zeros(shape, dtype=dtype)
        control[:3] = torch.tensor([case.position, case.dense_len, case.n])
        return control
    if argument.role == "out":
        size = shape[0] * (argument.row_stride or math.prod(shape[1:]))
        blank = torch.full((size,), math.nan if dtype.is_floating_point else -77, dtype=dtype)
        return torch.as_strided(blank, shape, (argument.row_stride, 1)) if argument.row_stride else blank.view(shape)
    if argument.name == "tokens":
        return torch.randint(0, case.options.get("rows", 9), shape, generator=generator, dtype=dtype)
    if argument.name == "rows":
        return torch.randint(0, case.n, shape, generator=generator, dtype=dtype)
    if argument.name == "order":
        return torch.randperm(shape[0], generator=generator).to(dtype)
    if argument.name in ("cos", "sin"):
        angles = torch.arange(shape[0])[:, None] * 0.7 ** torch.arange(shape[1])
        return getattr(torch, argument.name)(angles).float()
    if argument.name == "scores":  # never negative, and many of them equal
        return torch.randint(0, 6, shape, generator=generator) / 4
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=dtype)
    if argument.name.endswith("_scale"):
        return torch.rand(shape, generator=generator) * 0.02
    return torch.randn(shape, generator=generator).to(dtype)


def _weight(case: Case, generator: torch.Generator) -> dict[str, torch.Tensor]:
    options = case.parsed
    rows, width = options.rows, options.width
    if options.format == "dense":
        return {"weight": torch.randn(rows, width, generator=generator).to(layout.TORCH[options.dtype])}
    codes = torch.randint(0, CODES[options.format], (rows, width), generator=generator, dtype=torch.uint8)
    groups = width // (options.group or width)
    if options.format == "int8":
        stored = (codes.int() - 128).to(torch.int8)
    else:
        stored = pack_nibbles(codes) if options.format == "int4" else pack_crumbs(codes)
    scales = (0.5 + torch.rand(rows, groups, generator=generator)).to(layout.TORCH[options.scales])
    zeros = torch.randint(0, CODES[options.format], (rows, groups), generator=generator, dtype=torch.uint8)
    packed = Packed(options.format, options.group, (rows, width), stored, scales, zeros if options.zeros else None)
    return layout.pack(packed)


def copied(values: Values) -> Values:
    """Return the arguments with every tensor copied, strides kept."""
    return {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in values.items()
    }


def expected(case: Case, values: Values) -> Values:
    """Return the arguments after the kernel's reference has run, in float64 wherever it is not told to round."""
    result = copied(values)
    # Choosing blocks reads the bits of float32 scores: there is nothing to widen.
    widened = torch.Tensor.float if case.kernel == "select_blocks" else torch.Tensor.double
    with mock.patch.object(torch.Tensor, "float", widened):
        case.described.reference(case.parsed, result, case.n, case.r)  # type: ignore[arg-type]
    return result


@dataclass(frozen=True)
class Deviation:
    """The largest error of one output, relative to its largest value, and what is allowed."""

    argument: str
    error: float
    allowed: float

    @property
    def fine(self) -> bool:
        return self.error <= self.allowed  # false for NaN


def deviations(case: Case, wanted: Values, got: Values) -> list[Deviation]:
    """Compare everything that the kernel may write; what neither wrote (NaN in both) is equal."""
    found = []
    for argument in case.described.arguments(case.parsed):
        if argument.role not in ("out", "inout"):
            continue
        want, have = wanted[argument.name], got[argument.name]
        assert isinstance(want, torch.Tensor) and isinstance(have, torch.Tensor)
        if not want.dtype.is_floating_point:
            # int8 codes of equal numbers may differ by one where the number lies between two.
            slack = 1.0 if want.dtype == torch.int8 else 0.0
            found.append(Deviation(argument.name, float((want.int() - have.int()).abs().max()), slack))
            continue
        same = (want == have) | (want.isnan() & have.isnan())  # -inf too
        apart = torch.where(same, 0.0, (want.double() - have.double()).abs())
        largest = want.double()[want.isfinite()].abs().max().item() if bool(want.isfinite().any()) else 1.0
        allowed = 1.5e-3 if want.dtype == torch.float16 else 2e-3 if argument.name == "partial" else 3e-5
        found.append(Deviation(argument.name, apart.max().item() / max(largest, 1e-6), allowed))
    return found


def launch(case: Case, values: Values, arch: str) -> None:
    """Run the kernel's code on ``values`` through Triton, interpreted or on a GPU, as an artifact would launch it."""
    from importlib import import_module

    kernel, options = case.described, case.parsed
    file, function = kernel.code.split(":")
    code = getattr(import_module(f"arkinfer.exporters.kernels.triton.device.{file}"), function)
    variant = kernel.variant(options, arch)
    grid = tuple(int(eval(expression, {"n": case.n, "r": case.r})) for expression in variant.grid)
    given = {**values, **variant.constants}
    every = {name: given.get(name) for name in code.arg_names}
    code[grid](**every, num_warps=variant.num_warps, num_stages=variant.num_stages)
