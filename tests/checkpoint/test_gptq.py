"""GPTQ checkpoints against a writer made from the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from arkinfer.artifact.tensors import read_header
from arkinfer.checkpoint import layouts
from arkinfer.checkpoint.quantization import Quantization
from arkinfer.errors import ArkError, UnsupportedError, UserError
from tests.checkpoint import packers
from tests.checkpoint.opening import CONFIG, module, multiplied, one, recognised

FORMATS = {2: "int2", 3: "int4", 4: "int4", 8: "int8"}


def stated(bits: int, size: int, version: int = 1, **more: Any) -> dict[str, Any]:
    formats = {1: "gptq", 2: "gptq_v2"}
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": formats[version], **more}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    size=st.sampled_from([-1, 16, 32, 64, 128]),
    width=st.sampled_from([32, 64, 96, 160, 192]),
    rows=st.sampled_from([32, 64, 96]),
    act_order=st.booleans(),
    version=st.sampled_from([1, 2]),
)
def test_every_value_is_the_packers(
    seed: int, bits: int, symmetric: bool, size: int, width: int, rows: int, act_order: bool, version: int
) -> None:
    drawn = packers.draw(seed, rows, width, bits, size, symmetric, act_order)
    tensors = packers.gptq(drawn, version)
    stored, values = one(tensors, stated(bits, size, version, sym=symmetric, desc_act=act_order))
    assert np.array_equal(values, drawn.matrix)
    layout = stored.layout
    assert (layout.format, layout.shape, layout.scheme, layout.bits) == (FORMATS[bits], (rows, width), "gptq", bits)
    assert layout.zeros == (drawn.zeros != 1 << bits >> 1).any()
    assert bool(layout.order) == (np.diff(drawn.group) < 0).any()
    assert stored.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_sides_that_do_not_fill_a_word() -> None:
    drawn = packers.draw(18, 45, 84, 4, 28, symmetric=False, act_order=True)
    _, values = one(packers.gptq(drawn), stated(4, 28, desc_act=True))
    assert np.array_equal(values, drawn.matrix)
    with pytest.raises(UnsupportedError, match="not a multiple of 32"):
        one(packers.gptq(packers.draw(19, 45, 64, 3, 32, True)), stated(3, 32))


def test_v2_holds_zero_points_of_zero() -> None:
    drawn = packers.draw(1, 32, 64, 4, 32, symmetric=False)
    drawn.zeros[::3] = 0
    _, values = one(packers.gptq(drawn, 2), stated(4, 32, 2))
    assert np.array_equal(values, drawn.matrix)


def test_no_version_stated_is_the_first() -> None:
    drawn = packers.draw(2, 32, 64, 4, 32, symmetric=False)
    _, values = one(packers.gptq(drawn), {"bits": 4, "group_size": 32, "desc_act": False})
    assert np.array_equal(values, drawn.matrix)


def test_equal_orders_have_equal_digests() -> None:
    first = packers.draw(3, 32, 64, 4, 16, True, act_order=True)
    second = packers.draw(4, 32, 64, 4, 16, True, act_order=True)
    digests = [one(packers.gptq(drawn), stated(4, 16))[0].layout.order for drawn in (first, first, second)]
    assert digests[0] == digests[1] != digests[2]


def test_without_index_groups_follow_each_other(tmp_path: Path) -> None:
    drawn = packers.draw(5, 32, 64, 4, 32, True)
    tensors = packers.gptq(drawn, index=False)
    assert np.array_equal(one(tensors, stated(4, 32))[1], drawn.matrix)
    with pytest.raises(UserError, match=r"g_idx is missing.*desc_act"):
        one(tensors, stated(4, 32, desc_act=True))


def test_modules_with_settings_of_their_own(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: the tensors tell the bits and the group."""
    drawn = {
        "lm_head": packers.draw(6, 32, 64, 8, 16, True, act_order=True),
        "model.layers.0.mlp.up_proj": packers.draw(7, 32, 96, 4, 32, False),
        "model.layers.0.mlp.down_proj": packers.draw(8, 32, 64, 3, -1, True),
    }
    tensors = {key: value for name, item in drawn.items() for key, value in module(name, packers.gptq(item)).items()}
    found = recognised(tensors, stated(4, 32, dynamic={"+:.*down.*": {"bits": 3}}), tmp_path)
    for name, item in drawn.items():
        assert np.array_equal(multiplied(found[f"{name}.weight"]), item.matrix)


