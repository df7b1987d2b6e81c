"""Write the support matrix of the README from what runs here.

    python tests/matrix.py [--write]

For every shipped target the bundled model is built; each instruction set level of the target then runs the parity gate
on this machine if it can, and counts as compiled if it cannot. Nothing is said that was not done in this run.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import arkinfer
from arkinfer import targets
from arkinfer.artifact import Artifact
from arkinfer.errors import ArkError, UnsupportedError
from arkinfer.exporters import emulator
from arkinfer.targets import probe

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- matrix: python tests/matrix.py --write -->", "<!-- /matrix -->"
HEAD = "| target | backend | level | evidence | how it was shown |\n|---|---|---|---|---|"
EVIDENCE = ("compiled", "emulated", "ran")
MODEL = "tiny-minicpm"


def rows(name: str, folder: Path) -> list[str]:
    """Return the matrix rows of one target."""
    target = targets.load(name)
    artifact = arkinfer.build(MODEL, target=name, out=folder / f"{name}.ark", verify="none")
    return [f"| `{name}` | {target.backend} | {level} | {_evidence(artifact, level)} |" for level in target.arch]


def _evidence(artifact: Artifact, level: str) -> str:
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    if level.startswith("sm_"):
        return _on_gpu(artifact, level, today)
    if artifact.manifest.backend == "mlc":
        return _in_place_of_app(artifact, today)
    if level not in probe.isa_levels():
        tvm = artifact.manifest.backend == "tvm"
        return _emulated(artifact, level, today) if tvm else f"compiled | {MODEL} built {today}"
    with mock.patch.object(probe, "isa_levels", lambda: (level,)):
        try:
            report = arkinfer.verify(artifact)
        except ArkError as error:
            raise SystemExit(error.render()) from error
    if not report.passed:
        raise SystemExit(f"{level}: {report.summary()}")
    how = f"{MODEL} verified over {report.positions:,} positions, {probe.machine().processor}, {today}"
    return f"ran | {how}"


def _emulated(artifact: Artifact, level: str, today: str) -> str:
    """Verify the code of one level under qemu, where that emulates its system."""
    target = {**artifact.manifest.target, "arch": [level]}
    try:
        report = arkinfer.verify(replace(artifact, manifest=replace(artifact.manifest, target=target)))
    except UnsupportedError as error:
        return f"compiled | {MODEL} built; {error.message}, {today}"
    if not report.passed:
        raise SystemExit(f"{level}: {report.summary()}")
    driven = report.evidence.partition(", driven")[1:]
    where = f"qemu's {emulator.PROCESSORS[level].partition(',')[0]}{''.join(driven)}"
    return f"emulated | {MODEL} verified over {report.positions:,} positions on {where}, {today}"


def _on_gpu(artifact: Artifact, level: str, today: str) -> str:
    """Verify on the GPU of this machine, or what the plan computes where there is none."""
    report = arkinfer.verify(artifact)
    if not report.passed:
        raise SystemExit(f"{level}: {report.summary()}")
    device = probe.gpu()
    if report.evidence == "ran" and device is not None:
        return f"ran | {MODEL} verified over {report.positions:,} positions, {device.name}, {today}"
    shown = report.evidence.removeprefix("compiled, ")
    how = f"no GPU: {shown}, {MODEL} verified over {report.positions:,} positions, {today}"
    return f"compiled | {how}"


def _in_place_of_app(artifact: Artifact, today: str) -> str:
    """Verify the form of an MLC package's library that is for this machine."""
    report = arkinfer.verify(artifact)
    if not report.passed:
        raise SystemExit(report.summary())
    shown = report.evidence.removeprefix("compiled, ")
    return f"compiled | no app: {shown}, {MODEL} verified over {report.positions:,} positions, {today}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write it into README.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = "\n".join([HEAD, *(row for name in targets.names() for row in rows(name, Path(folder)))])
    print(table)
    if options.write:
        text = README.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
