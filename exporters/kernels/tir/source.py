"""Text of TVMScript: what kernels are written in, because the scheduling language cannot name the vectors we want.

Expressions are strings. Loops count in int64, so that a tensor of an 8B model can be indexed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

Extent = int | str


class Source:
    """One kernel in the making: parameters in the order of their declaration, then lines of its body."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._parameters: list[str] = []
        self._buffers: list[str] = []
        self._symbols: dict[str, None] = {}
        self._lines: list[str] = []
        self._depth = 1
        self._count = 0

    def buffer(self, name: str, shape: Sequence[Extent], dtype: str, align: int = 64, view: bool = False) -> None:
        """Declare a tensor parameter; extents that are names become symbolic int64 dimensions.

        A ``view`` may begin anywhere in its memory.
        """
        for extent in shape:
            if isinstance(extent, str):
                self._symbols.setdefault(extent)
        extents = ", ".join(extent if isinstance(extent, str) else f"T.int64({extent})" for extent in shape)
        self._parameters.append(f"{name}_handle: T.handle")
        start = f", elem_offset={name}_start" if view else ""
        if view:
            self._symbols.setdefault(f"{name}_start")
        self._buffers.append(f'{name} = T.match_buffer({name}_handle, ({extents},), "{dtype}", align={align}{start})')

    def scalar(self, name: str, dtype: str = "int64") -> None:
        """Declare a scalar parameter."""
        self._parameters.append(f"{name}: T.{dtype}")

    def line(self, text: str) -> None:
        """Append one statement."""
        self._lines.append("    " * self._depth + text)

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """Open ``header:`` and indent what follows."""
        self.line(header + ":")
        self._depth += 1
        yield
        self._depth -= 1

    @contextmanager
    def loop(self, variable: str, extent: Extent, kind: str = "serial") -> Iterator[str]:
        """Open ``for variable in T.kind(extent)`` with an int64 variable; kind "serial", "parallel" or "unroll"."""
        stop = extent if isinstance(extent, str) else f"T.int64({extent})"
        with self.block(f"for {variable} in T.{kind}({stop})"):
            yield variable

    def let(self, name: str, value: str) -> str:
        """Bind ``value`` to a fresh name made from ``name`` and return it."""
        self._count += 1
        fresh = f"{name}_{self._count}"
        self.line(f"{fresh}: T.let = {value}")
        return fresh

    def local(self, name: str, size: int, dtype: str) -> str:
        """Allocate a thread's own array in registers or on the stack, under 1 KiB.

        Larger arrays become calls of the runtime's workspace allocator, each time round a parallel loop; so does any
        array of the scope called "local".
        """
        self._count += 1
        fresh = f"{name}_{self._count}"
        self.line(f'{fresh} = T.alloc_buffer(({size},), "{dtype}", scope="global", align=64)')
        return fresh

    def prefetch(self, element: str) -> None:
        """Ask for the cache line of ``element`` (a buffer with an index, which may lie past the end)."""
        self.line(f'T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of({element}), 0, 3, 1))')

    def text(self) -> str:
        """Return the whole kernel."""
        head = ["# from tvm.script import tirx as T", "@T.prim_func(s_tir=True)"]
        head.append(f"def {self.name}({', '.join(self._parameters)}):")
        head.append(f'    T.func_attr({{"global_symbol": "{self.name}", "tirx.noalias": True}})')
        head += [f"    {symbol} = T.int64()" for symbol in self._symbols]
        head += [f"    {buffer}" for buffer in self._buffers]
        return "\n".join(head + self._lines) + "\n"

    def build(self) -> Any:
        """Parse the text into a tvm PrimFunc."""
        return _parse(self.text())


@cache  # parsing is slow, and kernels for different widths often have the same text
def _parse(text: str) -> Any:
    import tvm

    return tvm.script.from_source(text)


def ramp(start: str, lanes: int) -> str:
    """Return the index of ``lanes`` consecutive elements."""
    return f"T.Ramp({start}, 1, {lanes})"


def splat(value: str, lanes: int) -> str:
    """Return a vector of ``lanes`` copies."""
    return f"T.Broadcast({value}, {lanes})"


def real(value: float, lanes: int = 1) -> str:
    """Return a float32 constant, as a vector if ``lanes`` > 1."""
    constant = f"T.float32({value!r})"
    return constant if lanes == 1 else splat(constant, lanes)


def integer(value: int, lanes: int = 1) -> str:
    """Return an int32 constant, as a vector if ``lanes`` > 1."""
    constant = f"T.int32({value})"
    return constant if lanes == 1 else splat(constant, lanes)


