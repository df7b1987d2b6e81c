"""How each weight of a model is to be stored. Nothing here loads torch: `arkinfer plan` decides by the same code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import gcd
from typing import Any, Protocol

from arkinfer.checkpoint import Checkpoint, ternary
from arkinfer.checkpoint.stored import Layout
from arkinfer.errors import UserError, nearest

WEIGHTS = ("auto", "fp32", "fp16", "int8", "int4", "ternary")
HEADS = ("int8", "int4")
INT8_GROUP = 128
INT4_GROUP = 64
_DENSE = {"fp16": "F16", "fp32": "F32"}


class Stacked(Protocol):
    """Weights of a checkpoint, by name, stacked along their first axis; ``shape`` is that of the whole."""

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Storage:
    """How one weight is stored; the fields mean what those of Layout mean."""

    format: str
    group: int
    dtype: str  # safetensors' name
    zeros: bool = False
    order: str = ""


@dataclass(frozen=True)
class Rule:
    """Store the weights whose name matches ``pattern`` as ``weights``, in groups of ``group`` inputs (0: the default).

    Patterns are those of shells; "layers.0.*" and "model.layers.0.*" mean the same.
    """

    pattern: str
    weights: str
    group: int = 0

    def matches(self, source: str) -> bool:
        return any(fnmatchcase(name, self.pattern) for name in (source, source.removeprefix("model.")))


@dataclass(frozen=True)
class Recipe:
    """How weights are stored and activations computed.

    ``weights`` is one of WEIGHTS but never auto. ``activations`` is "int8" (quantised per token and group, see
    ops.linear) or "float" (exact). ``layouts`` says how the checkpoint holds each weight, ternary ones recognised.
    ``rules`` overrule ``weights``, the first that matches. ``head`` is the format of the embedding table and the output
    head in integer recipes; ``group`` the inputs that share an int4 scale.
    """

    weights: str
    activations: str
    layouts: Mapping[str, Layout]
    rules: tuple[Rule, ...] = ()
    head: str = "int8"
    group: int = INT4_GROUP

    def storage(self, weight: Stacked, table: bool = False) -> Storage:
        """Return how ``weight`` is stored; ``table``: it is the embedding table or the output head."""
        found = [self._one(source, table) for source in weight.sources]
        if all(item.format == "ternary" for item in found):
            width = weight.shape[1]
            extent = gcd(*(item.group or width for item in found))
            return replace(found[0], group=0 if extent == width else extent)
        return found[0]

    def joinable(self, weights: Sequence[Stacked]) -> bool:
        """Tell whether ``weights`` can be stored as one: in the same format, with the same order of columns."""
        found = {self._one(source, False) for weight in weights for source in weight.sources}
        if all(item.format == "ternary" for item in found):
            return len({item.dtype for item in found}) == 1
        return len(found) == 1

    def _one(self, source: str, table: bool) -> Storage:
        layout = self.layouts[source]
        width = layout.shape[-1]
        rule = next((rule for rule in self.rules if rule.matches(source)), None)
        wanted = rule.weights if rule else self.weights
        if wanted in _DENSE:
            exact = "F32" if layout.quantised else layout.dtype
            # A bfloat16 weight widens to float32 exactly, so storing it wider would only cost bytes.
            return Storage("dense", 0, exact if wanted == "fp32" else _DENSE[wanted])
        if layout.quantised:
            return Storage(layout.format, layout.group, layout.dtype, layout.zeros, layout.order)
        if table and not rule and wanted != "int8":
            wanted = self.head
        if wanted == "int4" and width % 2 == 0:
            group = (rule.group if rule else 0) or self.group
            return Storage("int4", group_size(width, group), "F16")
        return Storage("int8", group_size(width, INT8_GROUP), "F16")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, from which ``from_dict`` makes an equal recipe."""
        return {
            "layouts": {name: layout.to_dict() for name, layout in self.layouts.items()},
            "rules": [[rule.pattern, rule.weights, rule.group] for rule in self.rules],
            "head": self.head,
            "group": self.group,
        }

    @classmethod
    def from_dict(cls, weights: str, activations: str, values: Mapping[str, Any]) -> Recipe:
        return cls(
            weights,
            activations,
            {name: Layout.from_dict(layout) for name, layout in values["layouts"].items()},
            tuple(Rule(*rule) for rule in values["rules"]),
            values["head"],
            values["group"],
        )


def group_size(width: int, wanted: int) -> int:
    """Return the largest group <= ``wanted`` that divides ``width`` and is a multiple of 16, or 0 (the row)."""
    sizes = [size for size in range(16, wanted + 1, 16) if width % size == 0]
    return max(sizes, default=0)


def choose(
    weights: str,
    default: str,
    body: Sequence[str],
    used: Iterable[str],
    checkpoint: Checkpoint,
    activations: str = "auto",
    rules: Sequence[Rule] = (),
    head: str = "int8",
    group: int = INT4_GROUP,
) -> Recipe:
    """Resolve the user's ``weights`` against what the checkpoint holds.

    ``body`` names the matrices between the embedding table and the output head, ``used`` all weights of the model.
    ``auto`` keeps quantised and ternary weights as they are, tensor by tensor, and takes ``default`` for the others.
    Raises UserError for unknown names, for ``ternary`` on weights that were not trained ternary, and for an integer
    format on weights that are already quantised to another one.
    """
    if weights not in WEIGHTS:
        raise UserError(f"unknown weights {weights!r}", hint=nearest(weights, WEIGHTS), code="ARK-E130")
    if activations not in ("auto", "int8", "float"):
        raise UserError(f"activations are auto, int8 or float, not {activations!r}", code="ARK-E131")
    layouts = checkpoint.layouts()
    quantised = {layouts[source].format for source in body if layouts[source].quantised}
    if weights in ("auto", "ternary"):
        for source in body:
            if not layouts[source].quantised and (group_found := ternary.detect(checkpoint.weight(source))) is not None:
                layouts[source] = replace(layouts[source], format="ternary", group=group_found, scheme="ternary")
        found = [source for source in body if layouts[source].format == "ternary"]
        if weights == "ternary" and not found:
            raise UserError(
                "these weights are not ternary, and rounding them to three values would destroy the model",
                facts={"ternary": f"none of {len(body)} matrices"},
                hint="--weights int4",
                code="ARK-E132",
            )
        weights = "ternary" if found else sorted(quantised)[0] if quantised else default
    elif weights not in _DENSE and quantised - {weights}:
        raise UserError(
            f"the checkpoint is quantised already, and rounding its integers again to {weights} would lose more",
            facts={"stored as": ", ".join(sorted(quantised))},
            hint="--weights auto keeps its integers; --weights fp16 multiplies them out",
            code="ARK-E129",
        )
    integer = weights not in _DENSE
    if activations == "int8" and not integer:
        raise UserError(f"int8 activations need integer weights, not {weights}", hint="--weights int8", code="ARK-E131")
    return Recipe(
        weights,
        ("int8" if integer else "float") if activations == "auto" else activations,
        {name: layouts[name] for name in sorted(set(used))},
        tuple(rules),
        head,
        group,
    )
