"""How each weight of a model is to be stored. Nothing here loads torch: `arkinfer plan` decides by the same code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import gcd
from typing import Any, Protocol

from arkinfer.checkpoint import Checkpoint, ternary
from arkinfer.checkpoint.stored import Layout
from arkinfer.errors import UserError, nearest
from arkinfer.targets import TargetDefaults

WEIGHTS = ("auto", "fp32", "fp16", "int8", "int4", "ternary")
RULES = ("fp32", "fp16", "int8", "int4")
HEADS = ("int8", "int4")
GROUPS = (32, 64, 128)
METHODS = ("search", "pgptq")
INT8_GROUP = 128
INT4_GROUP = 64
RELEASED_GROUP = 128  # of ternary weights that are not here to be looked at
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

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read ``PATTERN=FORMAT[:GROUP]``. Raises UserError for anything else."""
        pattern, _, form = text.rpartition("=")
        weights, colon, group = form.partition(":")
        sound = not colon or (group in map(str, GROUPS) and weights in HEADS)
        if not pattern or weights not in RULES or not sound:
            raise UserError(
                f"{text!r} is not a rule of the form PATTERN=FORMAT[:GROUP]",
                facts={"formats": ", ".join(RULES), "groups of int8 and int4": ", ".join(map(str, GROUPS))},
                hint="--rule 'layers.0.*=int8' --rule '*.down_proj.*=int4:32'",
                code="ARK-E136",
            )
        return cls(pattern, weights, int(group or 0))

    def __str__(self) -> str:
        return f"{self.pattern}={self.weights}" + (f":{self.group}" if self.group else "")

    def matches(self, source: str) -> bool:
        return any(fnmatchcase(name, self.pattern) for name in (source, source.removeprefix("model.")))


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded that the checkpoint holds as floats.

    ``group``: the inputs that share an int4 scale. ``head``: the format of the embedding table and the output head in
    integer recipes. ``method``: "search" for the scale that loses least, weight by weight, or "pgptq" (quant.pgptq).
    ``rules`` overrule all of it, the first that matches. ``stated`` are the fields that the user gave: they must have
    an effect, while what a target says may have none on some models.
    """

    group: int = INT4_GROUP
    head: str = "int8"
    method: str = "search"
    rules: tuple[Rule, ...] = ()
    stated: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        defaults: TargetDefaults,
        group: int | None = None,
        head: str | None = None,
        method: str | None = None,
        rules: Sequence[str | Rule] = (),
    ) -> Rounding:
        """Return what the user asks for, and the target's ``defaults`` where he asks for nothing.

        Rules replace those of the target. Raises UserError for unknown words.
        """
        given = {"group": group, "head": head, "method": method}
        known: Mapping[str, Sequence[object]] = {"group": GROUPS, "head": HEADS, "method": METHODS}
        for name, value in given.items():
            if value is not None and value not in known[name]:
                raise UserError(
                    f"unknown {name} {value!r}", hint=nearest(str(value), list(map(str, known[name]))), code="ARK-E137"
                )
        return cls(
            group or defaults.group,
            head or defaults.head,
            method or defaults.method,
            tuple(rule if isinstance(rule, Rule) else Rule.parse(rule) for rule in rules or defaults.rules),
            frozenset(name for name, value in given.items() if value is not None),
        )


@dataclass(frozen=True)
class Recipe:
    """How weights are stored and activations computed.

    ``weights`` is one of WEIGHTS but never auto. ``activations`` is "int8" (quantised per token and group, see
    ops.linear) or "float" (exact). ``layouts`` says how the checkpoint holds each weight, ternary ones recognised.
    ``rules``, ``head``, ``group`` and ``method`` are those of Rounding. ``rest`` is what becomes of the matrices that a
    quantised or ternary checkpoint left as floats.
    """

    weights: str
    activations: str
    layouts: Mapping[str, Layout]
    rules: tuple[Rule, ...] = ()
    head: str = "int8"
    group: int = INT4_GROUP
    method: str = "search"
    rest: str = ""

    def storage(self, weight: Stacked, table: bool = False) -> Storage:
        """Return how ``weight`` is stored; ``table``: it is the embedding table or the output head."""
        found = [self.stored(source, table) for source in weight.sources]
        if all(item.format == "ternary" for item in found):
            width = weight.shape[1]
            extent = gcd(*(item.group or width for item in found))
            return replace(found[0], group=0 if extent == width else extent)
        return found[0]

    def joinable(self, weights: Sequence[Stacked]) -> bool:
        """Tell whether ``weights`` can be stored as one: in the same format, with the same order of columns."""
        found = {self.stored(source) for weight in weights for source in weight.sources}
        if all(item.format == "ternary" for item in found):
            return len({item.dtype for item in found}) == 1
        return len(found) == 1

    def stored(self, source: str, table: bool = False) -> Storage:
        """Return how one weight of the checkpoint is stored."""
        layout = self.layouts[source]
        width = layout.shape[-1]
        rule = first_match(self.rules, source)
        wanted = rule.weights if rule else self.head if table and self.weights not in _DENSE else self.weights
        if not (rule or table or layout.quantised or self.weights in _DENSE):
            wanted = self.rest or wanted
        if wanted in _DENSE:
            # A bfloat16 weight widens to float32 exactly, so storing it wider would only cost bytes.
            exact = layout.dtype if layout.dtype in ("F16", "BF16") and not layout.quantised else "F32"
            return Storage("dense", 0, exact if wanted == "fp32" else _DENSE[wanted])
        if layout.quantised:
            return Storage(layout.format, layout.group, layout.dtype, layout.zeros, layout.order)
        group = rule.group if rule else 0
        if wanted == "int4" and width % 2 == 0:
            return Storage("int4", group_size(width, group or self.group), "F16")
        return Storage("int8", group_size(width, group or INT8_GROUP), "F16")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, from which ``from_dict`` makes an equal recipe."""
        return {
            "layouts": {name: layout.to_dict() for name, layout in self.layouts.items()},
            "rules": [[rule.pattern, rule.weights, rule.group] for rule in self.rules],
            "head": self.head,
            "group": self.group,
            "method": self.method,
            "rest": self.rest,
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
            values["method"],
            values["rest"],
        )


