"""GGUF files written by the gguf package, read to the bit, and built into artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from arkinfer.checkpoint import open_checkpoint
from arkinfer.checkpoint.gguf import GgufCheckpoint
from arkinfer.checkpoint.gguf_file import GgufTensor
from arkinfer.errors import ArkError, UserError
from arkinfer.quant.packed import dense, dequantise, read
from tests.checkpoint.gguf_writer import Q, write_gguf
from tests.checkpoints import CONFIGS, write_checkpoint

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # TQ blocks hold 256 weights
FACTORS = [1.0 + 0.25 * pair for pair in range(32)]
LONGROPE = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": [2 * value for value in FACTORS],
            "original_max_position_embeddings": 1024}  # fmt: skip


def source(folder: Path, family: str, **changes: Any) -> Path:
    raw = {name: value for name, value in CONFIGS[family].items() if name != "sparse_config"}
    return write_checkpoint(folder, {**raw, **WIDE, "attention_bias": False, **changes}, ternary=changes.get("t", 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("minicpm"), "minicpm", rope_scaling=LONGROPE)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0", "TQ1_0", "TQ2_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_value_is_what_the_gguf_package_reads(kind: str, folder: Path, tmp_path: Path) -> None:
    expected = write_gguf(folder, tmp_path / "model.gguf", default=Q[kind])
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.weights.keys() == expected.keys()
    for name, weight in checkpoint.weights.items():
        values = dense(weight).float().numpy()
        assert np.array_equal(values, expected[name]), name
        if values.ndim == 2:
            part = read(weight, 13, 77)
            found = part.weight.float() if part.format == "dense" else dequantise(part)
            assert np.array_equal(found.numpy(), expected[name][13:77]), name


@pytest.mark.parametrize(
    ("kind", "format", "group", "dtype"),
    [
        ("Q4_0", "int4", 32, "F16"), ("Q8_0", "int8", 32, "F16"), ("TQ1_0", "ternary", 256, "F16"),
        ("TQ2_0", "ternary", 256, "F16"), ("Q5_1", "dense", 0, "F32"), ("F16", "dense", 0, "F16"),
    ],
)  # fmt: skip
def test_integers_and_scales_are_kept(
    kind: str, format: str, group: int, dtype: str, folder: Path, tmp_path: Path
) -> None:
    write_gguf(folder, tmp_path / "model.gguf", default=Q[kind])
    layout = open_checkpoint(tmp_path / "model.gguf").weight("model.layers.1.mlp.down_proj.weight").layout
    assert (layout.format, layout.group, layout.dtype, layout.shape) == (format, group, dtype, (256, 512))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_types_that_are_multiplied_out(kind: str, folder: Path, tmp_path: Path) -> None:
    """The package reads these and does not write them: random blocks with finite scales."""
    write_gguf(folder, tmp_path / "model.gguf", {"token_embd": Q.F16}, Q.Q8_0)
    block, width = gguf.GGML_QUANT_SIZES[Q[kind]]
    data = np.random.default_rng(0).integers(0, 60, (400, 256 // block * width), dtype=np.uint8)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "minicpm")
    for field in reader.fields.values():
        if field.name.startswith("minicpm."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            writer.add_tensor(tensor.name, data, raw_dtype=Q[kind])
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "other.gguf")
    weight = checkpoint.weight("model.embed_tokens.weight")
    assert np.array_equal(weight.rows(7, 90).weight, gguf.quants.dequantize(data, Q[kind])[7:90])
    assert any(kind in note for note in checkpoint.config.notes)


@pytest.mark.parametrize("family", ["llama", "minicpm", "qwen3"])
def test_config_says_what_the_folder_said(family: str, tmp_path: Path) -> None:
    changes = {"rope_scaling": LONGROPE} if family == "minicpm" else {"rope_theta": 500000.0}
    original = source(tmp_path / family, family, **changes)
    write_gguf(original, tmp_path / "model.gguf")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    found, wanted = vars(checkpoint.config), vars(open_checkpoint(original).config)
    for name in set(found) - {"notes", "dtype"}:
        assert found[name] == wanted[name], name
    assert checkpoint.name == "model"


def test_llama3_factors(tmp_path: Path) -> None:
    original = source(tmp_path / "llama", "llama", num_hidden_layers=1)
    write_gguf(original, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    for field in reader.fields.values():
        if field.name.startswith("llama."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("rope_freqs.weight", np.array(FACTORS, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rope = open_checkpoint(tmp_path / "b.gguf").config.rope
    plain = open_checkpoint(tmp_path / "a.gguf").config.rope
    expected = plain.inverse_frequencies(64, 1024) / np.array(FACTORS, np.float32)
    np.testing.assert_allclose(rope.inverse_frequencies(64, 1024), expected, rtol=1e-6)
    assert rope.magnitude(1024) == 1.0


def test_tokenizer_settings_and_template(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "model.gguf")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    data = checkpoint.asset("tokenizer.json")
    assert data is not None
    ours, theirs = Tokenizer.from_str(data.decode()), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("the ferry left", "  two  spaces\n\n", "日本 🙂 x=1;", "<|im_start|>user\nhi<|im_end|>", "it's 1234"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids
        ids = theirs.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode("a").ids[0] == 1
    settings = checkpoint.json_asset("tokenizer_config.json")
    assert settings["chat_template"] == json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert (settings["bos_token"], settings["eos_token"], settings["add_bos_token"]) == ("<s>", "</s>", True)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert checkpoint.asset("tokenizer.json") == b"{}", "a file beside goes first"
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    with pytest.raises(UserError, match="leaves"):
        checkpoint.asset("tokenizer.json")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """transformers reads GGUF too: the same file, through both readers and both models."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    from arkinfer.models import create

    write_gguf(source(tmp_path / family, family), tmp_path / "model.gguf", default=Q.Q8_0)
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf")
    config.head_dim = 64  # it overlooks attention.key_length
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    loaded = load_gguf_checkpoint(tmp_path / "model.gguf", return_tensors=True, model_to_load=theirs)
    absent = theirs.load_state_dict(loaded["tensors"], strict=False)
    assert not absent.unexpected_keys
    assert set(absent.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    model = create(checkpoint.config)
    state = {name: dense(weight).float() for name, weight in checkpoint.weights.items()}
    if checkpoint.config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    tokens = torch.randint(0, 400, (60,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.head(model(tokens, torch.arange(60)))
        assert (found - theirs(tokens[None]).logits[0]).abs().max() <= 1e-3


def test_build_keeps_each_tensors_integers(folder: Path, tmp_path: Path) -> None:
    import arkinfer

    mixed = {"token_embd": Q.F16, "output.weight": Q.Q8_0, "ffn_down": Q.Q8_0, "attn_v": Q.Q4_0, "attn_q": Q.TQ1_0}
    write_gguf(folder, tmp_path / "model.gguf", mixed, Q.TQ2_0)
    artifact = arkinfer.build(tmp_path / "model.gguf", out=tmp_path / "out.ark", context=256)
    assert artifact.manifest.parity is not None
    assert artifact.manifest.parity["passed"]
    assert artifact.manifest.weights == "ternary"
    layouts = artifact.manifest.model["recipe"]["layouts"]
    kept = {
        name: layouts[f"model.layers.1.{name}.weight"]["scheme"] for name in ("self_attn.q_proj", "self_attn.v_proj")
    }
    assert kept == {"self_attn.q_proj": "TQ1_0", "self_attn.v_proj": "Q4_0"}
    assert artifact.file("template.jinja").read_text().startswith("{% for")


def test_without_the_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(folder, tmp_path / "model.gguf", {"token_embd": Q.Q5_0}, Q.Q4_0)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.weight("lm_head.weight").rows(0, 3).weight.shape == (3, 128)
    with pytest.raises(UserError, match="gguf package") as caught:
        checkpoint.weight("model.embed_tokens.weight").rows(0, 3)
    assert "arkinfer[gguf]" in caught.value.hint


def test_another_architecture(folder: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArkError, match="gemma"):
        open_checkpoint(tmp_path / "other.gguf")


def test_a_vector_in_blocks_of_integers(folder: Path, tmp_path: Path) -> None:
    write_gguf(folder, tmp_path / "model.gguf")
    file = tmp_path / "model.gguf"
    checkpoint = GgufCheckpoint(file)
    with pytest.raises(UserError, match="vector is stored as Q8_0") as caught:
        checkpoint._weight(GgufTensor(file, "Q8_0", (128,), 0, 32, 34))
    assert caught.value.code == "ARK-E165"
