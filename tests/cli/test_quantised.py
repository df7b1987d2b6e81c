"""Building what others quantised: one checkpoint of each format, through the command line, verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arkinfer.artifact import Artifact
from tests.checkpoint.quantised import SCHEMES, write_quantised
from tests.checkpoints import CONFIGS
from tests.cli.conftest import Arkinfer


@pytest.mark.parametrize(
    ("model", "name", "method", "attention"),
    [
        ("llama", "gptq-act-order", "gptq", "auto"),
        ("qwen3", "awq", "awq", "auto"),
        # Dense: on one random layer, rounding the activations tips blocks in and out of the sparse gear's choice, and
        # the same values in a float checkpoint fail their gate too.
        ("minicpm", "marlin-cpmcu", "marlin", "dense"),
        ("llama", "packed-int4", "compressed-tensors", "auto"),
    ],
)
def test_a_quantised_checkpoint_builds_and_passes_its_gate(
    arkinfer: Arkinfer, tmp_path: Path, model: str, name: str, method: str, attention: str
) -> None:
    raw = CONFIGS[model] | {"num_hidden_layers": 1}
    write_quantised(tmp_path / model, raw, SCHEMES[name])
    done = arkinfer("build", str(tmp_path / model), "-o", str(tmp_path / "out.ark"), "--attention", attention, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["parity"]["passed"]
    manifest = Artifact.open(tmp_path / "out.ark").manifest
    assert manifest.weights == "int4"
    stored = {key: layout for key, layout in manifest.model["recipe"]["layouts"].items() if "_proj." in key}
    assert {layout.get("scheme", "") for key, layout in stored.items() if key.endswith("weight")} == {method}


def test_what_is_not_read_is_said_before_anything_is_built(arkinfer: Arkinfer, tmp_path: Path) -> None:
    write_quantised(tmp_path / "model", CONFIGS["llama"] | {"num_hidden_layers": 1}, SCHEMES["gptq"])
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = arkinfer("build", str(tmp_path / "model"), "-o", str(tmp_path / "out.ark"))
    assert done.status == 3
    assert "error ARK-E313: this checkpoint is quantised with 'bitsandbytes'" in done.err + done.out
    assert not (tmp_path / "out.ark").exists()
