"""Places for temporary values in one piece of memory: values that are never alive together may share bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lifetime:
    """A value of ``nbytes`` that is alive from launch ``first`` to launch ``last``, both included."""

    nbytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        return self.first <= other.last and other.first <= self.last


def place(values: Sequence[Lifetime], alignment: int) -> tuple[list[int], int]:
    """Return an offset for each of ``values`` and the size of the arena, all multiples of ``alignment``.

    The largest value is placed first, each at the lowest offset where it meets none of those that live when it does
    (greedy by size: Pisarchyk and Lee, arXiv 2001.03288, section 5.2).
    """

    def aligned(nbytes: int) -> int:
        return -(-nbytes // alignment) * alignment

    offsets = [0] * len(values)
    placed: list[int] = []
    end = 0
    for index in sorted(range(len(values)), key=lambda index: (-values[index].nbytes, values[index].first, index)):
        value = values[index]
        taken = sorted(
            (offsets[other], offsets[other] + aligned(values[other].nbytes))
            for other in placed
            if values[other].meets(value)
        )
        offset = 0
        for start, stop in taken:
            if offset + aligned(value.nbytes) <= start:
                break
            offset = max(offset, stop)
        offsets[index] = offset
        placed.append(index)
        end = max(end, offset + aligned(value.nbytes))
    return offsets, end
