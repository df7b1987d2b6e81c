"""Targets that ship for one GPU through different backends, compared by what decides how fast they decode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from arkinfer import targets
from arkinfer.amounts import size
from arkinfer.targets import Target

CLOSE = 1.05  # a difference in bytes that decides nothing
Look = Callable[[Target], tuple[int, Sequence[str]]]


def sentences(target: Target, look: Look, formats: Iterable[str]) -> list[str]:
    """Return a sentence for each other backend that ships for the GPU of ``target``; none for processors.

    ``look`` returns the bytes of weights that a token reads on a target, and why that cannot run the model, if so;
    ``formats`` are those of the weights.
    """
    if not target.arch[0].startswith("sm_"):
        return []
    here, _ = look(target)
    found: dict[str, str] = {}
    for other in map(targets.load, targets.names()):
        if other.backend in (target.backend, *found) or other.arch != target.arch:
            continue
        there, obstacles = look(other)
        found[other.backend] = _preferred(here, other.name, there, formats)
        if obstacles:
            found[other.backend] += f"; it cannot run this model yet: {obstacles[0]}"
    return list(found.values())


def _preferred(here: int, other: str, there: int, formats: Iterable[str]) -> str:
    """Say which is expected to decode faster, and why: the one that reads less for a token."""
    if max(here, there) < CLOSE * min(here, there):
        return f"--target {other} runs on the same GPU and reads as much a token; which is faster was not measured"
    winner, than = (f"--target {other}", "") if there < here else ("this target", f" than --target {other}")
    reason = ", since TensorRT has no 2-bit weights and holds them in 4" if {"ternary", "int2"} & set(formats) else ""
    return (
        f"{winner} is expected to decode faster{than}: a token reads {size(there)} of weights there, "
        f"{size(here)} here{reason}"
    )
