"""The control buffer of a GPU plan: what changes from step to step and lies in the device's memory."""

from __future__ import annotations

import numpy as np

from arkinfer.artifact.plan import CONTROL, CONTROL_SIZE
from arkinfer.backends.base import Draw
from arkinfer.errors import InternalError, UserError


def values(position: int, dense_len: int, tokens: int, draw: Draw | None = None) -> np.ndarray:
    """Return control (16,) int32 for a step of ``tokens`` from ``position`` on, and for the ``draw`` after it."""
    fields = {"position": position, "dense_len": dense_len, "tokens": tokens}
    if draw is not None and not draw.greedy:
        inverse, top_p = np.array([1 / draw.temperature, draw.top_p], np.float32).view(np.int32).tolist()
        fields |= {"inverse_temperature": inverse, "top_k": min(draw.top_k, 2**31 - 1), "top_p": top_p}
    control = np.zeros(CONTROL_SIZE, np.int32)
    for name, value in fields.items():
        control[CONTROL.index(name)] = value
    return control


def numbers(draw: Draw, length: int, size: int) -> tuple[int, np.ndarray]:
    """Return from where on the table of random numbers, (size,) float32, holds those of ``draw``, and these.

    The number that decides on the token at position p lies at p - 1, the position of the row that it follows. Raises
    UserError if there is none for the token at position ``length``.
    """
    if not 0 <= length - draw.first < len(draw.numbers) or draw.first < 1:
        raise UserError(
            "there is no random number for the next token",
            facts={"position": length, "numbers": f"{len(draw.numbers)} from position {draw.first} on"},
            code="ARK-E221",
        )
    return draw.first - 1, np.ascontiguousarray(draw.numbers[: size - draw.first + 1], np.float32)


def chosen(token: int, vocab_size: int) -> int:
    """Return what a device chose. Raises InternalError for -1, which stands for logits without a largest number."""
    if not 0 <= token < vocab_size:
        raise InternalError("the model returned logits that are not numbers", facts={"chosen": token}, code="ARK-E710")
    return token
