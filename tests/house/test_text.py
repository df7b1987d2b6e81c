"""Nothing in the repository names the machine that it was made on, and no module prints but the command line."""

from __future__ import annotations

import re
import subprocess

from tree import ROOT

# Spelled in parts, so that this file does not find itself.
_HOME = re.compile(r"(?<![\w.])/(?:work|root|farm|tmp|home/[a-z]+|Users/[A-Za-z]+)/" + r"[A-Za-z0-9_.]")
_DEBT = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX|HA" + r"CK)\b")


def _tracked() -> dict[str, str]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    texts = {}
    for name in names.splitlines():
        file = ROOT / name
        if not file.is_file() or file.stat().st_size > 1 << 20:
            continue
        try:
            texts[name] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return texts


def test_no_machine_paths() -> None:
    found = {name: match.group() for name, text in _tracked().items() if (match := _HOME.search(text))}
    assert not found


def test_no_debts() -> None:
    found = {
        name: match.group()
        for name, text in _tracked().items()
        if name.endswith(".py") and (match := _DEBT.search(text))
    }
    assert not found


def test_no_conflict_marks() -> None:
    assert not [name for name, text in _tracked().items() if re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE)]