@pytest.mark.parametrize(("symmetric", "act_order"), [(True, False), (False, True)])
def test_headers_alone_say_what_the_settings_say(tmp_path: Path, symmetric: bool, act_order: bool) -> None:
    drawn = packers.draw(17, 32, 64, 4, 32, symmetric, act_order)
    file = tmp_path / "model.safetensors"
    save_file(module("lm_head", packers.gptq(drawn)), file)
    entries = read_header(file)
    file.unlink()
    settings = Quantization.read({"quantization_config": stated(4, 32, sym=symmetric, desc_act=act_order)})
    layout = layouts.recognise(entries, settings, CONFIG, [])["lm_head.weight"].layout
    assert (layout.format, layout.shape, layout.group) == ("int4", (32, 64), 32)
    assert (layout.zeros, bool(layout.order)) == (not symmetric, act_order)


def test_a_bias_is_an_ordinary_weight(tmp_path: Path) -> None:
    tensors = packers.gptq(packers.draw(9, 32, 64, 4, 32, True)) | {"bias": np.arange(32, dtype=np.float16)}
    name = "model.layers.0.self_attn.q_proj"
    found = recognised(module(name, tensors), stated(4, 32), tmp_path)
    assert set(found) == {f"{name}.weight", f"{name}.bias"}
    assert found[f"{name}.bias"].layout.format == "dense"


def test_what_is_not_the_models_is_passed_over_and_said(tmp_path: Path) -> None:
    tensors = module("lm_head", packers.gptq(packers.draw(10, 32, 64, 4, 32, True)))
    tensors |= module("eagle.fc", packers.gptq(packers.draw(11, 32, 64, 4, 32, True)))
    tensors |= module("model.layers.9.mlp.up_proj", packers.gptq(packers.draw(12, 32, 64, 4, 32, True)))
    tensors["model.layers.0.self_attn.position_ids"] = np.arange(8)
    notes: list[str] = []
    found = recognised(tensors, stated(4, 32, colour="red"), tmp_path, notes=notes)
    assert set(found) == {"lm_head.weight"}
    assert notes == [
        "9 tensors are not the model's and were not read, the first eagle.fc.g_idx",
        "quantization_config has settings that arkinfer does not know: colour",
    ]


