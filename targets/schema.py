"""The Target type, and the strict reader of the YAML files that describe one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from arkinfer.errors import UserError, nearest
from arkinfer.targets.probe import LEVELS

BACKENDS = ("tvm", "cuda", "tensorrt", "onnxruntime", "mlc")
WEIGHTS = ("auto", "fp32", "fp16", "int8", "int4", "ternary")
KV = ("fp32", "fp16", "int8")
ATTENTION = ("auto", "dense", "sparse")
RULES = ("fp32", "fp16", "int8", "int4")
GROUPS = (32, 64, 128)
HEADS = ("int8", "int4")
METHODS = ("search", "pgptq")
COMPUTE = ("int8", "fp16", "fp32")
PLATFORMS = ("linux-x86_64", "linux-aarch64", "android-aarch64", "macos-arm64", "ios-arm64")

_MAX_BYTES = 64 << 10
_MAX_EXTENDS = 8
_MAX_DEPTH = 8
_MAX_AMOUNT = 10**18  # bytes, or bytes/s
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_CUDA_LEVEL = r"sm_[0-9]{2,3}"
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_RATES = {"GOPS": 1e9, "TOPS": 1e12, "GFLOPS": 1e9, "TFLOPS": 1e12}
_AMOUNT = r"[0-9]+(\.[0-9]+)? ?(KB|MB|GB|TB|KiB|MiB|GiB|TiB)"


@dataclass(frozen=True, slots=True)
class TargetDefaults:
    """What a build takes where the user says nothing; ``context`` (tokens) None means the model's own limit, "fit" the
    largest up to it for which the target has the memory.

    ``group``, ``head``, ``method`` and ``rules`` (PATTERN=FORMAT[:GROUP]) are those of arkinfer.recipe.Rounding.
    """

    weights: str = "auto"
    kv: str = "fp16"
    attention: str = "auto"
    context: int | str | None = None
    group: int = 64
    head: str = "int8"
    method: str = "search"
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of device to build for.

    ``arch`` lists instruction set levels or GPU architectures, the preferred first. ``memory`` is what weights, caches
    and workspace may take in bytes and ``bandwidth`` the memory's read rate in bytes/s, each None where the machine at
    hand decides. ``compute`` maps number formats (int8, fp16, fp32) to operations per second, None likewise;
    ``toolchain`` package names to version ranges. ``platform`` is the system that code for processors is linked for,
    None for Linux; ``glibc`` the oldest version of its C library there, None where arkinfer decides;
    ``native`` adds the runner for programs without Python.
    """

    name: str
    backend: str
    description: str
    arch: tuple[str, ...]
    platform: str | None = None
    glibc: str | None = None
    native: bool = False
    memory: int | None = None
    bandwidth: float | None = None
    compute: Mapping[str, float | None] = field(default_factory=dict)
    toolchain: Mapping[str, str] = field(default_factory=dict)
    defaults: TargetDefaults = TargetDefaults()

    def to_dict(self) -> dict[str, Any]:
        """Return the target as plain JSON values."""
        defaults = {**asdict(self.defaults), "rules": list(self.defaults.rules)}
        tables = {"compute": dict(self.compute), "toolchain": dict(self.toolchain), "defaults": defaults}
        return {**asdict(self), "arch": list(self.arch), **tables}


