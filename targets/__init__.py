"""Target descriptions: one YAML file per device, shipped here or the user's own."""

from __future__ import annotations

from pathlib import Path

from arkinfer.errors import UserError, nearest
from arkinfer.targets.schema import Target, TargetDefaults, read

_FOLDER = Path(__file__).resolve().parent
_SUFFIXES = (".yaml", ".yml")


def names() -> list[str]:
    """Return the names of the shipped targets, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def load(name: str | Path) -> Target:
    """Return the shipped target of that name, or the one that a YAML file describes.

    A path is told from a name by its suffix (.yaml, .yml) or a slash. Raises UserError for an unknown name, a missing
    file, and anything in a file that the schema does not allow, with file and line.
    """
    text = str(name)
    if text.endswith(_SUFFIXES) or "/" in text:
        return read(Path(name), load)
    if text not in names():
        raise UserError(
            f"unknown target {text!r}",
            hint=f"{nearest(text, names())}\narkinfer targets\na YAML file of your own: --target ./{text}.yaml",
            code="ARK-E110",
        )
    return read(_FOLDER / f"{text}.yaml", load)


__all__ = ["Target", "TargetDefaults", "load", "names"]
