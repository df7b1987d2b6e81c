"""What the exporter, the plan interpreter and the compiler must know of a CUDA kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ARCHS = ("sm_87", "sm_89", "sm_90")  # Orin, RTX 4090, H100 and H200
# Shared memory that one block may ask for, in bytes; up to 48 KiB need no special attribute at launch.
SHARED_LIMIT = {"sm_87": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}

Options = Mapping[str, Any]  # JSON values; what they mean is said by the kernel's options class
Extent = int | str  # a number, or an expression in n (tokens of the step) and r (rows whose logits are wanted)


@dataclass(frozen=True)
class Argument:
    """One argument of a launch, in order: a pointer to ``shape`` elements, or an int32 passed by value.

    ``role`` is in, out, inout, or scalar; a scalar's value is the expression in ``shape[0]``. Pointers are aligned to
    16 bytes: the compiler relies on it. Rows lie ``row_stride`` elements apart (0: back to back).
    """

    name: str
    dtype: str
    shape: tuple[Extent, ...]
    role: str = "in"
    row_stride: int = 0


@dataclass(frozen=True)
class Variant:
    """How a kernel is compiled and launched for one arch: compile-time constants, warps, pipeline stages, grid.

    ``grid`` holds expressions in n and r of + - * // and numbers.
    """

    constants: Mapping[str, int | float | bool | str]
    grid: tuple[str, str, str]
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Kernel:
    """A kernel of the table. ``code`` is "file:function" in `device/`.

    ``options`` is the frozen dataclass that a launch's options must fit. ``reference`` computes the outputs in place,
    in plain torch on the CPU, rounding where the kernel rounds; it takes the options, the arguments by name (pointers
    as tensors of the argument's shape, dtype and row stride, scalars as ints), n and r.
    """

    code: str
    options: type[Any]
    arguments: Callable[[Any], tuple[Argument, ...]]
    variant: Callable[[Any, str], Variant]
    reference: Callable[[Any, Mapping[str, torch.Tensor], int, int], None]

    def parse(self, options: Options) -> Any:
        """Return ``options`` as this kernel's own class. Raises TypeError for a name that it does not have."""
        return self.options(**options)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(value: int) -> int:
    """Return the least power of two that is not below ``value``."""
    return 1 << max(0, value - 1).bit_length()


def rows_grid(rows: str, tile: int) -> str:
    """Return the expression for how many tiles cover ``rows`` ("n", "r" or a number)."""
    return rows if tile == 1 else f"({rows} + {tile - 1}) // {tile}"