def read(file: Path, resolve: Callable[[str | Path], Target], above: tuple[Path, ...] = ()) -> Target:
    """Read the target in ``file``; ``resolve`` finds a shipped target that it extends by name.

    Raises UserError, naming file and line, for anything that the schema does not allow: unknown or repeated keys, wrong
    types, aliases, an ``extends`` that leads back to itself.
    """
    place = file.resolve()
    if place in above or len(above) >= _MAX_EXTENDS:
        chain = " -> ".join(step.name for step in (*above, place))
        raise UserError("targets extend each other without end", facts={"chain": chain}, code="ARK-E113")
    values = _Document(file).values()
    base: dict[str, Any] = {}
    if extends := values.pop("extends", None):
        if extends.endswith((".yaml", ".yml")):
            parent = read(file.parent / extends, resolve, (*above, place))
        else:
            parent = resolve(extends)
        base = parent.to_dict()
    merged = {**base, "name": file.stem, **values}
    for key in ("compute", "defaults", "toolchain"):
        merged[key] = {**base.get(key, {}), **values.get(key, {})}
    if missing := [key for key, rule in FIELDS.items() if rule.required and key not in merged]:
        raise UserError(
            f"{file.name} is not complete: it lacks {', '.join(missing)}",
            facts={"file": file},
            hint="add them, or extend a shipped target: `extends: cpu`",
            code="ARK-E112",
        )
    if not _NAME.fullmatch(merged["name"]):
        raise UserError(
            f"{merged['name']!r} cannot name a target",
            facts={"file": file},
            hint="use lower-case letters, digits, '.', '-' and '_'",
            code="ARK-E112",
        )
    merged["arch"] = tuple(merged["arch"])
    merged["defaults"]["rules"] = tuple(merged["defaults"].get("rules", ()))
    merged["defaults"] = TargetDefaults(**merged["defaults"])
    return Target(**merged)


@dataclass(frozen=True, slots=True)
class Rule:
    """What one key may hold: its JSON Schema, from which the reader works too, and how to convert a valid value."""

    schema: Mapping[str, Any]
    required: bool = False
    convert: Callable[[Any], Any] = lambda value: value


def _amount(value: int | float | str | None) -> float | None:
    if not isinstance(value, str):
        return value
    number, unit = re.fullmatch(r"([0-9.]+) ?([A-Za-z]+)(?:/s)?", value).groups()  # type: ignore[union-attr]
    return float(number) * _UNITS[unit]


def _operations(values: Mapping[str, int | float | str | None]) -> dict[str, float | None]:
    def rate(value: int | float | str | None) -> float | None:
        if not isinstance(value, str):
            return value
        number, unit = re.fullmatch(r"([0-9.]+) ?([A-Z]+)", value).groups()  # type: ignore[union-attr]
        return float(number) * _RATES[unit]

    return {name: rate(value) for name, value in values.items()}


def _bytes(value: int | str | None) -> int | None:
    amount = _amount(value)
    return None if amount is None else int(amount)


def _one_of(words: Sequence[object], description: str) -> dict[str, Any]:
    return {"enum": list(words), "description": description}


