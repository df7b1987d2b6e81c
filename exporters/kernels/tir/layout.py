"""How weights and quantised activations lie in memory on CPUs: panels of 16 rows, in chunks of 64 bytes.

The same for every instruction set and for one token as for many, so one copy of the weights serves all kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from arkinfer.errors import UserError
from arkinfer.quant.groups import activation_group

PANEL = 16  # rows (outputs) of the weight that are interleaved
CHUNK = 64  # bytes: four for each row of a panel


@dataclass(frozen=True)
class CodeFormat:
    """An integer weight format: ``planes`` codes share a byte, each of ``bits`` bits, largest value ``limit``.

    Byte r * 4 + j of chunk i holds, for row r of the panel, the codes of k = planes * 4 * i + 4 * p + j in plane p.
    ``zero`` is the code that stands for 0 where the weight has no zero points of its own.
    """

    planes: int
    bits: int
    limit: int
    zero: int

    @property
    def inputs(self) -> int:
        """Inputs (values of k) that one chunk covers."""
        return 4 * self.planes


FORMATS: Mapping[str, CodeFormat] = {
    "int8": CodeFormat(planes=1, bits=8, limit=255, zero=128),
    "int4": CodeFormat(planes=2, bits=4, limit=15, zero=8),
    "int2": CodeFormat(planes=4, bits=2, limit=3, zero=2),
    "ternary": CodeFormat(planes=4, bits=2, limit=2, zero=1),
}


def code_format(name: str) -> CodeFormat:
    """Return the integer format called ``name``."""
    if name not in FORMATS:
        raise UserError(f"no integer weight format {name!r}", hint=", ".join(FORMATS), code="ARK-E150")
    return FORMATS[name]


@dataclass(frozen=True)
class Grouping:
    """How the inputs of a row are cut.

    A weight group shares a weight scale, an activation group (``activation`` inputs) an activation scale; a *segment*
    (``segment`` inputs) is the smaller of the two: one exact integer sum. Segments are stored with zeros up to
    ``padded`` inputs, a whole number of chunks. ``per_weight`` segments make a weight group (0: the whole row does),
    ``per_activation`` an activation group.
    """

    activation: int
    segment: int
    padded: int
    per_weight: int
    per_activation: int

    def segments(self, width: int) -> int:
        """Return the number of segments of a row of ``width`` inputs."""
        return width // self.segment

    def padded_width(self, width: int) -> int:
        """Return the stored length of a row."""
        return self.segments(width) * self.padded


def grouping(format: str, group: int, width: int) -> Grouping:
    """Return how rows of ``width`` inputs are cut for a weight with ``group`` inputs a scale (0: the row)."""
    inputs = code_format(format).inputs
    extent = group or width
    if width % extent:
        raise UserError(f"groups of {group} do not divide {width} inputs", code="ARK-E151")
    activation = activation_group(group, width)
    segment = min(activation, extent)
    return Grouping(
        activation=activation,
        segment=segment,
        padded=-(-segment // inputs) * inputs,
        per_weight=extent // segment if group else 0,
        per_activation=activation // segment,
    )


def activation_cut(format: str, group: int, width: int) -> Grouping:
    """Return ``grouping`` without what only the weight knows: equal for weights that read the same rounded inputs."""
    return replace(grouping(format, group, width), per_weight=0)


def panels(rows: int) -> int:
    """Return the number of panels of a weight with ``rows`` outputs."""
    return -(-rows // PANEL)
