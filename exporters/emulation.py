"""Artifacts for aarch64 under qemu: what verification runs where this machine is no such device.

The code of the artifact itself runs, driven by the runner for Linux, each level on a processor with just that level.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import fields, replace
from pathlib import Path

from arkinfer import parity
from arkinfer.artifact import Artifact, manifest
from arkinfer.artifact.manifest import Manifest
from arkinfer.errors import ParityError, UnsupportedError
from arkinfer.exporters import emulator, linker, native, platforms
from arkinfer.exporters.base import StandIn
from arkinfer.exporters.platforms import Platform
from arkinfer.runner import RunnerExecutor
from arkinfer.targets import probe

_LINUX = "linux-aarch64"
_SAMPLE = 96  # tokens that further levels compute as one step, and some more one by one
_SINGLE = 3
_LARGEST_KL = 1e-3  # between levels: the worst row that verification allows where roundings are so rare as here


def stand_in(artifact: Artifact) -> StandIn | None:
    """Return the emulator that runs ``artifact``'s preferred level, or None where its architecture is not emulated.

    Every other level is compared with it over a few tokens. Raises UnsupportedError where that needs something to be
    installed, or where nothing emulates the system; ParityError where two levels differ.
    """
    target = artifact.manifest.target
    levels = list(target["arch"])
    platform = platforms.find(platforms.name_of(levels, target.get("platform")))
    if platform.machine != "aarch64":
        return None
    if platform.system not in ("linux", "android"):
        raise UnsupportedError(
            f"nothing here emulates {platform.name}",
            hint=f"--target {_LINUX} builds the same kernels for Linux, and they are verified under qemu",
            code="ARK-E317",
        )
    if "payload/native.json" not in artifact.manifest.files:
        raise UnsupportedError(
            "without its runner the artifact cannot be emulated",
            hint="build it with `native: true` in the target's file",
            code="ARK-E317",
        )
    first, *others = (_open(artifact, platform, level) for level in levels)
    try:
        for other in others:
            _compare(first, other)
    except BaseException:
        first.close()
        raise
    finally:
        for other in others:
            other.close()
    whose = "" if platform.system == "linux" else ", driven by the runner for Linux"
    return StandIn(first, f"emulated, {' and '.join(levels)} under qemu{whose}")


def _open(artifact: Artifact, platform: Platform, level: str) -> RunnerExecutor:
    """Start the runner on a processor of ``level``."""
    command = emulator.command(emulator.PROCESSORS[level], emulator.root())
    with tempfile.TemporaryDirectory() as folder:  # all is mapped once the runner answers
        place, runner = Path(folder), None
        if not (artifact.path / manifest.NAME).exists():
            artifact = _sealed(artifact, place / "artifact")
        if platform.system != "linux":
            for soname in platform.needed:
                linker.stub(platforms.find(_LINUX), soname, place)
            runner = place / native.COMMAND
            native.fetch(platforms.find(_LINUX), native.COMMAND, runner)
            command += ["-E", f"LD_LIBRARY_PATH={folder}"]
        return RunnerExecutor(artifact, command, probe.cores(), runner=runner)


def _sealed(artifact: Artifact, folder: Path) -> Artifact:
    """Return a copy in ``folder``, by links, of an artifact that has no manifest.json yet: the runner reads one.

    The digest of the weights stays blank; the runner looks at those of the rest when it opens an artifact.
    """
    entries = dict(artifact.manifest.files)
    for name, entry in entries.items():
        place, source = folder / name, artifact.file(name).resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(source)
        if not name.endswith(".safetensors"):
            entries[name] = replace(entry, sha256=hashlib.sha256(source.read_bytes()).hexdigest())
    values = {field.name: getattr(artifact.manifest, field.name) for field in fields(Manifest)}
    for name in ("schema", "files", "digest"):
        del values[name]
    made = Manifest.create(values, entries)
    (folder / manifest.NAME).write_bytes(made.canonical())
    return Artifact(folder, made)


def _compare(first: RunnerExecutor, other: RunnerExecutor) -> None:
    """Raise ParityError unless ``other`` computes what ``first`` does."""
    size = min(_SAMPLE, first.max_context - _SINGLE)
    tokens = [(index * index + 7 * index) % first.vocab_size for index in range(size + _SINGLE)]
    states = [executor.new_state(len(tokens)) for executor in (first, other)]
    steps = [tokens[:size], *([token] for token in tokens[size:])]
    for step in steps:
        ours, theirs = (
            executor.step(step, state, "all") for executor, state in zip((first, other), states, strict=True)
        )
        worst = float(parity.divergence(ours, theirs).max())
        if not worst <= _LARGEST_KL:
            raise ParityError(
                "two levels of the artifact compute different things",
                facts={"levels": f"{first.isa}, {other.isa}", "largest KL": f"{worst:.2e}"},
                hint="report this with the model's config.json",
                code="ARK-E403",
            )