DEFAULTS = {
    "weights": Rule(_one_of(WEIGHTS, "Weight format; auto keeps what the checkpoint holds where that is quantised")),
    "kv": Rule(_one_of(KV, "Type of the key and value cache")),
    "attention": Rule(_one_of(ATTENTION, "auto: sparse from the model's dense_len on, if it has sparse attention")),
    "context": Rule(
        {
            "type": ["integer", "string", "null"],
            "minimum": 1,
            "maximum": 10**9,
            "pattern": "^fit$",
            "description": "Largest number of tokens; null: the model's limit; fit: what the target's memory allows",
        }
    ),
    "group": Rule(_one_of(GROUPS, "Inputs that share one int4 scale, in weights that are quantised here")),
    "head": Rule(_one_of(HEADS, "Format of the embedding table and the output head where weights are integers")),
    "method": Rule(_one_of(METHODS, "search: the scale that loses least; pgptq: also correct later columns for it")),
    "rules": Rule(
        {
            "type": "array",
            "minItems": 0,
            "uniqueItems": True,
            "items": {"type": "string", "pattern": r"^.+=((fp32|fp16)|(int8|int4)(:(32|64|128))?)$"},
            "description": "PATTERN=FORMAT[:GROUP] for weights by name, the first that matches; quote a leading `*`",
        }
    ),
}
FIELDS: Mapping[str, Rule] = {
    "extends": Rule(
        {"type": "string", "description": "A shipped target's name, or a YAML file beside this one, to start from"}
    ),
    "name": Rule({"type": "string", "pattern": f"^{_NAME.pattern}$", "description": "Default: the file's name"}),
    "description": Rule({"type": "string", "description": "One line for `arkinfer targets`"}, required=True),
    "backend": Rule(_one_of(BACKENDS, "What runs the artifact"), required=True),
    "arch": Rule(
        {
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": {"type": "string", "pattern": f"^({'|'.join(LEVELS)}|{_CUDA_LEVEL})$"},
            "description": "Instruction set levels or GPU architectures to hold code for, the preferred first",
        },
        required=True,
    ),
    "platform": Rule(_one_of(PLATFORMS, "System that code for processors is linked for; default: Linux")),
    "glibc": Rule(
        {
            "type": "string",
            "pattern": r"^2\.[0-9]{1,2}$",
            "description": "Oldest version of the C library on Linux that code must run with; quote it: '2.28'",
        }
    ),
    "native": Rule(
        {
            "type": "boolean",
            "description": "Whether artifacts hold the runner for programs without Python: see docs/native.md",
        }
    ),
    "memory": Rule(
        {
            "type": ["integer", "string", "null"],
            "minimum": 1,
            "maximum": _MAX_AMOUNT,
            "pattern": f"^{_AMOUNT}$",
            "description": "Bytes that weights, caches and workspace may take (6 GiB); null: ask the machine",
        },
        convert=_bytes,
    ),
    "bandwidth": Rule(
        {
            "type": ["number", "string", "null"],
            "minimum": 1,
            "maximum": _MAX_AMOUNT,
            "pattern": f"^{_AMOUNT}/s$",
            "description": "Read rate of the memory (204.8 GB/s); null: measure",
        },
        convert=_amount,
    ),
    "compute": Rule(
        {
            "type": "object",
            "properties": {
                name: {
                    "type": ["number", "string", "null"],
                    "minimum": 1,
                    "maximum": _MAX_AMOUNT,
                    "pattern": r"^[0-9]+(\.[0-9]+)? ?(GOPS|TOPS|GFLOPS|TFLOPS)$",
                    "description": f"Dense operations a second in {name} (275 TOPS); null: measure",
                }
                for name in COMPUTE
            },
            "additionalProperties": False,
            "description": "Peak rates of arithmetic, for `arkinfer plan`",
        },
        convert=_operations,
    ),
    "toolchain": Rule(
        {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "Package names and the version ranges that builds for this target need",
        }
    ),
    "defaults": Rule(
        {
            "type": "object",
            "properties": {name: dict(rule.schema) for name, rule in DEFAULTS.items()},
            "additionalProperties": False,
            "description": "What a build takes where the user says nothing",
        }
    ),
}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of target files; schema.json holds it for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "arkinfer target",
        "type": "object",
        "properties": {name: dict(rule.schema) for name, rule in FIELDS.items()},
        "additionalProperties": False,
        "anyOf": [
            {"required": ["extends"]},
            {"required": [name for name, rule in FIELDS.items() if rule.required]},
        ],
    }


