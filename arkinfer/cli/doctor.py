"""`arkinfer doctor`."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from arkinfer.cli import arguments

if TYPE_CHECKING:
    from arkinfer.targets import Target

UNSUPPORTED = 3
PYTHON = ((3, 11), (3, 14))  # from, below: as setup.cfg declares
SPARE_MEMORY = 1 << 30  # bytes; the bundled models and the compiler fit

# Package -> what needs it. What a device lacks to build does not keep it from running.
PACKAGES: Mapping[str, str] = {
    "numpy": "run",
    "click": "run",
    "PyYAML": "run",
    "tokenizers": "run",
    "minijinja": "run",
    "torch": "build",
}
BACKEND_PACKAGES: Mapping[str, Mapping[str, str]] = {
    "tvm": {"apache-tvm": "run", "apache-tvm-ffi": "run", "ziglang": "build"},
    "cuda": {"cuda-bindings": "target", "triton": "build"},
    "mlc": {"apache-tvm": "build", "apache-tvm-ffi": "build", "ziglang": "build"},
    "onnxruntime": {"onnx": "build", "onnx-ir": "build"},
    "tensorrt": {"cuda-bindings": "target", "onnx": "build", "onnx-ir": "build", "onnxruntime": "build"},
}
# Backends that come as one of several packages: the target names which. One of them builds, too.
_NAMED = ("onnxruntime", "tensorrt")
_BUILDS = ("tensorrt-rtx",)
_BUILD = {
    "tvm": "pip install 'arkinfer[build]'",
    "cuda": "pip install 'arkinfer[build,cuda-build]'",
    "onnxruntime": "pip install 'arkinfer[build,onnx-build]'",
    "tensorrt": "pip install 'arkinfer[build,onnx-build,onnxruntime,tensorrt-rtx]'",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. ``needed_for``: run, build, or "" for facts that nothing depends on."""

    name: str
    value: str
    verdict: Literal["ok", "warning", "missing"]
    needed_for: str = ""
    fix: str = ""


@click.command()
@click.option("--target", metavar="NAME|FILE.yaml", default="cpu", shell_complete=arguments.complete_targets)
@arguments.json_option
@click.pass_context
def command(context: click.Context, target: str, as_json: bool) -> None:
    """Check this machine: can it build for a target, can it run the result, and if not, what would help?

    Exit status 3 says that it can do neither.
    """
    from arkinfer import targets

    chosen = targets.load(target)
    findings = [*_system(), *_packages(chosen), *_tools(chosen), *_target(chosen)]
    lacking = {item.needed_for for item in findings if item.verdict == "missing"}
    abilities = {"run": "run" not in lacking, "build": not lacking & {"build", "run"}}
    if "target" in lacking:  # the compiler is not bound to this machine's processor, the result is
        abilities["run"] = False
    if "exporter" in lacking:
        abilities["build"] = False
    if as_json:
        arguments.print_json({"target": chosen.name, **abilities, "findings": [asdict(item) for item in findings]})
    else:
        _show(findings, abilities, chosen.name)
    context.exit(0 if any(abilities.values()) else UNSUPPORTED)


def _system() -> list[Finding]:
    from arkinfer.targets import probe

    machine = probe.machine()
    low, high = PYTHON
    fits = low <= sys.version_info[:2] < high
    known = bool(machine.levels)
    spare = machine.available >= SPARE_MEMORY
    return [
        Finding(
            "python",
            platform.python_version(),
            "ok" if fits else "missing",
            "run",
            "" if fits else f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}",
        ),
        Finding("system", f"{platform.system()} {machine.architecture}", "ok"),
        Finding("processor", f"{machine.processor}, {machine.cores} cores", "ok"),
        Finding(
            "instruction set",
            ", ".join(machine.levels) or "none that arkinfer knows",
            "ok" if known else "warning",
            "",
            "" if known else "build here, and run on a machine that a target names: arkinfer targets",
        ),
        Finding(
            "memory",
            f"{arguments.size(machine.memory)}, {arguments.size(min(machine.available, machine.memory))} free",
            "ok" if spare else "warning",
            "",
            "" if spare else "close other programs before a build",
        ),
    ]


