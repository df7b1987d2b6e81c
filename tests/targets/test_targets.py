"""Target files: what is shipped is sound, what users write is read strictly, errors name the line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from arkinfer import exporters, targets
from arkinfer.errors import UnsupportedError, UserError
from arkinfer.targets import Target, TargetDefaults, schema

Read = Callable[..., Target]
FOLDER = Path(schema.__file__).parent
MINIMAL = "backend: tvm\ndescription: A device\narch: [x86-64-v3]\n"


@pytest.mark.parametrize("name", targets.names())
def test_shipped_targets(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    jsonschema.validate(yaml.safe_load(text), schema.json_schema())
    target = targets.load(name)
    assert target.name == name
    assert target == targets.load(FOLDER / f"{name}.yaml")
    assert target.backend in exporters.EXPORTERS  # nothing is shipped that this version cannot build for


def test_schema_file_is_the_readers() -> None:
    assert json.loads((FOLDER / "schema.json").read_text(encoding="utf-8")) == schema.json_schema()


def test_schema_covers_the_dataclass() -> None:
    assert set(schema.FIELDS) - {"extends"} == set(Target.__dataclass_fields__)
    assert set(schema.DEFAULTS) == set(TargetDefaults.__dataclass_fields__)


def test_to_dict_is_plain_json() -> None:
    target = targets.load("cpu")
    raw = json.loads(json.dumps(target.to_dict()))
    stored = {"group": 64, "head": "int8", "method": "search", "rules": []}
    assert raw["defaults"] == {"weights": "auto", "kv": "fp16", "attention": "auto", "context": None, **stored}
    assert raw == target.to_dict()


def test_a_new_target_is_one_file(read: Read) -> None:
    target = read(
        "extends: cpu\nname: my-board\ndescription: Our board\narch: [aarch64-dotprod]\n"
        "memory: 6 GiB\nbandwidth: 17.1 GB/s\ndefaults: {weights: int4}\n"
    )
    assert target.name == "my-board"
    assert target.memory == 6 << 30
    assert target.bandwidth == pytest.approx(17.1e9)
    assert target.backend == "tvm"
    assert target.defaults == TargetDefaults(weights="int4", kv="fp16")
    assert target.toolchain == targets.load("cpu").toolchain


def test_name_defaults_to_the_file(read: Read) -> None:
    assert read(MINIMAL, "my-box.yaml").name == "my-box"
    assert read("extends: cpu", "other.yaml").name == "other"


def test_extends_a_file_beside_it(read: Read, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: cpu\ndefaults: {kv: int8, context: 1000}\n", encoding="utf-8")
    target = read("extends: base.yaml\ndefaults: {context: 2000}\n")
    assert (target.name, target.defaults.kv, target.defaults.context) == ("device", "int8", 2000)


def test_extends_without_end(read: Read, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("extends: device.yaml", encoding="utf-8")
    with pytest.raises(UserError, match="without end") as caught:
        read("extends: other.yaml")
    assert caught.value.facts["chain"] == "device.yaml -> other.yaml -> device.yaml"


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown target 'cpo'") as caught:
        targets.load("cpo")
    assert "did you mean `cpu`?" in caught.value.hint


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        targets.load(tmp_path / "none.yaml")


def test_every_backend_of_the_schema_has_an_exporter() -> None:
    assert set(exporters.EXPORTERS) == set(exporters.OUTLINES) == set(schema.BACKENDS)
    with pytest.raises(UnsupportedError, match="abacus"):
        exporters.get("abacus")


WRONG: dict[str, tuple[str | bytes, int, str]] = {
    "unknown key": (MINIMAL + "wieghts: int4\n", 4, "unknown key `wieghts`"),
    "unknown default": (MINIMAL + "defaults:\n  kv_dtype: fp16\n", 5, "unknown key `kv_dtype`"),
    "repeated key": (MINIMAL + "backend: tvm\n", 4, "a second time; the first is in line 1"),
    "repeated default": (MINIMAL + "defaults:\n  kv: fp16\n  kv: int8\n", 6, "a second time"),
    "backend": (MINIMAL.replace("tvm", "tmv"), 1, "`backend` cannot be 'tmv'"),
    "weights": (MINIMAL + "defaults: {weights: q4}\n", 4, "`defaults.weights` cannot be 'q4'"),
    "weights null": (MINIMAL + "defaults: {weights: }\n", 4, "`defaults.weights` cannot be None"),
    "arch": (MINIMAL.replace("x86-64-v3", "x86-64-v9"), 3, "`arch` cannot be 'x86-64-v9'"),
    "arch text": (MINIMAL.replace("[x86-64-v3]", "x86-64-v3"), 3, "`arch` is"),
    "arch empty": (MINIMAL.replace("[x86-64-v3]", "[]"), 3, "`arch` is empty"),
    "arch twice": (MINIMAL.replace("[x86-64-v3]", "[x86-64-v3, x86-64-v3]"), 3, "twice"),
    "arch nested": (MINIMAL.replace("[x86-64-v3]", "[[x86-64-v3]]"), 3, "single value"),
    "memory unit": (MINIMAL + "memory: 6 gigs\n", 4, "`memory` cannot be '6 gigs'"),
    "memory negative": (MINIMAL + "memory: -1\n", 4, "out of range"),
    "memory boolean": (MINIMAL + "memory: yes\n", 4, "`memory` is true or false"),
    "memory float": (MINIMAL + "memory: 1.5\n", 4, "`memory` is a number"),
    "bandwidth zero": (MINIMAL + "bandwidth: 0\n", 4, "out of range"),
    "bandwidth nan": (MINIMAL + "bandwidth: .nan\n", 4, "out of range"),
    "bandwidth unit": (MINIMAL + "bandwidth: 50 GB\n", 4, "`bandwidth` cannot be"),
    "group": (MINIMAL + "defaults: {group: 48}\n", 4, "`defaults.group` cannot be 48"),
    "head": (MINIMAL + "defaults: {head: fp16}\n", 4, "`defaults.head` cannot be 'fp16'"),
    "rules text": (MINIMAL + "defaults: {rules: '*=int4'}\n", 4, "`defaults.rules` is"),
    "rule": (MINIMAL + "defaults:\n  rules: ['*=int4', 'x=int5']\n", 5, "`defaults.rules` cannot be 'x=int5'"),
    "rule twice": (MINIMAL + "defaults:\n  rules: ['x=int4', 'x=int4']\n", 5, "twice"),
    "rule unquoted": (MINIMAL + "defaults:\n  rules:\n  - *.down_proj.*=int4\n", 6, ""),
    "context": (MINIMAL + "defaults: {context: 0}\n", 4, "out of range"),
    "context text": (MINIMAL + "defaults: {context: many}\n", 4, "`defaults.context` cannot be 'many'"),
    "context list": (MINIMAL + "defaults: {context: [1]}\n", 4, "single value"),
    "description": (MINIMAL.replace("A device", "7"), 2, "`description` is a whole number"),
    "description date": (MINIMAL.replace("A device", "2026-01-01"), 2, "neither text nor number"),
    "toolchain": (MINIMAL + "toolchain: {cuda: 12}\n", 4, "`toolchain.cuda` is a whole number"),
    "toolchain list": (MINIMAL + "toolchain: [cuda]\n", 4, "`toolchain` is"),
    "number key": (MINIMAL + "7: x\n", 4, "a key is a plain word"),
    "merge key": (MINIMAL + "<<: {name: x}\n", 4, "a key is a plain word"),
    "alias": (MINIMAL + "name: &a x\nextends: *a\n", 5, "alias"),
    "not a mapping": ("- cpu\n", 1, "a target is a mapping"),
    "empty": ("", 1, "a target is a mapping"),
    "two documents": (MINIMAL + "---\n" + MINIMAL, 4, "another document"),
    "python object": (MINIMAL + "name: !!python/object/apply:os.system [id]\n", 4, "`name` is a single value"),
    "python name": (MINIMAL + "name: !!python/name:os.system x\n", 4, "not plain data"),
    "own tag": (MINIMAL + "name: !x y\n", 4, "not plain data"),
    "bad integer": (MINIMAL + "memory: !!int x\n", 4, "not plain data"),
    "syntax": (MINIMAL + "name: [\n", 5, ""),
    "tab": (MINIMAL + "defaults:\n\tkv: fp16\n", 5, "found character"),
    "control character": (MINIMAL + "name: \x07\n", 1, "not YAML"),
    "not utf-8": (MINIMAL.encode() + b"name: \xff\n", 1, "not YAML"),
    "deep": (MINIMAL + "name: " + "[" * 20_000, 4, "nested too deep"),
}


def test_rules_are_quoted_texts(read: Read) -> None:
    target = read('extends: cpu\ndefaults:\n  rules: ["*.down_proj.*=int4:32", "layers.0.*=fp16"]\n')
    assert target.defaults.rules == ("*.down_proj.*=int4:32", "layers.0.*=fp16")
    for rule, near in (("x=int5", "did you mean `int"), ("x=int4:127", "128"), ("x", "known: fp16")):
        with pytest.raises(UserError) as caught:
            read(f"extends: cpu\ndefaults: {{rules: ['{rule}']}}\n")
        assert near in caught.value.hint


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_file_and_line(case: str, read: Read) -> None:
    text, line, reason = WRONG[case]
    with pytest.raises(UserError) as caught:
        read(text)
    assert caught.value.message.startswith(f"device.yaml:{line}: ")
    assert reason in caught.value.message


def test_too_long(read: Read) -> None:
    with pytest.raises(UserError, match="longer than"):
        read("#" * (1 << 17))


@pytest.mark.parametrize("name", ["../x", "A B", "", "x" * 65, "-x"])
def test_unusable_names(name: str, read: Read) -> None:
    with pytest.raises(UserError):
        read(MINIMAL + f"name: {json.dumps(name)}\n")


@pytest.mark.parametrize("missing", ["backend", "description", "arch"])
def test_missing_keys_are_named(missing: str, read: Read) -> None:
    with pytest.raises(UserError, match=f"lacks {missing}"):
        read("".join(line + "\n" for line in MINIMAL.splitlines() if not line.startswith(missing)))


def test_reader_and_json_schema_agree(read: Read) -> None:
    """Documents made of likely and unlikely values: editors accept exactly what the reader accepts."""
    generator = random.Random(3)
    words: list[Any] = [
        None, True, 0, 1, -1, 7, 4096, 0.5, 1e30, "", "tvm", "cuda", "cpu", "int4", "fp16", "auto", "dense",
        "x86-64-v3", "sm_89", "6 GiB", "6GiB", "6 gib", "17.1 GB/s", "1 GB/s ", ["x86-64-v3"], ["sm_87", "sm_87"],
        ["nope"], [], {}, {"cuda": ">=12"}, {"kv": "int8"}, {"kv": "int2"}, {"context": 5}, {"context": None},
        {"cuda": 12},
    ]  # fmt: skip
    validator = jsonschema.Draft202012Validator(schema.json_schema())
    outcomes = set()
    for _ in range(1500):
        document: dict[str, Any] = {"backend": "tvm", "description": "x", "arch": ["x86-64-v3"]}
        for _ in range(generator.randrange(1, 3)):
            document[generator.choice([*schema.FIELDS, "other"])] = generator.choice(words)
        document.pop("extends", None)  # whether the other file exists is beyond a schema
        try:
            read(yaml.safe_dump(document))
            accepted = True
        except UserError:
            accepted = False
        assert accepted == validator.is_valid(document), document
        outcomes.add(accepted)
    assert outcomes == {True, False}
