"""From logits to the next token on the device: the largest, or a draw with temperature, top-k and top-p.

How to draw is read from control at run time, so that one captured graph serves every request: [3] the bits of float32
1 / temperature (0: greedy), [4] top_k (0: all), [5] the bits of float32 top_p. The random number of a position comes
from a table that the host fills; the token is -1 where a logit is not a number or none is finite. A draw is that of
runtime/sampling.py given the same number: weights exp((logit - largest) / temperature), of them the top_k largest with
those that equal the last, of these the fewest that reach top_p of the sum (lower ids first among equals), and from
those in the order of ids. It differs only where sums in float32 instead of float64 decide.

Both bounds are found digit by digit over the *rank* of a logit: 30 bits that order like the logits, taken from the bits
of its scaled distance to the largest (not negative, so they order like integers; beyond 128 a weight is 0). Each of
``STEPS`` launches of `sample_narrow` counts, in every part, what reaches each of 32 bounds, and the next launch reads
the sums. The first half of the steps counts tokens, the second adds up weights.
"""

from __future__ import annotations

import math
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


def _finish(arguments: Mapping[str, torch.Tensor], chosen: int) -> None:
    chosen = chosen if math.isfinite(float(arguments["values"].max())) else -1
    arguments["token"][0] = chosen
    arguments["tokens"][0] = max(0, chosen)
    arguments["control"][0] += 1


