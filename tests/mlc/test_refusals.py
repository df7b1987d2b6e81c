"""What MLC's cache or apps cannot do is refused by name, with the way out, by plan and by build."""

from __future__ import annotations

from pathlib import Path

import pytest

from arkinfer.cli import main
from tests.checkpoints import CONFIGS, write_checkpoint


def test_sparse_attention_is_refused_and_dense_is_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_checkpoint(tmp_path / "sparse", CONFIGS["minicpm"])
    with pytest.raises(SystemExit) as left:
        main(["build", str(folder), "--target", "mlc-android", "-o", str(tmp_path / "a.ark")])
    assert left.value.code == 3 and not (tmp_path / "a.ark").exists()
    shown = capsys.readouterr().err
    assert "ARK-E302" in shown and "--attention dense" in shown and "--target android" in shown
    with pytest.raises(SystemExit) as left:
        main(["plan", str(folder), "--target", "mlc-android"])
    assert left.value.code == 3
    with pytest.raises(SystemExit) as left:
        main(["plan", str(folder), "--target", "mlc-android", "--attention", "dense"])
    assert left.value.code == 0


@pytest.mark.parametrize(
    ("lines", "options", "reason"),
    [
        ("arch: [aarch64-i8mm, aarch64-dotprod]", [], "must name one level"),
        ("platform: linux-aarch64", [], "MLC packages are for the platforms"),
        ("description: Mine", ["--kv", "int8"], "not int8"),
    ],
)
def test_what_an_app_cannot_link_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, lines: str, options: list[str], reason: str
) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text(f"extends: mlc-android\n{lines}\n", encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        main(["plan", "tiny-minicpm", "--target", str(target), *options])
    assert left.value.code == 3 and reason in capsys.readouterr().out
