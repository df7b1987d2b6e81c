"""The README says nothing that the tree contradicts."""

from __future__ import annotations

import re
import shlex

import click
from tree import ROOT

from arkinfer import targets
from arkinfer.cli import commands

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EVIDENCE = ("compiled", "emulated", "ran")


def _matrix() -> list[list[str]]:
    text = TEXT.split("<!-- matrix: python tests/matrix.py --write -->")[1].split("<!-- /matrix -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    return rows[2:]


def test_opens_with_the_two_commands() -> None:
    first = re.search(r"^((?: {4}.+\n)+)", TEXT, re.MULTILINE)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first.group().splitlines()] == ["make demo", "make test"]


def test_matrix_covers_every_target_and_level() -> None:
    found = [(row[0].strip("`"), row[1], row[2]) for row in _matrix()]
    wanted = [
        (name, target.backend, level)
        for name in targets.names()
        for target in [targets.load(name)]
        for level in target.arch
    ]
    assert found == wanted
    assert all(row[3] in EVIDENCE for row in _matrix())


def test_commands_and_options_exist() -> None:
    """Each `arkinfer ...` line names a command and options that there are."""
    lines = re.findall(r"^ {4}arkinfer (.+)$", TEXT, re.MULTILINE)
    assert len(lines) >= 8
    context = click.Context(commands)
    for line in lines:
        words = shlex.split(line, comments=True)
        command = commands.get_command(context, words[0])
        assert command is not None, line
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        used = {word for word in words[1:] if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        assert used <= known, line


def test_links_lead_somewhere() -> None:
    for file in ("README.md", "ARCHITECTURE.md", "SECURITY.md", "CHANGELOG.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (ROOT / link).exists(), f"{file}: {link}"


def test_paths_named_in_the_documents_exist() -> None:
    for file in ("README.md", "ARCHITECTURE.md", "SECURITY.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:arkinfer|backends|exporters|runtime|targets|tests|examples)/[a-z_/.]+)`", text):
            assert (ROOT / path).exists(), f"{file}: {path}"