def _packages(target: Target) -> list[Finding]:
    from arkinfer.targets.versions import within

    findings = []
    listed = target.toolchain if target.backend in _NAMED else ()
    named = {name: "build" if name in _BUILDS else "target" for name in listed}
    for name, purpose in {**PACKAGES, **BACKEND_PACKAGES.get(target.backend, {}), **named}.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed", "missing", purpose, _fix(target, purpose, name)))
            continue
        wanted = target.toolchain.get(name, "")
        if wanted and not within(version, wanted):
            fix = "install JetPack 7.2 or newer" if name == "tensorrt" else f"pip install '{name}{wanted}'"
            findings.append(Finding(name, f"{version}, but the target wants {wanted}", "missing", purpose, fix))
        else:
            findings.append(Finding(name, version, "ok", purpose))
    return findings


def _fix(target: Target, purpose: str, name: str = "") -> str:
    if name == "tensorrt":
        return "on the device: sudo apt install python3-libnvinfer, and python3 -m venv --system-site-packages"
    if purpose == "build":
        return _BUILD.get(target.backend, _BUILD["tvm"])
    extra = next(iter(target.toolchain), "") if target.backend in _NAMED else target.backend
    return f"pip install 'arkinfer[runtime,{extra}]'"


def _tools(target: Target) -> list[Finding]:
    if target.backend == "mlc":
        return [_mlc()]
    if target.backend != "tvm":
        return [*_board(), _driver()] if any(level.startswith("sm_") for level in target.arch) else []
    linker = importlib.util.find_spec("ziglang") is not None
    package = importlib.util.find_spec("tvm")
    roots = list(package.submodule_search_locations or ()) if package is not None else []
    library = next((file for root in roots for file in Path(root).glob("**/libtvm_runtime.*")), None)
    return [
        Finding(
            "linker",
            "ld.lld of ziglang" if linker else "none",
            "ok" if linker else "missing",
            "build",
            "" if linker else _fix(target, "build"),
        ),
        Finding(
            "tvm runtime",
            library.name if library else "none",
            "ok" if library else "missing",
            "run",
            "" if library else _fix(target, "run"),
        ),
        *_emulator(target),
    ]


def _emulator(target: Target) -> list[Finding]:
    """Look for what verifies code for aarch64 where this machine does not run it."""
    from arkinfer.errors import UnsupportedError
    from arkinfer.exporters import emulator
    from arkinfer.targets import probe

    if probe.level_for(target) is not None or not set(target.arch) & set(emulator.PROCESSORS):
        return []
    try:
        found = emulator.command("max", emulator.root())[0]
    except UnsupportedError as error:
        return [Finding("emulator", error.message, "warning", "", error.hint)]
    return [Finding("emulator", found, "ok")]


def _mlc() -> Finding:
    """Look for MLC's own Python package, which is on no registry."""
    try:
        value = metadata.version("mlc-llm")
    except metadata.PackageNotFoundError:
        value = "not installed; arkinfer needs none of it, whoever builds the app does (from MLC's sources)"
    return Finding("mlc-llm", value, "ok")


def _board() -> list[Finding]:
    from arkinfer.targets import probe

    release = probe.jetson()
    return [] if release is None else [Finding("Jetson", release, "ok")]


def _driver() -> Finding:
    from arkinfer.targets import probe

    device = probe.gpu()
    if device is not None:
        value = f"{device.name} ({device.level}), {arguments.size(device.memory)}, driver for CUDA {device.cuda}"
        return Finding("GPU", value, "ok", "target")
    value = "the driver shows none" if probe.cuda_driver() is not None else "no NVIDIA driver (libcuda.so.1)"
    return Finding("GPU", value, "missing", "target", "build here and run the artifact on a machine that has one")


def _target(target: Target) -> list[Finding]:
    from arkinfer import exporters
    from arkinfer.targets import probe

    level = probe.level_for(target)
    exporter = target.backend in exporters.EXPORTERS
    return [
        Finding(
            f"target {target.name}",
            f"this machine runs its {level} code" if level else f"made for {', '.join(target.arch)}",
            "ok" if level else "missing",
            "target",
            "" if level else "build here and run the artifact on such a machine",
        ),
        Finding(
            f"exporter {target.backend}",
            "present" if exporter else "not in this version of arkinfer",
            "ok" if exporter else "missing",
            "exporter",
            "" if exporter else "choose another target: arkinfer targets",
        ),
    ]


def _show(findings: list[Finding], abilities: Mapping[str, bool], target: str) -> None:
    width = max(len(item.name) for item in findings)
    for item in findings:
        click.echo(f"{item.verdict:<8} {item.name:<{width}}  {item.value}")
        if item.fix:
            click.echo(f"{'':<8} {'':<{width}}  try  {item.fix}")
    click.echo()
    for name, able in abilities.items():
        click.echo(f"{name:<6} {'yes' if able else 'no'}  ({target})")
