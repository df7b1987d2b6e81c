"""From logits to the next token on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from arkinfer.exporters.kernels.triton.kernel import Argument, Kernel, Variant, ceil_div, power_of_two

PART = 4096  # logits that one block looks through


@dataclass(frozen=True)
class Vocabulary:
    """``vocab`` logits of one row."""

    vocab: int

    @property
    def parts(self) -> int:
        return ceil_div(self.vocab, PART)


def _partial_arguments(options: Vocabulary) -> tuple[Argument, ...]:
    return (
        Argument("logits", "float32", (1, options.vocab)),
        Argument("values", "float32", (options.parts,), "out"),
        Argument("ids", "int32", (options.parts,), "out"),
    )


def _partial_variant(options: Vocabulary, arch: str) -> Variant:
    return Variant({"VOCAB": options.vocab, "BLOCK": PART}, (str(options.parts), "1", "1"), 8, 1)


def _partial_reference(options: Vocabulary, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    for part in range(options.parts):
        logits = arguments["logits"][0, part * PART : (part + 1) * PART]
        arguments["values"][part] = logits.max()
        arguments["ids"][part] = part * PART + _first(logits)


def _first(values: torch.Tensor) -> int:
    """Return the lowest place of the largest value; torch.argmax promises no order among equals."""
    return int((values == values.max()).int().argmax())


def _arguments(options: Vocabulary) -> tuple[Argument, ...]:
    return (
        Argument("values", "float32", (options.parts,)),
        Argument("ids", "int32", (options.parts,)),
        Argument("control", "int32", (16,), "inout"),
        Argument("tokens", "int32", ("n",), "inout"),
        Argument("token", "int32", (1,), "out"),
    )


def _variant(options: Vocabulary, arch: str) -> Variant:
    return Variant({"PARTS": options.parts, "BLOCK": power_of_two(options.parts)}, ("1", "1", "1"), 1, 1)


def _reference(options: Vocabulary, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    chosen = arguments["ids"][_first(arguments["values"])]
    arguments["token"][0] = chosen
    arguments["tokens"][0] = chosen
    arguments["control"][0] += 1


ARGMAX_PARTIAL = Kernel("sampling:argmax_partial", Vocabulary, _partial_arguments, _partial_variant, _partial_reference)
# The last kernel of a decode step: it writes the token where the next step reads it and moves the position on.
ARGMAX = Kernel("sampling:argmax", Vocabulary, _arguments, _variant, _reference)
