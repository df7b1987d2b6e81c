"""inspect, targets, doctor, completion, and the front door itself."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import arkinfer as package
from arkinfer import exporters
from arkinfer.artifact import Artifact
from arkinfer.cli import COMMANDS
from arkinfer.cli.progress import Progress
from tests.cli.conftest import Arkinfer

ROOT = Path(package.__file__).resolve().parent.parent


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "arkinfer", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_names_every_command(arkinfer: Arkinfer) -> None:
    done = arkinfer("--help")
    assert done.status == 0 and all(f"  {name} " in done.out for name in COMMANDS)
    assert arkinfer("-h").out == done.out
    assert arkinfer("--version").out == f"arkinfer {package.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(arkinfer: Arkinfer, name: str) -> None:
    done = arkinfer(name, "--help")
    assert done.status == 0 and done.out.startswith(f"Usage: arkinfer {name}")


def test_a_misspelt_command_finds_its_neighbour(arkinfer: Arkinfer) -> None:
    done = arkinfer("bild")
    assert done.status == 2 and "did you mean `build`?" in done.err


def test_an_option_that_does_not_exist(arkinfer: Arkinfer) -> None:
    done = arkinfer("build", "x", "--weight", "int4")
    assert done.status == 2 and "--weights" in done.err


def test_inspect_an_artifact(arkinfer: Arkinfer, ark: str) -> None:
    out = arkinfer("inspect", ark).out
    for words in ("scripted-model", "12,345,678", "weights        int4", "verified", "payload/graph.txt", "took 1.4"):
        assert words in out
    facts = json.loads(arkinfer("inspect", "--artifact", ark, "--json").out)
    assert facts["weights"] == "int4" and "sha256" in facts["files"]["tokenizer.json"]
    assert arkinfer("inspect", ark, "--graph").out == "%0 = embedding(tokens)\n"


def test_targets(arkinfer: Arkinfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cpu" in arkinfer("targets").out
    listed = json.loads(arkinfer("targets", "--json").out)
    assert "cpu" in [target["name"] for target in listed]
    one = json.loads(arkinfer("targets", "cpu", "--json").out)
    assert one["backend"] == "tvm" and one["can_build"] is True
    done = arkinfer("targets", "gpu")
    assert done.status == 1 and "cpu" in done.err
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\nextends: cpu\n")
    monkeypatch.delitem(exporters.EXPORTERS, "tvm")
    done = arkinfer("targets", str(mine))
    assert "can_build      no" in done.out, done.err


def test_doctor_judges_this_machine(arkinfer: Arkinfer) -> None:
    report = json.loads(arkinfer("doctor", "--json").out)
    names = {finding["name"]: finding for finding in report["findings"]}
    assert {"python", "processor", "memory", "numpy", "linker", "target cpu"} <= set(names)
    assert names["numpy"]["verdict"] == "ok" and report["run"] in (True, False)


def test_doctor_looks_for_the_emulator(arkinfer: Arkinfer, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(arkinfer("doctor", "--target", "android", "--json").out)
    assert {item["name"]: item["verdict"] for item in report["findings"]}["emulator"] == "ok"
    monkeypatch.setattr("arkinfer.exporters.emulator.find", lambda: None)
    out = arkinfer("doctor", "--target", "raspberry-pi-5").out
    assert "qemu is not installed" in out
    assert "try  apt-get install qemu-user-static libc6-arm64-cross" in out
    assert "emulator" not in arkinfer("doctor").out


def test_doctor_names_the_fix(arkinfer: Arkinfer, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real = metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "apache-tvm" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    done = arkinfer("doctor")
    assert "pip install 'arkinfer[build]'" in done.out
    assert "0.1, but the target wants ==0.27.0.post1" in done.out
    assert done.status == 3 and "run    no" in done.out


@pytest.mark.parametrize(
    ("name", "words"), [("bash", "complete -o"), ("zsh", "#compdef arkinfer"), ("fish", "function")]
)
def test_completion_scripts(arkinfer: Arkinfer, name: str, words: str) -> None:
    done = arkinfer("completion", name)
    assert done.status == 0 and words in done.out and "_ARKINFER_COMPLETE" in done.out


def test_the_shell_completes_targets_and_commands() -> None:
    words = {"COMP_WORDS": "arkinfer build x --target c", "COMP_CWORD": "4", "_ARKINFER_COMPLETE": "bash_complete"}
    assert "plain,cpu" in shell(**words).stdout
    words = {"COMP_WORDS": "arkinfer ver", "COMP_CWORD": "1", "_ARKINFER_COMPLETE": "bash_complete"}
    assert "plain,verify" in shell(**words).stdout


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m arkinfer doctor | true", shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_of_bytes_says_how_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=3)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    screen = Terminal()
    with Progress(screen) as progress:
        progress("weights", 400_000_000, 1_000_000_000)  # what an interrupted build had finished
        progress("weights", 700_000_000, 1_000_000_000)
    assert "0.70/1.00 GB  100 MB/s  3 s left" in screen.getvalue()


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    screen, file = Terminal(), io.StringIO()
    for stream in (screen, file):
        with Progress(stream) as progress:
            for done in range(11):
                progress("compile", done, 10)
            progress("verify", 0, 1)
    assert file.getvalue() == ""
    assert "compile" in screen.getvalue() and "10/10" in screen.getvalue() and screen.getvalue().endswith("\n")


def test_a_stage_that_ends_within_its_patience_leaves_nothing() -> None:
    screen = Terminal()
    with Progress(screen, patience=60) as progress:
        progress("check", 0, 10)
        progress("check", 10, 10)
    assert screen.getvalue() == ""


def test_every_byte_is_reported_while_an_artifact_is_checked(ark: str) -> None:
    seen: list[tuple[str, int, int]] = []
    artifact = Artifact.open(ark, "full", lambda *step: seen.append(step))
    total = sum(entry.size for entry in artifact.manifest.files.values())
    assert seen[-1] == ("check", total, total)


def test_building_where_only_the_runtime_is_installed() -> None:
    """A device has no torch: the error names what to install, and is no fault of arkinfer's."""
    code = "import sys; sys.modules['torch'] = None; from arkinfer.cli import main; main(['build', 'tiny-minicpm'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "ARK-E318" in done.stderr and "arkinfer[build]" in done.stderr
