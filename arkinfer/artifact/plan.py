"""The execution plan of a GPU artifact: buffers, kernels and ordered launches, as data that every side reads alike.

A plan holds one schedule per kind of step (decode, verify, prefill). Its buffers are named; a launch hands a kernel
pointers into them. Sizes are numbers or expressions over ``n`` (tokens of the step), ``r`` (rows whose logits are
wanted) and, for caches alone, ``c`` (the capacity of the sequence in tokens). Scratch buffers are places in one arena,
planned by lifetime.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

FORMAT = 2  # of payload/plan.json; readers refuse any other
ALIGNMENT = 256  # bytes; kernels are compiled for pointers to whole multiples of 16
ITEM_BYTES: Mapping[str, int] = {
    "uint8": 1, "int8": 1, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4,
}  # fmt: skip
KINDS = ("parameter", "cache", "input", "output", "control", "scratch")
ROLES = ("in", "out", "inout", "scalar")
# The first int32 values of the control buffer; 1 / temperature (0: greedy) and top_p are the bits of a float32.
CONTROL = ("position", "dense_len", "tokens", "inverse_temperature", "top_k", "top_p")
CONTROL_SIZE = 16  # int32 values
SAMPLING = ("greedy", "draw")
BLOCK = 64  # tokens of an attention block: capacities are multiples of it
NEVER = 1 << 30  # a dense_len that no position reaches
MOST_BLOCKS = ((1 << 31) - 1, 65535, 65535)  # of a grid, along each axis (CUDA, compute capability 8 and 9)

Extent = int | str


@cache
def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{text[:80]!r} is not an expression") from error


def evaluate(extent: Extent, sizes: Mapping[str, int]) -> int:
    """Return the value of a number or of an expression over ``sizes``: names, whole numbers, ``+ - * //``, brackets.

    Raises ValueError for anything else.
    """
    if isinstance(extent, int):
        return extent

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.Sub):
                return left - right
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.FloorDiv) and right:
                return left // right
        raise ValueError(f"{extent!r} uses more than {', '.join(sizes)}, whole numbers and + - * //")

    return value(_parsed(extent))


def whole_blocks(tokens: int) -> int:
    """Return the capacity of a sequence that is to hold ``tokens``."""
    return -(-tokens // BLOCK) * BLOCK


@dataclass(frozen=True)
class Buffer:
    """Memory for one tensor. ``offset`` is the place of a scratch buffer in the arena, in bytes."""

    name: str
    dtype: str
    shape: tuple[Extent, ...]
    kind: str
    offset: int | None = None

    def extents(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(evaluate(extent, sizes) for extent in self.shape)

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.extents(sizes))


@dataclass(frozen=True)
class Argument:
    """What a kernel takes: a device pointer to ``shape`` elements (``role`` in, out or inout), or, for the role scalar,
    an int32 passed by value: the expression in ``shape[0]``. Rows lie ``row_stride`` elements apart (0: back to back).
    """

    name: str
    dtype: str
    shape: tuple[Extent, ...]
    role: str = "in"
    row_stride: int = 0

    def extents(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(evaluate(extent, sizes) for extent in self.shape)

    def strides(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the distance, in elements, of neighbours along each axis."""
        extents = self.extents(sizes)
        strides = [math.prod(extents[axis + 1 :]) for axis in range(len(extents))]
        if self.row_stride:
            strides[0] = self.row_stride
        return tuple(strides)

    def span(self, sizes: Mapping[str, int]) -> int:
        """Return the bytes from the first element to the end of the last."""
        extents = self.extents(sizes)
        if not math.prod(extents):
            return 0
        last = sum(stride * (extent - 1) for stride, extent in zip(self.strides(sizes), extents, strict=True))
        return ITEM_BYTES[self.dtype] * (last + 1)


@dataclass(frozen=True)
class Image:
    """A kernel compiled for one architecture: ``file`` (cubin) and ``ptx`` lie in the artifact.

    A launch passes the arguments in order, then two zero words of 64 bits, to ``entry``. ``grid`` is in blocks of
    32 * ``warps`` threads with ``shared`` bytes of dynamic shared memory.
    """

    file: str
    ptx: str
    entry: str
    grid: tuple[Extent, Extent, Extent]
    warps: int
    shared: int


@dataclass(frozen=True)
class Kernel:
    """One entry of the kernel table: a kernel of the registry under certain options, and its images by architecture."""

    name: str
    options: Mapping[str, Any]
    arguments: tuple[Argument, ...]
    images: Mapping[str, Image] = field(default_factory=dict)

    @property
    def pointed(self) -> list[Argument]:
        """The arguments that are pointers, in order."""
        return [argument for argument in self.arguments if argument.role != "scalar"]


