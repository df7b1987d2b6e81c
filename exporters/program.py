"""A compiled step as data: ordered kernel calls over named values. No compiler is needed to make, read or check one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Extent = int | str  # "n" tokens, "r" rows, or a constant
Argument = str | int  # the name of a value or scalar, or a constant


@dataclass(frozen=True)
class Value:
    """A tensor: its name, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class Call:
    """One kernel launch. ``inputs`` come first in the kernel's signature; ``mutates`` names inputs written in place."""

    kernel: str
    options: Mapping[str, Any]
    inputs: tuple[Argument, ...]
    outputs: tuple[Value, ...] = ()
    mutates: tuple[str, ...] = ()


@dataclass
class Program:
    """The calls of one step and what goes in and out of it."""

    inputs: list[Value] = field(default_factory=list)
    scalars: list[str] = field(default_factory=list)  # int64 values, passed as one shape
    caches: list[Value] = field(default_factory=list)  # mutated
    parameters: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    result: str = ""
    taps: list[tuple[str, str]] = field(default_factory=list)  # (public name, value name)

    def kernels(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Return the distinct kernels, in order of first use."""
        seen: dict[str, tuple[str, Mapping[str, Any]]] = {}
        for call in self.calls:
            seen.setdefault(json.dumps([call.kernel, call.options], sort_keys=True), (call.kernel, call.options))
        return list(seen.values())

    def to_json(self) -> str:
        """Return the program as canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Program:
        data = json.loads(text)

        def value(item: Mapping[str, Any]) -> Value:
            return Value(item["name"], item["dtype"], tuple(item["shape"]))

        return Program(
            inputs=[value(item) for item in data["inputs"]],
            scalars=data["scalars"],
            caches=[value(item) for item in data["caches"]],
            parameters=[value(item) for item in data["parameters"]],
            calls=[
                Call(
                    item["kernel"],
                    item["options"],
                    tuple(item["inputs"]),
                    tuple(value(output) for output in item["outputs"]),
                    tuple(item["mutates"]),
                )
                for item in data["calls"]
            ],
            result=data["result"],
            taps=[(name, inner) for name, inner in data["taps"]],
        )

    def dump(self) -> str:
        """Return the program as text, one call a line."""
        lines = []
        for call in self.calls:
            options = ", ".join(f"{key}={option}" for key, option in sorted(call.options.items()))
            outputs = ", ".join(f"{output.name}: {output.dtype}{list(output.shape)}" for output in call.outputs)
            lines.append(
                f"{outputs or ', '.join(call.mutates)} = {call.kernel}<{options}>({', '.join(map(str, call.inputs))})"
            )
        return "\n".join(lines) + "\n"
