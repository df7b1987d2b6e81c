"""How weights are stored, as a user says it: options, rules, and a target's defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.artifact import samples
from tests.checkpoints import CONFIGS, write_checkpoint
from tests.cli.conftest import Arkinfer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("model") / "llama", CONFIGS["llama"]))


@pytest.fixture
def board(tmp_path: Path) -> str:
    target = tmp_path / "board.yaml"
    target.write_text(
        "extends: cpu\ndescription: A board\narch: [x86-64-v3]\n"
        'defaults: {weights: int4, kv: fp32, group: 32, head: int4, rules: ["*.v_proj.*=int8", "layers.0.*=int4:64"]}\n'
    )
    return str(target)


def test_a_mixed_recipe_becomes_a_verified_artifact(arkinfer: Arkinfer, model: str, board: str, tmp_path: Path) -> None:
    out = str(tmp_path / "mixed.ark")
    done = arkinfer("build", model, "--target", board, "-o", out, "--json")
    assert done.status == 0, done.err
    facts = json.loads(done.out)
    assert facts["parity"]["passed"]
    assert facts["quality"]["format"] == "int4" and facts["quality"]["positions"] > 1000
    stored = [line for line in arkinfer("inspect", out, "--graph").out.splitlines() if line.startswith("input")]

    def line(part: str) -> str:
        return next(text for text in stored if part in text)

    assert "int8 model.layers.1.self_attn.v_proj.weight" in line("layers_1_self_attn_v_proj_weight")
    assert "float16[128, 6]" in line("layers_1_mlp_down_proj_weight_scales")
    assert "float16[128, 3]" in line("layers_0_mlp_down_proj_weight_scales")
    assert "int4 model.embed_tokens.weight" in line("embed_tokens_weight")

    # The same graph again, so nothing is compiled: by the other method, and not measured.
    options = ("--target", board, "-o", out, "--force", "--verify", "none")
    done = arkinfer("build", model, *options, "--method", "pgptq", "--quality", "on", "--json")
    assert done.status == 0, done.err
    corrected = json.loads(done.out)["quality"]
    assert corrected["data"] == facts["quality"]["data"] and corrected["mean_kl"] < facts["quality"]["mean_kl"]
    shown = arkinfer("inspect", out).out
    assert "pgptq" in shown and "*.v_proj.*=int8, layers.0.*=int4:64" in shown
    assert f"KL {corrected['mean_kl']:.4f}" in shown and "chinese" in shown and ".scratch" not in shown
    assert (not corrected["faults"]) == ("WARNING" not in shown)
    done = arkinfer("build", model, *options)
    assert done.status == 0 and "quality not measured" in done.out and "--quality on" in done.out


def test_wrong_wishes_end_with_an_explanation(arkinfer: Arkinfer, model: str, tmp_path: Path) -> None:
    out = tmp_path / "never.ark"
    for arguments, status, words in (
        (("--rule", "*.down_proj.*=int3"), 1, "int4:32"),
        (("--rule", "*.downproj.*=int4"), 1, "mlp.down_proj.weight"),
        (("--group", "32"), 1, "changes nothing"),
        (("--group", "48"), 2, "128"),
        (("--weights", "fp16", "--method", "pgptq"), 1, "changes nothing"),
    ):
        done = arkinfer("build", model, "-o", str(out), *arguments)
        assert done.status == status and words in done.err, (arguments, done.err)
    assert not out.exists()


@pytest.mark.parametrize(
    ("quality", "words"),
    [
        ({"lossless": True}, "lossless"),
        (None, "not measured"),
        ({"mean_kl": 0.2, "top1": 0.5, "ratio": 2.0, "positions": 9, "faults": ["much"], "format": "int4"}, "WARNING"),
        ({"mean_kl": "x", "top1": [], "texts": [1, 2], "faults": "no"}, "KL nan"),
        ({"texts": {"a": 1, "b": None}, "faults": [1, {}]}, "top-1 nan%"),
    ],
)
def test_whatever_an_artifact_says_of_its_quality_is_shown(
    arkinfer: Arkinfer, tmp_path: Path, quality: dict[str, object] | None, words: str
) -> None:
    artifact = samples.write(tmp_path / "sample.ark", quality=quality)
    done = arkinfer("inspect", str(artifact.path))
    assert done.status == 0 and words in done.out, done.err
