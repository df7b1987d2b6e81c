"""The tree as the guards see it: which Python files there are, what each imports."""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("arkinfer", "backends", "exporters", "runtime", "targets")
CODE = (*SHIPPED, "examples", "tests")


def files(*folders: str) -> list[Path]:
    """Return the Python files below the folders of the root, sorted."""
    found = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(ROOT).parts))


def module(file: Path) -> str:
    """Return the name under which a shipped file is imported."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == "arkinfer" else ["arkinfer", *parts])


def imports(file: Path) -> Iterator[tuple[str, int, bool]]:
    """Yield (module, line, runs) of each import; ``runs`` is false for those that only a type checker sees."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        runs = id(node) not in typing_only
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno, runs
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for name in node.names:  # `from arkinfer import targets` imports arkinfer.targets
                yield (f"{base}.{name.name}" if base == "arkinfer" else base), node.lineno, runs


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser
