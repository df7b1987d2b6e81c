"""Make `.types/arkinfer`, links in the installed shape, so that mypy and pyright see the package as it is imported."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("backends", "exporters", "runtime", "targets")


def main() -> None:
    tree = ROOT / ".types" / "arkinfer"
    tree.mkdir(parents=True, exist_ok=True)
    wanted = {entry.name: entry for entry in (ROOT / "arkinfer").iterdir() if entry.name != "__pycache__"}
    wanted |= {name: ROOT / name for name in FOLDERS}
    for link in tree.iterdir():
        link.unlink()
    for name, place in wanted.items():
        (tree / name).symlink_to(place)


if __name__ == "__main__":
    main()