def first_match(rules: Sequence[Rule], source: str) -> Rule | None:
    """Return the rule that decides about the weight ``source``, or None."""
    return next((rule for rule in rules if rule.matches(source)), None)


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
    rounding: Rounding = Rounding(),
) -> Recipe:
    """Resolve the user's ``weights`` against what the checkpoint holds.

    ``body`` names the matrices between the embedding table and the output head, ``used`` all weights of the model.
    ``auto`` keeps quantised and ternary weights as they are, tensor by tensor, and takes ``default`` for the others.
    Raises UserError for unknown names, for ``ternary`` on weights that were not trained ternary, for an integer
    format on weights that are already quantised to another one, and for rules and wishes that change nothing.
    """
    if weights not in WEIGHTS:
        raise UserError(f"unknown weights {weights!r}", hint=nearest(weights, WEIGHTS), code="ARK-E130")
    if activations not in ("auto", "int8", "float"):
        raise UserError(f"activations are auto, int8 or float, not {activations!r}", code="ARK-E131")
    stored = checkpoint.layouts()
    layouts = {name: stored[name] for name in sorted(set(used))}
    tables = [name for name, layout in layouts.items() if len(layout.shape) == 2 and name not in set(body)]
    _require_matches(rounding.rules, [*body, *tables])
    rest = ""
    free = [source for source in body if first_match(rounding.rules, source) is None]
    quantised = {layouts[source].format for source in free if layouts[source].quantised}
    if weights in ("auto", "ternary"):
        for source in free:
            if layouts[source].quantised:
                continue
            if checkpoint.headers_only:  # nothing to look at: plan takes the user's word
                group_found = RELEASED_GROUP if weights == "ternary" else None
            else:
                group_found = ternary.detect(checkpoint.weight(source))
            if group_found is not None:
                layouts[source] = replace(layouts[source], format="ternary", group=group_found, scheme="ternary")
        found = [source for source in free if layouts[source].format == "ternary"]
        if weights == "ternary" and not found:
            raise UserError(
                "these weights are not ternary, and rounding them to three values would destroy the model",
                facts={"ternary": f"none of {len(free)} matrices"},
                hint="--weights int4",
                code="ARK-E132",
            )
        weights = "ternary" if found else sorted(quantised)[0] if quantised else default
        rest = default if found or quantised else ""
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
    recipe = Recipe(
        weights,
        ("int8" if integer else "float") if activations == "auto" else activations,
        layouts,
        rounding.rules,
        rounding.head,
        rounding.group,
        rounding.method,
        rest,
    )
    _refuse_rounding_again(recipe, [*body, *tables])
    return _effective(recipe, body, tables, rounding.stated)