@dataclass(frozen=True)
class Pointer:
    """An address: ``offset`` bytes into a buffer."""

    buffer: str
    offset: int = 0


@dataclass(frozen=True)
class Launch:
    """One kernel launch: ``kernel`` is a place in the kernel table, ``pointers`` are in the order of its pointers."""

    kernel: int
    pointers: tuple[Pointer, ...]


@dataclass(frozen=True)
class Tap:
    """A value worth looking at: what ``buffer`` holds after launch ``after``, under a public name."""

    name: str
    buffer: str
    after: int


@dataclass(frozen=True)
class Schedule:
    """What runs for a step of at most ``tokens`` tokens: the launches before ``head`` once, then those from ``head`` on
    once for every ``rows`` rows of logits that are wanted.
    """

    tokens: int
    rows: int
    scratch: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    head: int
    taps: tuple[Tap, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of a step that one run of a schedule computes: tokens ``start`` to ``stop``, and the rows among them
    (counted from ``start``) whose logits are wanted, in groups that the head takes at once.
    """

    schedule: str
    start: int
    stop: int
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    """All that an executor needs beside the weights: ``facts`` are the model's (vocabulary, rope, sparse, traffic).

    ``sampling`` holds what may follow a step on the device, "greedy" and "draw": launches that read the first row of
    logits, and control's position, which is that of the row. They write the token, put it where the next step reads it
    and add one to the position.
    """

    levels: tuple[str, ...]
    buffers: tuple[Buffer, ...]
    kernels: tuple[Kernel, ...]
    schedules: Mapping[str, Schedule]
    sampling: Mapping[str, Schedule]
    arena: int
    facts: Mapping[str, Any]

    @property
    def capacity(self) -> int:
        """The context in whole attention blocks: the largest ``c``."""
        return int(self.facts["capacity"])

    def of_kind(self, kind: str) -> list[Buffer]:
        return [buffer for buffer in self.buffers if buffer.kind == kind]

    def pieces(self, count: int, logits: str) -> list[Piece]:
        """Cut a step of ``count`` tokens: each piece takes the smallest schedule that holds what is left, else the
        largest. ``logits`` is last, all or none.
        """
        by_size = sorted(self.schedules, key=lambda name: self.schedules[name].tokens)
        pieces, start = [], 0
        while start < count:
            left = count - start
            name = next((name for name in by_size if self.schedules[name].tokens >= left), by_size[-1])
            schedule = self.schedules[name]
            size = min(left, schedule.tokens)
            rows = range(size) if logits == "all" else range(size - 1, size if logits == "last" and size == left else 0)
            groups = [tuple(rows[first : first + schedule.rows]) for first in range(0, len(rows), schedule.rows)]
            pieces.append(Piece(name, start, start + size, tuple(groups)))
            start += size
        return pieces

    def storing(self, schedule: Schedule) -> int:
        """Return how many launches a piece runs of which no logits are wanted: up to the last that writes a cache."""
        caches = {buffer.name for buffer in self.of_kind("cache")}
        last = 0
        for index, launch in enumerate(schedule.launches[: schedule.head]):
            pairs = zip(self.kernels[launch.kernel].pointed, launch.pointers, strict=True)
            if any(argument.role != "in" and pointer.buffer in caches for argument, pointer in pairs):
                last = index + 1
        return last

    def to_json(self) -> str:
        """Return the plan as canonical JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read and check a plan. Raises ValueError, with the reason, for anything but a sound one."""
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                found = data.get("format") if isinstance(data, dict) else None
                raise ValueError(f"its format is {found!r}, and this version of arkinfer reads {FORMAT}")
            plan = _plan(data)
            plan.check()
            plan.check_facts()
        except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"an entry is missing or malformed: {error}") from error
        return plan

    def check(self) -> None:
        """Raise ValueError where a launch would leave its buffers or call a kernel with other arguments than it has."""
        names = {buffer.name for buffer in self.buffers}
        if len(names) != len(self.buffers):
            raise ValueError("two buffers have one name")
        for buffer in self.buffers:
            _check_buffer(buffer, {"c": self.capacity} if buffer.kind == "cache" else {})
        if set(self.sampling) != set(SAMPLING):
            raise ValueError(f"it chooses tokens by {', '.join(self.sampling) or 'nothing'}, not {', '.join(SAMPLING)}")
        if "decode" not in self.schedules or self.schedules["decode"].tokens != 1:
            raise ValueError("it has no schedule decode for one token")
        for label, schedule in self._named():
            if schedule.tokens < 1 or schedule.rows < 1:
                raise ValueError(f"{label}: it runs for {schedule.tokens} tokens and {schedule.rows} rows")
            sizes = {"n": schedule.tokens, "r": schedule.rows, "c": self.capacity}
            table = {buffer.name: buffer for buffer in (*self.buffers, *schedule.scratch)}
            if len(table) != len(self.buffers) + len(schedule.scratch):
                raise ValueError(f"{label}: two buffers have one name")
            for buffer in schedule.scratch:
                _check_buffer(buffer, {"n": 1, "r": 1})
                end = -1 if buffer.offset is None else buffer.offset + buffer.nbytes(sizes)
                if buffer.offset is None or buffer.offset < 0 or buffer.offset % ALIGNMENT or end > self.arena:
                    raise ValueError(f"{label}: {buffer.name} does not lie in the arena")
            if not 0 <= schedule.head <= len(schedule.launches):
                raise ValueError(f"{label}: the head lies outside the launches")
            for launch in schedule.launches:
                self._check_launch(label, launch, table, sizes, sizes)
                # The smallest step, in the smallest caches: scratch is reserved for the largest all the same.
                self._check_launch(label, launch, table, {"n": 1, "r": 1, "c": BLOCK}, {**sizes, "c": BLOCK})
            for tap in schedule.taps:
                if tap.buffer not in table or not 0 <= tap.after < len(schedule.launches):
                    raise ValueError(f"{label}: the tap {tap.name} looks at nothing")

    def check_facts(self) -> None:
        """Raise ValueError where an executor would lack code, or a buffer that holds what it copies there."""
        facts, capacity = self.facts, self.capacity
        vocab, context = int(facts["vocab_size"]), int(facts["max_context"])
        if not 0 < context <= capacity or capacity % BLOCK:
            raise ValueError(f"its context is {context} tokens, and its caches hold {capacity}")
        for kernel in self.kernels:
            if missing := [level for level in self.levels if level not in kernel.images]:
                raise ValueError(f"{kernel.name} has no code for {', '.join(missing)}")
        frequencies = [float.fromhex(value) for value in facts["rope"]["inverse_frequencies"]]
        float.fromhex(facts["rope"]["magnitude"])
        if facts["sparse"] is not None:
            _ = [int(facts["sparse"][name]) for name in ("dense_len", "topk", "window_size", "block_size")]
        tokens = max(schedule.tokens for schedule in self.schedules.values())
        rows = max(schedule.rows for schedule in self.schedules.values())
        wanted = {
            "control": ("int32", (CONTROL_SIZE,)),
            "tokens": ("int32", (tokens,)),
            "rows": ("int32", (rows,)),
            "cos": ("float32", (capacity, len(frequencies))),
            "sin": ("float32", (capacity, len(frequencies))),
            "random": ("float32", (capacity,)),
            "logits": ("float32", (rows, vocab)),
            "token": ("int32", (1,)),
        }
        found = {buffer.name: buffer for kind in ("control", "input", "output") for buffer in self.of_kind(kind)}
        for name, (dtype, shape) in wanted.items():
            if name not in found or (found[name].dtype, found[name].extents({})) != (dtype, shape):
                raise ValueError(f"its buffer {name} is not {dtype}{list(shape)}")

    def _named(self) -> Iterator[tuple[str, Schedule]]:
        yield from self.schedules.items()
        for name, schedule in self.sampling.items():
            yield f"sampling {name}", schedule

    def _check_launch(
        self,
        label: str,
        launch: Launch,
        table: Mapping[str, Buffer],
        sizes: Mapping[str, int],
        reserved: Mapping[str, int],
    ) -> None:
        if not 0 <= launch.kernel < len(self.kernels):
            raise ValueError(f"{label}: a launch calls kernel {launch.kernel} of {len(self.kernels)}")
        kernel = self.kernels[launch.kernel]
        if len(launch.pointers) != len(kernel.pointed):
            raise ValueError(f"{label}: {kernel.name} takes {len(kernel.pointed)} pointers")
        for image in kernel.images.values():
            x, y, z = (evaluate(extent, sizes) for extent in image.grid)
            if not (0 < x <= MOST_BLOCKS[0] and 0 < y <= MOST_BLOCKS[1] and 0 < z <= MOST_BLOCKS[2]):
                raise ValueError(f"{label}: {kernel.name} starts a grid of {x} x {y} x {z} blocks")
            if not 0 < image.warps <= 32 or image.shared < 0:
                raise ValueError(f"{label}: {kernel.name} starts blocks that no GPU has")
        for argument in kernel.arguments:
            if argument.role == "scalar" and not 0 <= evaluate(argument.shape[0], sizes) < 1 << 31:
                raise ValueError(f"{label}: {kernel.name} takes {argument.name} beyond 31 bits")
        for argument, pointer in zip(kernel.pointed, launch.pointers, strict=True):
            buffer = table.get(pointer.buffer)
            if buffer is None:
                raise ValueError(f"{label}: {kernel.name} takes {pointer.buffer}, which there is not")
            if buffer.dtype != argument.dtype:
                raise ValueError(
                    f"{label}: {kernel.name} takes {argument.name} as {argument.dtype}, not {buffer.dtype}"
                )
            if pointer.offset < 0 or pointer.offset + argument.span(sizes) > buffer.nbytes(reserved):
                raise ValueError(f"{label}: {kernel.name} reaches beyond {pointer.buffer}")
            if pointer.offset % 16:
                raise ValueError(f"{label}: {kernel.name} takes {pointer.buffer} at an odd place")
            if argument.role != "in" and buffer.kind == "parameter":
                raise ValueError(f"{label}: {kernel.name} writes to {pointer.buffer}")

    def dump(self) -> str:
        """Return the plan as text for people: buffers, then one launch a line."""
        context = self.facts["max_context"]
        lines = [f"# for {', '.join(self.levels)}; arena of {self.arena:,} bytes; context {context:,}"]
        for kind in KINDS[:-1]:
            lines += [f"{kind} {_described(buffer)}" for buffer in self.of_kind(kind)]
        for name, schedule in self._named():
            lines += ["", f"schedule {name}: n <= {schedule.tokens}, r <= {schedule.rows}"]
            lines += [f"  scratch {_described(buffer)} @ {buffer.offset}" for buffer in schedule.scratch]
            taps = {tap.after: tap for tap in schedule.taps}
            for index, launch in enumerate(schedule.launches):
                if index == schedule.head and name in self.schedules:
                    lines.append("  head:")
                lines.append(f"  {index:3} {self._call(launch)}")
                if index in taps:
                    lines.append(f"      # {taps[index].name} = {taps[index].buffer}")
        return "\n".join(lines) + "\n"

    def _call(self, launch: Launch) -> str:
        kernel = self.kernels[launch.kernel]
        options = ", ".join(f"{key}={value}" for key, value in sorted(kernel.options.items()))
        arguments = ", ".join(
            f"{'' if argument.role == 'in' else argument.role + ' '}{argument.name}={pointer.buffer}"
            + (f"+{pointer.offset}" if pointer.offset else "")
            for argument, pointer in zip(kernel.pointed, launch.pointers, strict=True)
        )
        return f"{kernel.name}<{options}>({arguments})"


def _described(buffer: Buffer) -> str:
    return f"{buffer.name}: {buffer.dtype}[{', '.join(map(str, buffer.shape))}]"


def _check_buffer(buffer: Buffer, sizes: Mapping[str, int]) -> None:
    if buffer.dtype not in ITEM_BYTES or buffer.kind not in KINDS:
        raise ValueError(f"{buffer.name} is a {buffer.kind} of {buffer.dtype}")
    if any(extent < 0 for extent in buffer.extents(sizes)):
        raise ValueError(f"{buffer.name} has a negative extent")


def _plan(data: Mapping[str, Any]) -> Plan:
    def buffers(items: Sequence[Mapping[str, Any]]) -> tuple[Buffer, ...]:
        return tuple(Buffer(**{**item, "shape": tuple(item["shape"])}) for item in items)

    def image(item: Mapping[str, Any]) -> Image:
        x, y, z = item["grid"]
        return Image(**{**item, "grid": (x, y, z)})

    def kernel(item: Mapping[str, Any]) -> Kernel:
        images = {level: image(found) for level, found in item["images"].items()}
        arguments = tuple(Argument(**{**each, "shape": tuple(each["shape"])}) for each in item["arguments"])
        if any(argument.dtype not in ITEM_BYTES or argument.role not in ROLES for argument in arguments):
            raise ValueError(f"{item['name']} has an argument of unknown kind")
        return Kernel(item["name"], item["options"], arguments, images)

    def launch(item: Mapping[str, Any]) -> Launch:
        return Launch(item["kernel"], tuple(Pointer(**pointer) for pointer in item["pointers"]))

    def schedule(item: Mapping[str, Any]) -> Schedule:
        launches = tuple(launch(each) for each in item["launches"])
        taps = tuple(Tap(**tap) for tap in item["taps"])
        return Schedule(item["tokens"], item["rows"], buffers(item["scratch"]), launches, item["head"], taps)

    return Plan(
        levels=tuple(data["levels"]),
        buffers=buffers(data["buffers"]),
        kernels=tuple(kernel(item) for item in data["kernels"]),
        schedules={name: schedule(item) for name, item in data["schedules"].items()},
        sampling={name: schedule(item) for name, item in data["sampling"].items()},
        arena=data["arena"],
        facts=data["facts"],
    )
