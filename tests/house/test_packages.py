"""What setup.cfg ships is what the tree holds."""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatch

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