class _Document:
    """One YAML file as nodes, which still know their lines."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with open(file, "rb") as stream:
                raw = stream.read(_MAX_BYTES + 1)
        except OSError as error:
            raise UserError(
                f"the target file {file} cannot be read", facts={"reason": error.strerror}, code="ARK-E111"
            ) from error
        if len(raw) > _MAX_BYTES:
            raise UserError(f"the target file {file} is longer than {_MAX_BYTES} bytes", code="ARK-E112")
        try:
            text = raw.decode("utf-8")
            depth = 0
            for event in yaml.parse(text, yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > _MAX_DEPTH:  # looked at before PyYAML gets there: its time grows with the square
                    raise self.error(_line(event.start_mark), "nested too deep")
                # Aliases make small files grow without bound, and a target has no use for them.
                if isinstance(event, yaml.AliasEvent):
                    raise self.error(
                        _line(event.start_mark), "an alias (`*name`) is not allowed: write the value out, or quote it"
                    )
            self.root = yaml.compose(text, yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            reason = error.problem or error.context or "not YAML"
            raise self.error(_line(mark), reason) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise self.error(0, f"not YAML: {str(error).splitlines()[0]}") from error

    def error(self, line: int, reason: str, hint: str = "") -> UserError:
        return UserError(
            f"{self.file.name}:{line + 1}: {reason}", facts={"file": self.file}, hint=hint, code="ARK-E112"
        )

    def values(self) -> dict[str, Any]:
        """Return the checked and converted values of the file's keys."""
        if not isinstance(self.root, yaml.MappingNode):
            raise self.error(0, "a target is a mapping of keys to values")
        values = {}
        for key, node in self._items(self.root, tuple(FIELDS)):
            values[key] = FIELDS[key].convert(self._check(node, FIELDS[key].schema, key))
        return values

    def _items(self, node: yaml.MappingNode, known: Sequence[str] | None) -> list[tuple[str, yaml.Node]]:
        seen: dict[str, int] = {}
        items = []
        for key_node, value in node.value:
            line = key_node.start_mark.line
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
                raise self.error(line, "a key is a plain word")
            key = str(key_node.value)
            if known is not None and key not in known:
                raise self.error(line, f"unknown key `{key}`", nearest(key, list(known)))
            if key in seen:
                raise self.error(line, f"`{key}` stands here a second time; the first is in line {seen[key] + 1}")
            seen[key] = line
            items.append((key, value))
        return items

    def _check(self, node: yaml.Node, schema: Mapping[str, Any], name: str) -> Any:
        """Return the plain value of ``node`` if ``schema`` allows it."""
        line = node.start_mark.line
        types = schema.get("type", "string")
        types = [types] if isinstance(types, str) else types
        if isinstance(node, yaml.MappingNode) and "object" in types:
            properties = schema.get("properties")
            rest = schema.get("additionalProperties") or {}
            return {
                key: self._check(value, properties[key] if properties else rest, f"{name}.{key}")
                for key, value in self._items(node, tuple(properties) if properties else None)
            }
        if isinstance(node, yaml.SequenceNode) and "array" in types:
            values = [self._check(item, schema["items"], name) for item in node.value]
            if len(values) < schema["minItems"]:
                raise self.error(line, f"`{name}` is empty")
            if len(set(values)) != len(values):
                raise self.error(line, f"`{name}` names something twice")
            return values
        value = self._scalar(node, name)
        kinds = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"}
        kind = kinds.get(type(value), "other")
        if "enum" in schema:
            if value not in schema["enum"]:
                known = list(map(str, schema["enum"]))
                raise self.error(line, f"`{name}` cannot be {value!r}", nearest(str(value), known))
            return value
        if kind not in types and not (kind == "integer" and "number" in types):
            raise self.error(line, f"`{name}` is {_A[kind]}, not {' or '.join(_A[each] for each in types)}")
        if kind != "boolean":
            self._check_range(value, schema, name, line)
        return value

    def _check_range(self, value: Any, schema: Mapping[str, Any], name: str, line: int) -> None:
        if isinstance(value, str):
            if "pattern" in schema and not re.search(schema["pattern"], value):
                raise self.error(line, f"`{name}` cannot be {value!r}", _suggestion(value, schema, name))
        elif value is not None and not schema["minimum"] <= value <= schema["maximum"]:
            raise self.error(line, f"`{name}` is out of range: {value}")

    def _scalar(self, node: yaml.Node, name: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node.start_mark.line, f"`{name}` is a single value")
        try:
            # The safe constructor refuses every tag that is not plain data.
            value = yaml.constructor.SafeConstructor().construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            raise self.error(node.start_mark.line, f"`{name}` is not plain data: {node.value[:80]!r}") from error
        return value


def _suggestion(value: str, schema: Mapping[str, Any], name: str) -> str:
    if name == "arch":
        return nearest(value, list(LEVELS))
    if name == "defaults.rules":
        form, _, group = value.rpartition("=")[2].partition(":")
        wrong, known = (group, tuple(map(str, GROUPS))) if form in RULES and group else (form, RULES)
        return f"PATTERN=FORMAT[:GROUP], {nearest(wrong, known)}"
    return f"it must match {schema['pattern']}"


def _line(mark: Any) -> int:
    return mark.line if mark is not None else 0


_A = {
    "null": "empty",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "array": "a list",
    "object": "a mapping",
    "other": "neither text nor number",
}