def _damage(kind: str, tensors: dict[str, np.ndarray]) -> None:
    if kind == "codes cut":
        tensors["qweight"] = tensors["qweight"][:-1].copy()
    elif kind == "scales cut":
        tensors["scales"] = tensors["scales"][:-1].copy()
    elif kind == "scales narrow":
        tensors["scales"] = tensors["scales"][:, :-1].copy()
    elif kind == "zeros cut":
        tensors["qzeros"] = tensors["qzeros"][:, :-1].copy()
    elif kind == "zeros a vector":
        tensors["qzeros"] = tensors["qzeros"].reshape(-1)
    elif kind == "scales integers":
        tensors["scales"] = tensors["scales"].astype(np.int32)
    elif kind == "codes wide":
        tensors["qweight"] = tensors["qweight"].astype(np.int64)
    elif kind == "index short":
        tensors["g_idx"] = tensors["g_idx"][:-9].copy()
    elif kind == "index wide":
        tensors["g_idx"] = tensors["g_idx"].astype(np.int64)
    elif kind == "index a matrix":
        tensors["g_idx"] = tensors["g_idx"][None].copy()
    elif kind == "group absent":
        tensors["g_idx"][5] = 77
    elif kind == "group negative":
        tensors["g_idx"][5] = -1
    elif kind == "group large":
        tensors["g_idx"][40] = 0
    elif kind == "nothing":
        tensors |= {"qweight": np.zeros((0, 32), np.int32), "g_idx": np.zeros(0, np.int32)}
    elif kind == "codes absent":
        del tensors["qweight"]
    elif kind == "scales absent":
        del tensors["scales"]
    elif kind == "twice":
        tensors["weight"] = np.zeros((32, 64), np.float16)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("codes cut", r"lm_head\.qweight has the wrong shape"),
        ("scales cut", r"lm_head\.scales has the wrong shape"),
        ("scales narrow", r"lm_head\.scales has the wrong shape"),
        ("zeros cut", r"lm_head\.qzeros has the wrong shape"),
        ("zeros a vector", r"lm_head\.qzeros has the wrong shape"),
        ("scales integers", r"lm_head\.scales has a dtype"),
        ("codes wide", r"lm_head\.qweight has a dtype"),
        ("index short", r"lm_head\.qweight has the wrong shape"),
        ("index wide", r"lm_head\.g_idx has a dtype"),
        ("index a matrix", r"lm_head\.g_idx is no vector"),
        ("group absent", r"lm_head\.g_idx names a group that there is not"),
        ("group negative", r"lm_head\.g_idx names a group that there is not"),
        ("group large", r"lm_head\.g_idx gives group 0 33 inputs"),
        ("nothing", "lm_head is empty"),
        ("codes absent", "stored as integers"),
        ("scales absent", "stored as integers"),
        ("twice", r"lm_head\.weight is there twice"),
    ],
)
def test_damaged_tensors_are_named(kind: str, match: str) -> None:
    tensors = packers.gptq(packers.draw(13, 32, 64, 4, 32, False))
    _damage(kind, tensors)
    with pytest.raises(UserError, match=match):
        one(tensors, stated(4, 32))


@pytest.mark.parametrize(
    ("changed", "kind", "match"),
    [
        ({"bits": 8}, UserError, "qweight has the wrong shape"),
        ({"bits": 5}, UnsupportedError, "GPTQ with 5 bits"),
        ({"bits": "four"}, UserError, "`bits` that is not an integer"),
        ({"bits": None}, UnsupportedError, "unstated number of bits"),
        ({"group_size": 64}, UserError, "scales has the wrong shape"),
        ({"group_size": 0}, UserError, "impossible group size"),
        ({"checkpoint_format": "marlin"}, UnsupportedError, "layout 'marlin'"),
        ({"checkpoint_format": "gptq_p"}, UnsupportedError, "layout 'gptq_p'"),
        ({"quant_method": "awq"}, UserError, "packed as GPTQ, and config.json says otherwise"),
        ({"quant_method": "bitsandbytes"}, UnsupportedError, "'bitsandbytes'"),
        ({"quant_method": "fp8"}, UnsupportedError, "'fp8'"),
        ({"quant_method": 4}, UserError, "is not a name"),
    ],
)
def test_settings_that_do_not_fit(changed: dict[str, Any], kind: type[ArkError], match: str) -> None:
    tensors = packers.gptq(packers.draw(14, 32, 64, 4, 32, False))
    with pytest.raises(kind, match=match):
        one(tensors, stated(4, 32) | changed)


def test_no_settings_at_all() -> None:
    with pytest.raises(UserError, match="packed as GPTQ"):
        one(packers.gptq(packers.draw(15, 32, 64, 4, 32, False)), None)


def test_a_last_group_that_no_kernel_divides() -> None:
    tensors = packers.gptq(packers.draw(16, 32, 72, 4, 64, False))
    with pytest.raises(UnsupportedError, match="groups of 64 and a last one of 8"):
        one(tensors, stated(4, 64))
