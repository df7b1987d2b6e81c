"""What setup.cfg ships is what the tree holds."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

from tree import CODE, ROOT, SHIPPED, files, module, setup_cfg


def test_package_list_equals_the_tree() -> None:
    listed = setup_cfg()["options"]["packages"].split()
    assert len(listed) == len(set(listed))
    assert set(listed) == {module(file) for file in files(*SHIPPED) if file.name == "__init__.py"}


def test_every_module_lies_in_a_package() -> None:
    orphans = [file for file in files(*SHIPPED) if not (file.parent / "__init__.py").is_file()]
    assert not orphans


def test_every_data_file_is_shipped() -> None:
    """A file that setup.cfg's patterns miss works in a checkout and is absent after an installation."""
    patterns = setup_cfg()["options.package_data"]
    shipped = {
        "arkinfer": patterns["arkinfer"].split(),
        "backends": patterns["arkinfer.backends"].split(),
        "exporters": patterns["arkinfer.exporters"].split(),
        "targets": patterns["arkinfer.targets"].split(),
    }
    tracked = subprocess.run(["git", "ls-files", *SHIPPED], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        folder, _, rest = name.partition("/")
        if not name.endswith(".py"):
            assert any(fnmatch(rest, pattern) for pattern in shipped.get(folder, [])), name


def test_folders_are_not_importable_by_their_own_name() -> None:
    """`import backends` would make a second copy of each module, with its own classes."""
    code = "\n".join(f"import {module(file)}" for file in files("targets", "runtime") if file.name != "__main__.py")
    code += f"\nimport sys; print([name for name in {SHIPPED[1:]!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_test_imports_a_folder_by_its_own_name() -> None:
    loaded = {name for name in ("backends", "exporters", "runtime", "targets") if name in sys.modules}
    assert not loaded


def test_files_stay_short() -> None:
    long = {str(file.relative_to(ROOT)): length for file in files(*CODE) if (length := _lines(file)) > 500}
    assert not long


def _lines(file: object) -> int:
    return len(open(str(file), encoding="utf-8").readlines())


def test_no_vague_file_names() -> None:
    vague = {"utils.py", "helpers.py", "common.py", "manager.py", "util.py", "misc.py"}
    assert not [file for file in files(*CODE) if file.name in vague]


def test_sources_of_the_runner_are_found_where_arkinfer_is_installed(tmp_path: Path) -> None:
    """A checkout and an installation differ in where the folders lie; links stand for the latter."""
    package = tmp_path / "arkinfer"
    package.mkdir()
    for place in [*(ROOT / "arkinfer").iterdir(), *(ROOT / name for name in SHIPPED if name != "arkinfer")]:
        (package / place.name).symlink_to(place)
    code = "from arkinfer.exporters import native; print(native.__file__, native.SOURCES / 'engine.c')"
    command = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    loaded, source = map(Path, done.stdout.split())
    assert loaded.is_relative_to(tmp_path) and source.is_relative_to(tmp_path) and source.is_file()


def test_no_process_imports_from_the_folder_that_it_is_started_in() -> None:
    """Without -P, `python -m` takes modules from the current folder first, whoever put them there."""
    assert not [file for file in files(*SHIPPED) if 'sys.executable, "-m"' in file.read_text(encoding="utf-8")]
