"""Marlin checkpoints, of AutoGPTQ and of CPM.cu, against a writer made from the published layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer.errors import ArkError, UnsupportedError, UserError
from tests.checkpoint import packers
from tests.checkpoint.opening import CONFIG, module, multiplied, one, recognised

GPTQ: dict[str, Any] = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq",
}  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    groups=st.sampled_from([(-1, 64), (-1, 128), (128, 128), (128, 256), (64, 192), (16, 64)]),
    rows=st.sampled_from([64, 128, 192]),
    names=st.sampled_from([("qweight", "scales"), ("B", "s")]),
)
def test_every_value_is_the_packers(seed: int, groups: tuple[int, int], rows: int, names: tuple[str, str]) -> None:
    size, width = groups
    drawn = packers.draw(seed, rows, width, 4, size, symmetric=True)
    stored, values = one(packers.marlin(drawn, names), GPTQ | {"group_size": size})
    assert np.array_equal(values, drawn.matrix)
    layout = stored.layout
    assert (layout.format, layout.shape, layout.scheme, layout.zeros) == ("int4", (rows, width), "marlin", False)


def test_joined_layers_come_apart(tmp_path: Path) -> None:
    """CPM.cu's layout: the config's head counts say where q, k and v begin."""
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    rows = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
    parts = {f"{attention}.{name}": packers.draw(i, n, 128, 4, 128, True) for i, (name, n) in enumerate(rows.items())}
    gates = {f"{mlp}.{name}": packers.draw(len(name), 192, 128, 4, 128, True) for name in ("gate_proj", "up_proj")}
    tensors = module(f"{attention}.qkv_proj", packers.marlin(packers.joined(list(parts.values()))))
    tensors |= module(f"{mlp}.gate_up_proj", packers.marlin(packers.joined(list(gates.values()))))
    tensors[f"{attention}.qkv_proj.bias"] = np.arange(256, dtype=np.float16)
    found = recognised(tensors, GPTQ, tmp_path)
    biases = {f"{attention}.{name}.bias" for name in rows}
    assert set(found) == {f"{name}.weight" for name in parts | gates} | biases
    for name, drawn in (parts | gates).items():
        assert np.array_equal(multiplied(found[f"{name}.weight"]), drawn.matrix), name
    assert found[f"{attention}.k_proj.bias"].rows(0, 64).weight.tolist() == list(range(128, 192))
    whole = sum(tensors[f"{attention}.qkv_proj.{name}"].nbytes for name in ("qweight", "scales"))
    assert sum(found[f"{attention}.{name}.weight"].nbytes for name in rows) == whole
    with pytest.raises(UserError, match="does not have the rows of the layers it joins"):
        recognised(tensors, GPTQ, tmp_path, dataclasses.replace(CONFIG, kv_heads=4))
    tensors[f"{attention}.k_proj.weight"] = np.zeros((64, 128), np.float16)
    with pytest.raises(UserError, match=r"k_proj\.weight is there twice"):
        recognised(tensors, GPTQ, tmp_path)


@pytest.mark.parametrize(
    ("changed", "kind", "match"),
    [
        ({"bits": 8}, UnsupportedError, "Marlin with 8 bits"),
        ({"desc_act": True}, UserError, "neither act-order nor zero points"),
        ({"sym": False}, UserError, "neither act-order nor zero points"),
        ({"group_size": 32}, UserError, "scales has the wrong shape"),
        ({"quant_method": "awq"}, UserError, "packed as Marlin"),
    ],
)
def test_settings_that_do_not_fit(changed: dict[str, Any], kind: type[ArkError], match: str) -> None:
    with pytest.raises(kind, match=match):
        one(packers.marlin(packers.draw(1, 64, 256, 4, 128, True)), GPTQ | changed)


def test_damaged_tensors_are_named() -> None:
    sound = packers.marlin(packers.draw(2, 64, 256, 4, 128, True), ("B", "s"))
    with pytest.raises(UserError, match=r"lm_head\.s has the wrong shape"):
        one(sound | {"s": sound["s"][:1].copy()}, GPTQ)
    with pytest.raises(UserError, match=r"lm_head\.B has the wrong shape"):
        one(sound | {"B": sound["B"][:, :-1].copy()}, GPTQ)
    with pytest.raises(UserError, match=r"lm_head\.s is not a multiple of 64 wide"):
        one({"B": sound["B"][:, :96].copy(), "s": sound["s"][:, :48].copy()}, GPTQ)
    with pytest.raises(UserError, match=r"lm_head\.B has a dtype"):
        one(sound | {"B": sound["B"].astype(np.int64)}, GPTQ)
    with pytest.raises(UserError, match=r"lm_head\.B is no matrix"):
        one(sound | {"B": sound["B"].reshape(-1)}, GPTQ)
