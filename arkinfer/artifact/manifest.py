"""`manifest.json`: what an artifact is, and the size and digest of each of its files.

The text is canonical (sorted keys, fixed layout, UTF-8) and carries its own digest, so that the same contents are the
same bytes and no single changed byte goes unseen. It is read as hostile input: bounded, strict, nothing allocated by
its say-so.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from arkinfer.errors import ArtifactError

SCHEMA = 1
NAME = "manifest.json"
MAX_BYTES = 16 << 20
MAX_FILES = 10_000
_MAX_DEPTH = 32
# Each part starts with a letter or digit: no `..`, no hidden files, no drive or stream names, at most four deep.
_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99}){0,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and SHA-256 (lower-case hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of `manifest.json`, checked.

    ``digest`` is the SHA-256 of the canonical text of all other fields and thereby names the whole artifact: equal
    digests mean equal files. ``parity`` is None where nobody compared the artifact with the reference, ``quality``
    where nobody measured what quantising cost.
    """

    schema: int
    name: str
    arkinfer: str
    target: Mapping[str, Any]
    backend: str
    model: Mapping[str, Any]
    weights: str
    activations: str
    kv: str
    attention: str
    context: int
    graph_digest: str
    toolchain: Mapping[str, Any]
    limits: Mapping[str, Any]
    parity: Mapping[str, Any] | None
    quality: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    digest: str = ""

    @classmethod
    def create(cls, values: Mapping[str, Any], files: Mapping[str, FileEntry]) -> Manifest:
        """Return the sealed manifest of ``values``, which name every field except schema, files and digest."""
        plain = {
            **values,
            "schema": SCHEMA,
            "files": {name: {"size": e.size, "sha256": e.sha256} for name, e in files.items()},
        }
        return cls.parse(canonical({**plain, "digest": _digest(plain)}))

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """Read the bytes of a manifest.json; raise ArtifactError for anything but the canonical text of a sound one."""
        if len(text) > MAX_BYTES:
            raise _bad(f"it is longer than {MAX_BYTES} bytes")
        try:
            raw = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise _bad(f"it is not sound JSON: {error}") from error
        if not isinstance(raw, dict):
            raise _bad("it is not a JSON object")
        _check_schema(raw)
        expected = {field.name for field in fields(cls)}
        if missing := sorted(expected - set(raw)):
            raise _bad(f"it lacks {', '.join(missing)}")
        if unknown := sorted(set(raw) - expected):
            raise _bad(f"it has the unknown keys {', '.join(unknown)[:200]}")
        for key in (
            "name",
            "arkinfer",
            "backend",
            "weights",
            "activations",
            "kv",
            "attention",
            "graph_digest",
            "digest",
        ):
            if not isinstance(raw[key], str) or not raw[key] or len(raw[key]) > 1000:
                raise _bad(f"`{key}` is not a text")
        for key in ("target", "model", "toolchain", "limits", "provenance", "files"):
            if not isinstance(raw[key], dict):
                raise _bad(f"`{key}` is not an object")
        for key in ("parity", "quality"):
            if raw[key] is not None and not isinstance(raw[key], dict):
                raise _bad(f"`{key}` is neither an object nor null")
        if type(raw["context"]) is not int or not 1 <= raw["context"] < 1 << 40:
            raise _bad("`context` is not a positive number of tokens")
        _check_depth(raw)
        try:
            same = (
                canonical(raw) == text and _digest({key: raw[key] for key in raw if key != "digest"}) == raw["digest"]
            )
        except (ValueError, RecursionError) as error:  # a lone surrogate cannot be encoded
            raise _bad(str(error)) from error
        if not same:
            raise _bad("its text does not match its own digest")
        return cls(**{**raw, "files": _files(raw["files"])})

    def canonical(self) -> bytes:
        """Return the bytes of manifest.json."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["files"] = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in self.files.items()}
        return canonical(plain)


def canonical(value: Any) -> bytes:
    """Return the one text of a JSON value: sorted keys, one blank of indentation, UTF-8, a final newline.

    Raises ValueError for what JSON cannot hold (NaN, infinities, lone surrogates) and TypeError for other types.
    """
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8")


def check_path(path: str) -> str:
    """Return ``path`` if an artifact may hold a file of that name; raise ArtifactError otherwise."""
    if not _PATH.fullmatch(path) or path == NAME:
        raise _bad(f"{path[:200]!r} is not a file name that an artifact may hold")
    return path


def _bad(reason: str) -> ArtifactError:
    return ArtifactError(
        "the artifact's manifest.json cannot be trusted",
        facts={"reason": reason},
        hint="copy or build the artifact again: arkinfer build MODEL -o NAME.ark --force",
        code="ARK-E502",
    )


def _check_schema(raw: Mapping[str, Any]) -> None:
    schema = raw.get("schema")
    if type(schema) is not int or schema < 1:
        raise _bad("it names no schema version")
    if schema > SCHEMA:
        made_by = raw.get("arkinfer")
        raise ArtifactError(
            "the artifact was made by a newer arkinfer than this one",
            facts={
                "schema": f"{schema}; this arkinfer reads {SCHEMA}",
                "made by": f"arkinfer {made_by}" if isinstance(made_by, str) and len(made_by) < 100 else "unknown",
            },
            hint="pip install --upgrade arkinfer",
            code="ARK-E503",
        )


def _files(raw: Mapping[str, Any]) -> dict[str, FileEntry]:
    if len(raw) > MAX_FILES:
        raise _bad(f"it lists more than {MAX_FILES} files")
    files: dict[str, FileEntry] = {}
    for path, entry in raw.items():
        check_path(path)
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise _bad(f"the entry of {path} is not a size and a sha256")
        size, sha256 = entry["size"], entry["sha256"]
        if type(size) is not int or not 0 <= size < 1 << 62:
            raise _bad(f"the size of {path} is not a number of bytes")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise _bad(f"the digest of {path} is not a SHA-256")
        files[path] = FileEntry(size, sha256)
    folded: dict[str, str] = {}
    for path in files:  # the same name on a file system that ignores case
        other = folded.setdefault(path.lower(), path)
        if other != path:
            raise _bad(f"{other} and {path} differ in case only")
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in files:
                raise _bad(f"{'/'.join(parts[:depth])} is both a file and a folder")
    return files


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise _bad(f"it is nested deeper than {_MAX_DEPTH} levels")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(plain)).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