def _reference(options: Vocabulary, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    _finish(arguments, int(arguments["ids"][_first(arguments["values"])]))


ARGMAX_PARTIAL = Kernel("sampling:argmax_partial", Vocabulary, _partial_arguments, _partial_variant, _partial_reference)
# The last kernel of a decode step: it writes the token where the next step reads it and moves the position on.
ARGMAX = Kernel("sampling:argmax", Vocabulary, _arguments, _variant, _reference)


DIGITS, STEPS = 32, 12
_HALF = STEPS // 2
_KEPT, _TOTAL, _BOUND = 12, 13, 14  # places in `state` after the bounds of the steps
_FARTHEST, _NEAREST = 0x43000000, 0x03000001  # the bits of 128 and of just above 2^-121: ranks have 30 bits


@dataclass(frozen=True)
class Draw:
    """``vocab`` logits of one row; ``context`` positions have random numbers; ``step`` of sample_narrow."""

    vocab: int
    context: int = 1
    step: int = 0

    @property
    def parts(self) -> int:
        return ceil_div(self.vocab, PART)


def _narrow_arguments(options: Draw) -> tuple[Argument, ...]:
    return (
        Argument("logits", "float32", (1, options.vocab)),
        Argument("values", "float32", (options.parts,)),
        Argument("control", "int32", (16,)),
        Argument("state", "int32", (16,), "inout"),
        Argument("partial", "float32", (2, options.parts, DIGITS), "inout"),
        Argument("step", "int32", (options.step,), "scalar"),
    )


def _mass_arguments(options: Draw) -> tuple[Argument, ...]:
    return (
        Argument("logits", "float32", (1, options.vocab)),
        Argument("values", "float32", (options.parts,)),
        Argument("control", "int32", (16,)),
        Argument("state", "int32", (16,), "inout"),
        Argument("partial", "float32", (2, options.parts, DIGITS)),
        Argument("above", "float32", (options.parts,), "out"),
        Argument("equal", "float32", (options.parts,), "out"),
    )


def _sample_arguments(options: Draw) -> tuple[Argument, ...]:
    return (
        Argument("logits", "float32", (1, options.vocab)),
        Argument("values", "float32", (options.parts,)),
        Argument("ids", "int32", (options.parts,)),
        Argument("state", "int32", (16,)),
        Argument("above", "float32", (options.parts,)),
        Argument("equal", "float32", (options.parts,)),
        Argument("random", "float32", (options.context,)),
        Argument("control", "int32", (16,), "inout"),
        Argument("tokens", "int32", ("n",), "inout"),
        Argument("token", "int32", (1,), "out"),
    )


def _draw_variant(options: Draw, arch: str) -> Variant:
    constants: dict[str, int | float | bool | str] = {
        "VOCAB": options.vocab,
        "PARTS": options.parts,
        "PARTS_TILE": power_of_two(options.parts),
        "BLOCK": PART,
    }
    return Variant(constants, (str(options.parts), "1", "1"), 8, 1)


def _sample_variant(options: Draw, arch: str) -> Variant:
    return Variant(_draw_variant(options, arch).constants, ("1", "1", "1"), 8, 1)


def _float(bits: torch.Tensor) -> torch.Tensor:
    return bits.view(torch.float32)


def _weights(arguments: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights (vocab,) float32 of all tokens and their ranks (vocab,) int32."""
    inverse = _float(arguments["control"][3:4])
    distance = (arguments["values"].max() - arguments["logits"][0]) * inverse
    ranks = _FARTHEST - distance.clamp(max=128.0).view(torch.int32).clamp(min=_NEAREST)
    return torch.exp(-distance), ranks


def _shift(step: int) -> int:
    return 5 * (_HALF - 1 - step % _HALF)


def _advanced(options: Draw, arguments: Mapping[str, torch.Tensor], step: int) -> int:
    """Return the bound with which ``step`` starts, from what the step before it found, and note it in the state."""
    if step == 0:
        return 0
    before = step - 1
    control, state = arguments["control"], arguments["state"]
    sums = arguments["partial"][before % 2].sum(dim=0)
    if before == _HALF:
        state[_TOTAL] = sums[:1].to(torch.float32).view(torch.int32)[0]
    if before >= _HALF:
        limit = float(_float(control[5:6]) * _float(state[_TOTAL : _TOTAL + 1]))
    else:
        limit = float(control[4]) or options.vocab
    bound = (int(state[before]) if before else 0) + (int((sums[1:] >= limit).sum()) << _shift(before))
    if step == _HALF:
        state[_KEPT] = bound
        return 0
    return bound


def _narrow_reference(options: Draw, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    if not int(arguments["control"][3]):
        return
    step = options.step
    bound = _advanced(options, arguments, step)
    arguments["state"][step] = bound
    weights, ranks = _weights(arguments)
    amount = torch.ones_like(weights)
    if step >= _HALF:
        amount = torch.where(ranks >= arguments["state"][_KEPT], weights, 0.0)
    for part in range(options.parts):
        span = slice(part * PART, (part + 1) * PART)
        for digit in range(DIGITS):
            reached = ranks[span] >= bound + (digit << _shift(step))
            arguments["partial"][step % 2, part, digit] = amount[span][reached].sum()


def _mass_reference(options: Draw, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    if not int(arguments["control"][3]):
        return
    state = arguments["state"]
    bound = _advanced(options, arguments, STEPS)
    if float(_float(arguments["control"][5:6])) >= 1:
        bound = -1
    state[_BOUND] = bound
    weights, ranks = _weights(arguments)
    kept = ranks >= state[_KEPT]
    for part in range(options.parts):
        span = slice(part * PART, (part + 1) * PART)
        arguments["above"][part] = weights[span][kept[span] & (ranks[span] > bound)].sum()
        arguments["equal"][part] = (kept[span] & (ranks[span] == bound)).sum()


def _sample_reference(options: Draw, arguments: Mapping[str, torch.Tensor], n: int, r: int) -> None:
    control, state = arguments["control"], arguments["state"]
    sound = math.isfinite(float(arguments["values"].max()))
    if sound and int(control[3]) and int(control[4]) != 1:
        weights, ranks = _weights(arguments)
        kept, bound = ranks >= state[_KEPT], int(state[_BOUND])
        taken = kept & (ranks > bound)
        equals = (kept & (ranks == bound)).nonzero().flatten()
        if len(equals):
            weight = float(weights[equals[0]])
            wanted = float(_float(control[5:6]) * _float(state[_TOTAL : _TOTAL + 1]))
            missing = wanted - float(arguments["above"].sum())
            room = max(1, math.ceil(missing / weight)) if weight else len(equals)
            taken[equals[:room]] = True
        sums = torch.where(taken, weights, 0.0).double().cumsum(dim=0)
        number = float(arguments["random"][int(control[0])])
        chosen = int((sums <= number * float(sums[-1])).sum())
        chosen = min(chosen, int((taken & (weights > 0)).nonzero()[-1]))
    else:
        chosen = int(arguments["ids"][_first(arguments["values"])])
    _finish(arguments, chosen)


SAMPLE_NARROW = Kernel("sampling:sample_narrow", Draw, _narrow_arguments, _draw_variant, _narrow_reference)
SAMPLE_MASS = Kernel("sampling:sample_mass", Draw, _mass_arguments, _draw_variant, _mass_reference)
# In place of argmax at the end of a step that samples.
SAMPLE = Kernel("sampling:sample", Draw, _sample_arguments, _sample_variant, _sample_reference)