def cast(dtype: str, value: str) -> str:
    """Return ``value`` converted to ``dtype`` (with its lanes, as in "float32x16")."""
    return f'T.Cast("{dtype}", {value})'


def bits(dtype: str, value: str) -> str:
    """Return the bits of ``value`` read as ``dtype``."""
    return f'T.reinterpret("{dtype}", {value})'


def intrinsic(dtype: str, name: str, *arguments: str) -> str:
    """Return a call of an LLVM intrinsic without side effects."""
    return f'T.call_llvm_pure_intrin("{dtype}", "{name}", {", ".join(arguments)})'


def add(*terms: str) -> str:
    """Return a sum, left to right."""
    return terms[0] if len(terms) == 1 else "(" + " + ".join(terms) + ")"


def fma(a: str, b: str, c: str, lanes: int) -> str:
    """Return a * b + c in float32, rounded once.

    Always written out: the code generator may contract a separate product and sum in one kernel and not in another,
    and rows would then depend on the kernel that computed them.
    """
    return intrinsic(vector_type("float32", lanes), "llvm.fma", a, b, c)


def vector_type(dtype: str, lanes: int) -> str:
    """Return the name of a vector type; one lane is the scalar."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def load(buffer: str, index: str, lanes: int, dtype: str) -> str:
    """Return ``lanes`` elements as float32; ``index`` leads up to the last axis' start, dtype is that of storage.

    bfloat16 is stored in uint16 buffers, since numpy has no such type.
    """
    *leading, start = index.rsplit(",", 1) if "," in index else [index]
    at = ",".join([*leading, " " + ramp(start.strip(), lanes)]) if lanes > 1 else index
    value = f"{buffer}[{at.strip()}]"
    if dtype == "float32":
        return value
    if dtype == "bfloat16":
        wide = cast(vector_type("uint32", lanes), value)
        shift = splat("T.uint32(16)", lanes) if lanes > 1 else "T.uint32(16)"
        return bits(vector_type("float32", lanes), f"T.shift_left({wide}, {shift})")
    return cast(vector_type("float32", lanes), value)


def storage(dtype: str) -> str:
    """Return the dtype of the buffer that holds ``dtype``."""
    return "uint16" if dtype == "bfloat16" else dtype


def exp(source: Source, x: str, lanes: int) -> str:
    """Emit exp(x) for float32 vectors and return its name; below -87 it is 0, above 88.37 it stays at 2.4e38.

    Cephes' expf: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 6 and n added to the exponent; within 1 ulp.
    Calls of the C library would be scalar, and differ between machines.
    """
    kind = vector_type("float32", lanes)
    whole = vector_type("int32", lanes)
    v = source.let("v", x)
    clamped = source.let("clamped", f"T.max(T.min({v}, {real(88.37, lanes)}), {real(-87.0, lanes)})")
    n = source.let("n", intrinsic(kind, "llvm.rint", f"{clamped} * {real(1.44269504088896341, lanes)}"))
    r = source.let("r", fma(n, real(-0.693359375, lanes), clamped, lanes))
    r = source.let("r", fma(n, real(2.12194440e-4, lanes), r, lanes))
    p = real(1.9875691500e-4, lanes)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, real(coefficient, lanes), lanes)
    square = source.let("square", f"{r} * {r}")
    p = source.let("p", fma(p, square, f"({r} + {real(1.0, lanes)})", lanes))
    # The exponent is added as an integer: a float product could be contracted into the caller's sum.
    exponent = f"T.shift_left({cast(whole, n)}, {integer(23, lanes)})"
    scaled = bits(kind, f"({bits(whole, p)} + {exponent})")
    return source.let("exp", f"T.Select({v} < {real(-87.0, lanes)}, {real(0.0, lanes)}, {scaled})")


def swiglu(source: Source, gate: str, up: str, lanes: int) -> str:
    """Emit silu(gate) * up for float32 vectors and return its name."""
    gate = source.let("gate", gate)
    denominator = f"({exp(source, f'{real(0.0, lanes)} - {gate}', lanes)} + {real(1.0, lanes)})"
    return source.let("swiglu", f"({gate} / {denominator}) * {up}")


def index(start: str, lanes: int) -> str:
    """Return the index of ``lanes`` elements from ``start``; a plain one for one lane."""
    return ramp(start, lanes) if lanes > 1 else start


def fill(value: str, lanes: int) -> str:
    """Return ``value`` in every lane; itself for one lane."""
    return splat(value, lanes) if lanes > 1 else value
