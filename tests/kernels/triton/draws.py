"""One draw of a token as a decode step makes it: the launches of the sampling kernels, on tensors that persist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from arkinfer.exporters.kernels import triton as kernels
from arkinfer.exporters.kernels.triton import layout
from arkinfer.exporters.kernels.triton.sampling import STEPS


def bits(value: float) -> int:
    return int(torch.tensor([value], dtype=torch.float32).view(torch.int32)[0])


def start(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, number: float, position: int = 3
) -> dict[str, torch.Tensor]:
    """Return the tensors of a step that will draw from ``logits`` (vocab,) at ``position``."""
    control = torch.zeros(16, dtype=torch.int32)
    inverse = bits(1 / temperature) if temperature else 0
    control[0], control[3], control[4], control[5] = position, inverse, top_k, bits(top_p)
    return {
        "logits": logits[None].float(),
        "control": control,
        "state": torch.zeros(16, dtype=torch.int32),
        "random": torch.full((position + 1,), number),
        "tokens": torch.zeros(1, dtype=torch.int32),
        "token": torch.zeros(1, dtype=torch.int32),
    }


def launches(known: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield (kernel, options, arguments) of each launch, then run its reference."""
    vocab, context = known["logits"].shape[1], known["random"].shape[0]
    draw = {"vocab": vocab, "context": context}
    steps: list[tuple[str, dict[str, Any]]] = [("argmax_partial", {"vocab": vocab})]
    steps += [("sample_narrow", {**draw, "step": step}) for step in range(STEPS)]
    for name, options in [*steps, ("sample_mass", draw), ("sample", draw)]:
        kernel = kernels.kernel(name)
        parsed = kernel.parse(options)
        arguments: dict[str, Any] = {}
        for argument in kernel.arguments(parsed):
            if argument.role == "scalar":
                arguments[argument.name] = argument.shape[0]
                continue
            shape = tuple(1 if extent == "n" else int(extent) for extent in argument.shape)
            if argument.name not in known:
                known[argument.name] = torch.zeros(shape, dtype=layout.TORCH[argument.dtype])
            arguments[argument.name] = known[argument.name]
        yield name, options, arguments
        kernel.reference(parsed, arguments, 1, 1)
