"""How the inputs of a matrix product are cut into groups; nothing here loads torch, so kernels can share the rules."""

from __future__ import annotations


def activation_group(group: int, width: int) -> int:
    """Return how many inputs share one activation scale when activations are int8.

    The weight's own group if it holds 16..256 inputs; else the largest divisor of it that is a multiple of 16 and at
    most 128, so that one 32-bit accumulator never spans weight groups; else one scale for the whole row.
    """
    if 16 <= group <= 256:
        return group
    extent = group or width
    return max((size for size in range(16, 129, 16) if extent % size == 0), default=width)
