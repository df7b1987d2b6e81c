"""What starting up loads. Modules are counted, not milliseconds: a count does not depend on how busy the machine is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from tree import ROOT, files, module

import arkinfer

HEAVY = ("torch", "onnx", "onnxruntime", "tvm", "tvm_ffi", "triton", "transformers", "tokenizers", "minijinja", "sympy")

_HELP = """
from arkinfer.cli import COMMANDS, main
for arguments in [["--help"], *([name, "--help"] for name in COMMANDS)]:
    try:
        main(arguments)
    except SystemExit as exit:
        assert not exit.code, arguments
"""
_REPORT = "\nimport json, sys; print('\\n' + json.dumps(sorted(sys.modules)), file=sys.stderr)"


@cache
def _modules(code: str, folder: Path) -> tuple[frozenset[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}{_REPORT}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return frozenset(json.loads(done.stderr.splitlines()[-1])), done.stdout


def _loaded(code: str, folder: Path) -> tuple[frozenset[str], str]:
    """Return the modules that ``code`` loads beyond those of a bare interpreter, and what it prints."""
    bare, _ = _modules("", folder)
    modules, text = _modules(code, folder)
    return modules - bare, text


def test_import_loads_little(tmp_path: Path) -> None:
    modules, _ = _loaded("import arkinfer", tmp_path)
    assert not modules.intersection((*HEAVY, "numpy", "yaml", "click"))
    assert len(modules) < 60  # 1 of ours, the rest pathlib and its like


def test_help_of_every_command_loads_little(tmp_path: Path) -> None:
    modules, text = _loaded(_HELP, tmp_path)
    assert text.count("Usage: arkinfer") > 8
    assert not modules.intersection(HEAVY)
    assert len(modules) < 400


def test_public_names_are_lazy(tmp_path: Path) -> None:
    modules, text = _loaded("import arkinfer; print(arkinfer.Target.__name__, arkinfer.Artifact.__name__)", tmp_path)
    assert text.split() == ["Target", "Artifact"]
    assert not modules.intersection(HEAVY)


def test_public_names_exist() -> None:
    """Read, not imported: loading torch to look for a name takes longer than all other guards together."""
    assert set(arkinfer.__all__) <= {*arkinfer._PUBLIC, "__version__"}
    sources = {module(file): file.read_text(encoding="utf-8") for file in files("arkinfer", "runtime", "targets")}
    for place, name in arkinfer._PUBLIC.values():
        assert (
            re.search(rf"^(def|class) {name}\b|^from .* import .*\b{name}\b", sources[place], re.MULTILINE) or not name
        )


def test_device_side_loads_no_torch(tmp_path: Path) -> None:
    """What a device imports to run an artifact; torch is not installed there."""
    modules, _ = _loaded("import arkinfer.runtime.engine, arkinfer.backends.tvm", tmp_path)
    assert not modules.intersection(("torch", "onnx", "tvm", "triton", "transformers", "sympy"))


def test_plan_loads_neither_torch_nor_a_compiler(tmp_path: Path) -> None:
    code = "from arkinfer import planning, rates; planning.plan('tiny-bitcpm')"
    modules, _ = _loaded(code, tmp_path)
    assert not modules.intersection(HEAVY)


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'bild'"):
        _ = arkinfer.bild  # type: ignore[attr-defined]
