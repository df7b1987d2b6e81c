"""The command line as a user calls it, on artifacts whose model recites a script."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from arkinfer import backends, cli
from arkinfer.targets import probe
from tests.runtime.scripted import write_artifact


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Arkinfer = Callable[..., Outcome]


class Keyboard(io.StringIO):
    """Standard input that may be a terminal."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def arkinfer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Arkinfer:
    """Call ``arkinfer("run", ...)``; ``stdin`` is what is piped in, None a terminal."""
    monkeypatch.setitem(backends.BACKENDS, "scripted", "tests.runtime.scripted:open")
    monkeypatch.setattr(probe, "measure_read_bandwidth", lambda threads=None, seconds=1.0, size=0: 2e9)

    def call(*arguments: str, stdin: str | None = None) -> Outcome:
        keyboard = Keyboard(stdin or "")
        keyboard.terminal = stdin is None
        monkeypatch.setattr(sys, "stdin", keyboard)
        with pytest.raises(SystemExit) as exit_:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def ark(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An artifact that thinks "Hm." and answers "It is 4, 你好."."""
    return str(write_artifact(tmp_path_factory.mktemp("ark")))


@pytest.fixture(scope="session")
def bare_ark(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An artifact without a chat template that continues text with " and so on"."""
    return str(write_artifact(tmp_path_factory.mktemp("bare"), " and so on", template=None, context=64, thinking=False))


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("2+2?", encoding="utf-8")
    return path
