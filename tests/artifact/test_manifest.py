"""manifest.json is hostile input: whatever it holds, reading it ends quickly in a Manifest or in an ArtifactError."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import samples

from arkinfer.artifact import Artifact, FileEntry, Manifest
from arkinfer.artifact.manifest import canonical
from arkinfer.errors import ArkError, ArtifactError

FILES = {"tokenizer.json": FileEntry(10, "a" * 64), "payload/x.so": FileEntry(20, "b" * 64)}


def sealed(plain: dict[str, Any]) -> bytes:
    """Return the text of a manifest whose digest is right, whatever else is wrong with it."""
    plain = {key: value for key, value in plain.items() if key != "digest"}
    return canonical({**plain, "digest": hashlib.sha256(canonical(plain)).hexdigest()})


def plain() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(Manifest.create(samples.fields(), FILES).canonical())
    return raw


def test_round_trip() -> None:
    manifest = Manifest.create(samples.fields(), FILES)
    assert Manifest.parse(manifest.canonical()) == manifest
    assert sealed(plain()) == manifest.canonical()


def test_digest_names_the_contents() -> None:
    one = Manifest.create(samples.fields(), FILES)
    reordered = Manifest.create(dict(reversed(samples.fields().items())), dict(reversed(FILES.items())))
    assert reordered.canonical() == one.canonical()
    assert Manifest.create(samples.fields(context=8192), FILES).digest != one.digest


def test_newer_schema_says_so() -> None:
    with pytest.raises(ArtifactError, match="newer arkinfer") as caught:
        Manifest.parse(sealed({**plain(), "schema": 2, "arkinfer": "9.0", "novelty": {}}))
    assert caught.value.facts["made by"] == "arkinfer 9.0"
    assert caught.value.code == "ARK-E503"


def _with(key: str, value: Any) -> Callable[[], bytes]:
    return lambda: sealed({**plain(), key: value})


def _without(key: str) -> Callable[[], bytes]:
    return lambda: sealed({name: value for name, value in plain().items() if name != key})


def _file(name: str, entry: Any = None) -> Callable[[], bytes]:
    return lambda: sealed({**plain(), "files": {**plain()["files"], name: entry or {"size": 1, "sha256": "c" * 64}}})


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "not json": lambda: b"GGUF\x03\x00",
    "not an object": lambda: b"[]\n",
    "null": lambda: b"null\n",
    "not utf-8": lambda: b'{"name": "\xff"}',
    "utf-16": lambda: canonical(plain()).decode().encode("utf-16"),
    "byte order mark": lambda: b"\xef\xbb\xbf" + sealed(plain()),
    "trailing text": lambda: sealed(plain()) + b"{}",
    "trailing newline": lambda: sealed(plain()) + b"\n",
    "carriage returns": lambda: sealed(plain()).replace(b"\n", b"\r\n"),
    "compact text": lambda: json.dumps(json.loads(sealed(plain()))).encode(),
    "unsorted keys": lambda: json.dumps(dict(reversed(plain().items())), indent=1, ensure_ascii=False).encode() + b"\n",
    "repeated key": lambda: sealed(plain()).replace(b'"kv": "fp16"', b'"kv": "fp32",\n "kv": "fp16"'),
    "escaped text": lambda: (json.dumps(plain(), sort_keys=True, indent=1) + "\n").encode(),
    "lone surrogate": lambda: sealed(plain()).replace(b'"cpu"', b'"\\ud800"'),
    "not a number": lambda: sealed(plain()).replace(b"12345", b"NaN"),
    "infinity": lambda: sealed(plain()).replace(b"12345", b"-Infinity"),
    "overflowing float": lambda: sealed(plain()).replace(b"12345", b"1e999"),
    "endless integer": lambda: sealed(plain()).replace(b"12345", b"9" * 10_000),
    "deep lists": lambda: b"[" * 1_000_000,
    "deep objects": lambda: b'{"a":' * 1_000_000,
    "deep but sound": _with("limits", {"a": _nested(200)}),
    "too long": lambda: b" " * ((16 << 20) + 1),
    "wrong digest": lambda: canonical({**plain(), "digest": "0" * 64}),
    "no digest": lambda: canonical({key: value for key, value in plain().items() if key != "digest"}),
    "schema 0": _with("schema", 0),
    "schema -1": _with("schema", -1),
    "schema true": _with("schema", True),
    "schema 1.0": _with("schema", 1.0),
    "schema text": _with("schema", "1"),
    "schema 2": _with("schema", 2),
    "schema 10**30": _with("schema", 10**30),
    "unknown key": _with("entry_point", "evil:main"),
    "context 0": _with("context", 0),
    "context huge": _with("context", 1 << 60),
    "context float": _with("context", 4096.0),
    "context true": _with("context", True),
    "parity list": _with("parity", []),
    "parity text": _with("parity", "good"),
    "quality list": _with("quality", []),
    "quality text": _with("quality", "good"),
    "backend empty": _with("backend", ""),
    "backend long": _with("backend", "x" * 100_000),
    "files list": _with("files", []),
    "files null": _with("files", None),
    "many files": _with("files", {f"f{n}": {"size": 1, "sha256": "c" * 64} for n in range(10_001)}),
    **{f"no {key}": _without(key) for key in ("schema", "name", "files", "model", "parity", "quality", "graph_digest")},
    **{f"{key} number": _with(key, 7) for key in ("name", "arkinfer", "backend", "weights", "kv", "attention")},
    **{f"{key} list": _with(key, []) for key in ("target", "model", "toolchain", "limits", "provenance")},
    **{
        f"file {name!r}": _file(name)
        for name in (
            "../evil", "/etc/passwd", "a/../../b", "..", ".", "", "a//b", "a/", "/a", "./a", ".bashrc", "a/.b", "a\\b",
            "C:/x", "c:x", "a\x00b", "a\nb", "a b", "~", "~/x", "-", "-rf", "$HOME", "%2e%2e/x", "\u202egpj.exe", "ａ",
            "manifest.json", "a/b/c/d/e", "x" * 300, "TOKENIZER.json", "tokenizer.json/x", "payload",
        )
    },
    **{
        f"entry {number}": _file("x", entry)
        for number, entry in enumerate(
            [
                [1], "x", {"size": 1}, {"sha256": "c" * 64}, {"size": -1, "sha256": "c" * 64},
                {"size": True, "sha256": "c" * 64}, {"size": 1.0, "sha256": "c" * 64},
                {"size": "1", "sha256": "c" * 64},
                {"size": 1 << 63, "sha256": "c" * 64}, {"size": 1, "sha256": "C" * 64}, {"size": 1, "sha256": "c" * 63},
                {"size": 1, "sha256": "c" * 64 + "\n"}, {"size": 1, "sha256": 5}, {"size": 1, "sha256": None},
                {"size": 1, "sha256": "c" * 64, "url": "http://evil"},
            ]
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests(case: str) -> None:
    with pytest.raises(ArtifactError):
        Manifest.parse(HOSTILE[case]())


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.0, -0.0, 1e308, 5e-324, "", "a", "\x00", "../x",
    "x" * 5000, "\u202e", "小", [], {}, [[]], {"": {}}, [None] * 1000, {"a": 1},
]  # fmt: skip


def _mutate(value: Any, generator: random.Random) -> Any:
    """Return ``value`` with one thing changed somewhere below it: replaced, dropped, doubled, renamed or nested."""
    if isinstance(value, dict) and value and generator.random() < 0.8:
        key = generator.choice(sorted(value))
        action = generator.randrange(6)
        if action == 0:
            return {name: item for name, item in value.items() if name != key}
        if action == 1:
            return {**value, generator.choice(["../x", "", "schema", key + "x", "a/b/c", "MANIFEST.json"]): value[key]}
        if action == 2:
            return {**value, key: generator.choice(VALUES)}
        return {**value, key: _mutate(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.8:
        index = generator.randrange(len(value))
        return [*value[:index], _mutate(value[index], generator), *value[index + generator.randrange(2) :]]
    return generator.choice([*VALUES, [value], {"x": value}])


def test_structured_mutations() -> None:
    """Mutations with a right digest, so that the checks behind it are reached; fixed seeds."""
    original = plain()
    accepted = 0
    for seed in range(4000):
        generator = random.Random(seed)
        mutant = original
        for _ in range(generator.randrange(1, 4)):
            mutant = _mutate(mutant, generator)
        try:
            manifest = Manifest.parse(sealed(mutant) if isinstance(mutant, dict) else canonical(mutant))
        except ArtifactError:
            continue
        accepted += 1
        assert all(isinstance(entry.size, int) and ".." not in name for name, entry in manifest.files.items())
        assert Manifest.parse(manifest.canonical()) == manifest
    assert 0 < accepted < 4000


def test_byte_mutations() -> None:
    """Bytes replaced, removed, doubled and spliced anywhere; fixed seeds."""
    text = Manifest.create(samples.fields(), FILES).canonical()
    for seed in range(4000):
        generator = random.Random(seed)
        mutant = bytearray(text)
        for _ in range(generator.randrange(1, 6)):
            start = generator.randrange(len(mutant))
            stop = min(len(mutant), start + generator.randrange(1, 40))
            piece = generator.choice(
                [b"", b"\x00", b"\xff", b'"', b"{", b"[", b"9" * 30, bytes(mutant[start:stop]) * 2]
            )
            mutant[start:stop] = piece
        if bytes(mutant) == text:
            continue
        with pytest.raises(ArtifactError):
            Manifest.parse(bytes(mutant))


def test_hostile_files_section_opens_nothing_outside(artifact: Artifact) -> None:
    """A manifest that names a file outside, with that file's true size and digest."""
    outside = artifact.path.parent / "secret"
    outside.write_bytes(b"secret")
    raw = json.loads((artifact.path / "manifest.json").read_bytes())
    raw["files"]["../secret"] = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    (artifact.path / "manifest.json").write_bytes(sealed(raw))
    with pytest.raises(ArkError, match="cannot be trusted"):
        Artifact.open(artifact.path)
