"""LoRA adapters in PEFT's file format, merged into the weights of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import arkinfer
from arkinfer.checkpoint import open_checkpoint
from arkinfer.checkpoint.adapter import _to_bfloat16
from arkinfer.cli import commands
from arkinfer.errors import UserError
from arkinfer.quant.packed import dense, read
from tests.checkpoints import CONFIGS, write_checkpoint

RANK = 4
TARGETS = ("self_attn.q_proj", "mlp.down_proj")
LORA: dict[str, Any] = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": 16, "bias": "none", "use_rslora": False, "use_dora": False,
    "fan_in_fan_out": False, "target_modules": ["q_proj", "down_proj"], "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "init_lora_weights": True, "base_model_name_or_path": "base", "lora_dropout": 0.1,
    "layer_replication": None, "task_type": "CAUSAL_LM", "inference_mode": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), CONFIGS["llama"])


def factors(base: Path, rank: int = RANK) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    found = {}
    for name, weight in open_checkpoint(base).weights.items():
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            rows, width = weight.layout.shape
            found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, width) * 0.1
            found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.1
    return found


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **changes}))
    return folder


@pytest.mark.parametrize("rslora", [False, True])
def test_merges_the_product_and_nothing_else(rslora: bool, base: Path, tmp_path: Path) -> None:
    tensors = factors(base)
    adapter = write_adapter(tmp_path / "lora", tensors, use_rslora=rslora)
    original, merged = open_checkpoint(base), open_checkpoint(base, adapter=adapter)
    assert merged.layouts() == original.layouts()
    scale = 16 / (RANK**0.5 if rslora else RANK)
    for name, weight in merged.weights.items():
        module, before = f"base_model.model.{name.removesuffix('.weight')}", dense(original.weight(name))
        expected = before
        if f"{module}.lora_A.weight" in tensors:
            product = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            exact = before.float() + scale * product
            expected = exact.to(before.dtype)
            near = (dense(weight).float() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6  # half a step of bfloat16
            assert bool(near.all())
            assert (dense(weight) == expected).float().mean() > 0.999  # float32 sums may differ in their last bit
            part = read(weight, 3, 40).weight
            assert (part == dense(weight)[3:40]).float().mean() > 0.999
        else:
            assert torch.equal(dense(weight), expected)


def test_a_float32_base_equals_pefts_merge(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=96, vocab_size=128, max_position_embeddings=64)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    wrapped.save_pretrained(tmp_path / "lora")
    merged = open_checkpoint(tmp_path / "base", adapter=tmp_path / "lora")
    for name, tensor in wrapped.merge_and_unload().state_dict().items():
        torch.testing.assert_close(dense(merged.weight(name)), tensor, rtol=1e-6, atol=1e-6)


def test_modules_that_were_trained_whole(base: Path, tmp_path: Path) -> None:
    head = torch.randn(400, 128)
    tensors = {**factors(base), "base_model.model.lm_head.weight": head}
    adapter = write_adapter(tmp_path / "lora", tensors, modules_to_save=["lm_head"])
    assert torch.equal(dense(open_checkpoint(base, adapter=adapter).weight("lm_head.weight")), head)


def test_ranks_of_their_own(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(base, 2), rank_pattern={"q_proj": 2})
    assert open_checkpoint(base, adapter=adapter).weights


def test_build_names_the_adapter(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(base))
    arguments = ["build", str(base), "--adapter", str(adapter), "-o", str(tmp_path / "out.ark"), "--context", "64"]
    done = CliRunner().invoke(commands, [*arguments, "--weights", "fp32", "--kv", "fp32", "--verify", "none"])
    assert done.exit_code == 0, done.output
    artifact = arkinfer.Artifact.open(tmp_path / "out.ark")
    provenance = artifact.manifest.provenance
    assert (provenance["adapter"]["name"], provenance["adapter"]["rank"]) == ("lora", RANK)
    assert len(provenance["adapter"]["sha256"]) == 64
    from arkinfer.models import create
    from tests.models.test_parity import logits

    merged = open_checkpoint(base, adapter=adapter)
    model = create(merged.config)
    model.load_state_dict({name: dense(weight).float() for name, weight in merged.weights.items()})
    with arkinfer.load(tmp_path / "out.ark") as engine:
        found = torch.from_numpy(engine.score([1, 5, 9, 300]))
    assert (found - logits(model, torch.tensor([1, 5, 9, 300]))).abs().max() <= 1e-3


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, {}, "use_dora"),
    "bias": ({"bias": "all"}, {}, "bias"),
    "not lora": ({"peft_type": "IA3"}, {}, "IA3"),
    "no type": ({"peft_type": None}, {}, "peft_type"),
    "transposed": ({"fan_in_fan_out": True}, {}, "fan_in_fan_out"),
    "a key from the future": ({"use_wonder": 3}, {}, "use_wonder"),
    "changed base": ({"init_lora_weights": "pissa"}, {}, "pissa"),
    "patterns of alpha": ({"alpha_pattern": {"(a+)+$": 1}}, {}, "alpha_pattern"),
    "rank of zero": ({"r": 0}, {}, "r is 0"),
    "rank of a billion": ({"r": 10**9}, {}, "r is"),
    "rank true": ({"r": True}, {}, "r is True"),
    "alpha a text": ({"lora_alpha": "16"}, {}, "lora_alpha"),
    "alpha not a number": ({"lora_alpha": float("nan")}, {}, "lora_alpha"),
    "alpha infinite": ({"lora_alpha": float("inf")}, {}, "lora_alpha"),
    "saved modules a text": ({"modules_to_save": "lm_head"}, {}, "modules_to_save"),
    "another rank": ({"r": 8}, {}, "rank 4"),
    "half a pair": ({}, {f"{Q}.lora_B.weight": None}, "lora_A only"),
    "wrong rows": ({}, {f"{Q}.lora_B.weight": torch.zeros(127, RANK)}, "has B"),
    "wrong width": ({}, {f"{Q}.lora_A.weight": torch.zeros(RANK, 64)}, "has B"),
    "three axes": ({}, {f"{Q}.lora_A.weight": torch.zeros(RANK, 128, 1)}, "not a matrix"),
    "integers": ({}, {f"{Q}.lora_A.weight": torch.zeros(RANK, 128, dtype=torch.int8)}, "stored as I8"),
    "unknown module": ({}, {f"{Q[:-6]}x_proj.lora_A.weight": torch.zeros(4, 4)}, "x_proj"),
    "embedding factors": ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 4)}, "neither"),
    "magnitudes": ({}, {f"{Q}.lora_magnitude_vector": torch.zeros(128)}, "neither"),
    "no prefix": ({}, {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 128)}, "neither"),
    "a module not declared": ({}, {"base_model.model.lm_head.weight": torch.zeros(400, 128)}, "neither"),
    "a saved module of another shape": (
        {"modules_to_save": ["lm_head"]}, {"base_model.model.lm_head.weight": torch.zeros(400, 64)}, "replaces"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, base: Path, tmp_path: Path) -> None:
    changes, replaced, words = REFUSED[case]
    tensors = {name: tensor for name, tensor in {**factors(base), **replaced}.items() if tensor is not None}
    adapter = write_adapter(tmp_path / "lora", tensors, **changes)
    with pytest.raises(UserError) as caught:
        open_checkpoint(base, adapter=adapter)
    assert caught.value.code == "ARK-E168"
    assert words in caught.value.message
    assert caught.value.hint


def test_missing_files(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(base))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors") as caught:
        open_checkpoint(base, adapter=adapter)
    assert "pickle" in caught.value.hint
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        open_checkpoint(base, adapter=adapter)


def test_links_that_leave_the_folder(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(base))
    (adapter / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    (adapter / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leaves") as caught:
        open_checkpoint(base, adapter=adapter)
    assert caught.value.code == "ARK-E162"


def test_a_damaged_file(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", factors(base))
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not a sound"):
        open_checkpoint(base, adapter=adapter)


@pytest.mark.parametrize("group", [32, 64])
def test_ternary_weights_are_not_merged_into(group: int, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {**CONFIGS["llama"], "intermediate_size": 256}, ternary=group)
    with pytest.raises(UserError, match="already quantised") as caught:
        open_checkpoint(base, adapter=write_adapter(tmp_path / "lora", factors(base)))
    assert (caught.value.code, caught.value.facts["stored as"]) == ("ARK-E169", "ternary")


def test_tied_embeddings_are_not_half_replaced(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", CONFIGS["qwen3"])
    tensors = {"base_model.model.model.embed_tokens.weight": torch.zeros(400, 128)}
    with pytest.raises(UserError, match="tied"):
        open_checkpoint(base, adapter=write_adapter(tmp_path / "lora", tensors, modules_to_save=["embed_tokens"]))
    head = "base_model.model.lm_head.lora_"
    pair = {f"{head}A.weight": torch.zeros(RANK, 128), f"{head}B.weight": torch.zeros(400, RANK)}
    with pytest.raises(UserError, match="tied"):
        open_checkpoint(base, adapter=write_adapter(tmp_path / "head", pair))


def test_sums_that_bfloat16_cannot_hold(base: Path, tmp_path: Path) -> None:
    tensors = {name: torch.full_like(tensor, 1e38) for name, tensor in factors(base).items()}
    merged = open_checkpoint(base, adapter=write_adapter(tmp_path / "lora", tensors))
    with pytest.raises(UserError, match="cannot") as caught:
        dense(merged.weight("model.layers.0.self_attn.q_proj.weight"))
    assert caught.value.code == "ARK-E128"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
def test_rounding_is_torchs(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(torch.from_numpy(_to_bfloat16(tensor.numpy())), tensor.bfloat16().view(torch.uint16))
