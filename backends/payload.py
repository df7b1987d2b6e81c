"""Text files of a payload, read with one error for those that this version cannot use."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from arkinfer.artifact import Artifact
from arkinfer.errors import ArtifactError

PLAN = "payload/plan.json"
T = TypeVar("T")


def read(artifact: Artifact, name: str, parse: Callable[[str], T]) -> T:
    """Return what ``parse`` makes of a file. Raises ArtifactError (ARK-E512) where it raises ValueError."""
    try:
        return parse(artifact.file(name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise unsound(name, error) from error


def read_plan(artifact: Artifact, version: int) -> dict[str, Any]:
    """Return payload/plan.json. Raises ArtifactError (ARK-E512) unless it is an object of format ``version``."""
    plan = read(artifact, PLAN, json.loads)
    if not isinstance(plan, dict) or plan.get("format") != version:
        raise ArtifactError(
            "the artifact was built by another version of arkinfer",
            facts={
                "plan format": plan.get("format") if isinstance(plan, dict) else "none",
                "this version reads": version,
            },
            hint="arkinfer build MODEL -o NAME.ark --force",
            code="ARK-E512",
        )
    return plan


def unsound(name: str, reason: object) -> ArtifactError:
    """Return the error for a file of the payload that does not hold what it must."""
    return ArtifactError(
        "a file of the artifact does not hold what it must",
        facts={"file": name, "reason": reason},
        hint="arkinfer build MODEL -o NAME.ark --force",
        code="ARK-E512",
    )
