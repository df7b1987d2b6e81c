"""The errors that users see: what failed, the facts, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping


class ArkError(Exception):
    """Base of every error that arkinfer raises on purpose.

    ``code`` is stable across releases and may be matched by scripts; ``facts`` are name/value pairs that explain the
    failure; ``hint`` is the next thing to do, a command wherever one exists.
    """

    exit_code = 1
    code = "ARK-E100"

    def __init__(
        self, message: str, *, facts: Mapping[str, object] | None = None, hint: str = "", code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.facts = dict(facts or {})
        self.hint = hint
        if code is not None:
            self.code = code

    def render(self) -> str:
        """Return the error as the command line prints it."""
        lines = [f"error {self.code}: {self.message}"]
        width = max((len(name) for name in self.facts), default=0)
        lines += [f"  {name.ljust(width)}  {value}" for name, value in self.facts.items()]
        if self.hint:
            lines += [f"  try  {line}" for line in self.hint.splitlines()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """Return the error as the ``--json`` form prints it."""
        facts = {name: str(value) for name, value in self.facts.items()}
        return {"error": {"code": self.code, "message": self.message, "facts": facts, "hint": self.hint}}


class UserError(ArkError):
    """The request or its input is wrong: unknown name, malformed file, impossible combination."""

    exit_code = 1
    code = "ARK-E100"


class UnsupportedError(ArkError):
    """The request is sound but this build, target or machine cannot serve it."""

    exit_code = 3
    code = "ARK-E300"


class ParityError(ArkError):
    """The artifact does not compute what the reference computes."""

    exit_code = 4
    code = "ARK-E400"


class ArtifactError(ArkError):
    """The artifact is corrupt, truncated, foreign or untrusted."""

    exit_code = 5
    code = "ARK-E500"


class InternalError(ArkError):
    """arkinfer itself is at fault."""

    exit_code = 70
    code = "ARK-E700"


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ``"did you mean `x`?"`` for the closest of ``known``, or the list of what is known."""
    import difflib

    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean `{match[0]}`?" if match else "known: " + ", ".join(sorted(known))