def _require_matches(rules: Sequence[Rule], names: Sequence[str]) -> None:
    """Raise UserError for a rule that matches none of the matrices ``names``."""
    for rule in rules:
        if not any(rule.matches(name) for name in names):
            plain = {name.removeprefix("model."): name for name in names}
            close = difflib.get_close_matches(rule.pattern.replace("*", ""), plain, n=3, cutoff=0)
            raise UserError(
                f"the rule {str(rule)!r} matches no weight",
                facts={"nearest": ", ".join(close)},
                hint="patterns are those of shells: '*.down_proj.*', 'layers.[0-3].*'; norms and biases stay floats",
                code="ARK-E138",
            )


def _refuse_rounding_again(recipe: Recipe, names: Sequence[str]) -> None:
    """Raise UserError where a rule asks for other integers than those that the checkpoint holds."""
    for name in names:
        rule, layout = first_match(recipe.rules, name), recipe.layouts[name]
        if rule is None or rule.weights in _DENSE or not layout.quantised:
            continue
        if rule.weights != layout.format or rule.group not in (0, layout.group):
            raise UserError(
                f"the rule {str(rule)!r} would round integers again, which would lose more",
                facts={"weight": name, "stored as": f"{layout.format} in groups of {layout.group or 'a row'}"},
                hint="leave the weight out of the rule, or multiply it out: PATTERN=fp16",
                code="ARK-E129",
            )


def _effective(recipe: Recipe, body: Sequence[str], tables: Sequence[str], stated: frozenset[str]) -> Recipe:
    """Return ``recipe``, its method "search" where P-GPTQ has nothing to round.

    Raises UserError if one of the wishes that the user ``stated`` changes nothing.
    """
    rounded = {}
    for name in (*body, *tables):
        storage = recipe.stored(name, name in tables)
        if not recipe.layouts[name].quantised and storage.format in HEADS:
            rounded[name] = storage.format, first_match(recipe.rules, name)
    effects = {
        "method": any(name in rounded for name in body),
        "head": any(name in rounded and rounded[name][1] is None for name in tables),
        "group": any(form == "int4" and not (rule and rule.group) for form, rule in rounded.values()),
    }
    for name in sorted(stated):
        if not effects[name]:
            value = getattr(recipe, name)
            raise UserError(
                f"--{name} {value} changes nothing: {_WITHOUT_EFFECT[name]}",
                facts={"weights": recipe.weights},
                hint="--weights int4, or leave it out",
                code="ARK-E139",
            )
    return recipe if effects["method"] else replace(recipe, method="search")


_WITHOUT_EFFECT = {
    "method": "no matrix of the layers is quantised here",
    "head": "the embedding table and the output head are not quantised by it here",
    "group": "no weight is quantised to int4 here in groups of its own",
}
