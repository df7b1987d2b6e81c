"""Reading config.json: both spellings, absent fields, refused values; and rope frequencies against their formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from arkinfer.config import ModelConfig, RopeConfig, SparseConfig
from arkinfer.errors import UnsupportedError, UserError

FACTORS = [1.0 + 0.5 * pair for pair in range(16)]
MINICPM: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"], "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1000, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": [2, 730], "torch_dtype": "float16", "rope_theta": 20000.0,
    "rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 32768,
                     "short_factor": FACTORS, "long_factor": [2 * factor for factor in FACTORS]},
}  # fmt: skip


def test_old_and_new_spelling_read_alike() -> None:
    new = {name: value for name, value in MINICPM.items() if name not in ("torch_dtype", "rope_theta", "rope_scaling")}
    new |= {"dtype": "float16", "head_dim": 32, "rope_parameters": {**MINICPM["rope_scaling"], "rope_theta": 20000.0}}
    assert ModelConfig.from_json(new) == ModelConfig.from_json(MINICPM)


def test_minicpm_is_normalised() -> None:
    config = ModelConfig.from_json(MINICPM)
    assert config.family == "minicpm" and config.head_dim == 32 and config.eos_ids == (2, 730) and config.bos_id == 1
    assert (config.embedding_scale, config.logit_scale) == (12, 64 / 256)
    assert config.residual_scale == pytest.approx(1.4 / 2)
    assert config.dtype == "float16" and config.sparse is None and config.pad_id is None and config.notes == ()
    sparse = ModelConfig.from_json(MINICPM | {"sparse_config": {"topk": 32, "dense_len": -1}}).sparse
    assert sparse == SparseConfig(topk=32, dense_len=-1)


@pytest.mark.parametrize("name", ["scale_emb", "scale_depth", "dim_model_base", "tie_word_embeddings"])
def test_an_absent_field_is_noted(name: str) -> None:
    config = ModelConfig.from_json({key: value for key, value in MINICPM.items() if key != name})
    assert len(config.notes) == 1 and name in config.notes[0]


def test_differing_longrope_magnitudes_and_unknown_sparse_fields_are_noted() -> None:
    scaling = MINICPM["rope_scaling"] | {"factor": 4.0}
    config = ModelConfig.from_json(MINICPM | {"rope_scaling": scaling, "sparse_config": {"fancy": 1}})
    assert config.rope.magnitude(32768) == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32768)))
    assert any("factor" in note for note in config.notes) and any("fancy" in note for note in config.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None},
        {"hidden_size": 0},
        {"hidden_size": "256"},
        {"hidden_size": True},
        {"hidden_size": 1 << 30},
        {"num_hidden_layers": 1.5},
        {"num_attention_heads": 7},
        {"num_key_value_heads": 3},
        {"vocab_size": -1},
        {"vocab_size": 1 << 40},
        {"max_position_embeddings": 1 << 60},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": float("nan")},
        {"scale_depth": -1.4},
        {"torch_dtype": "float8"},
        {"eos_token_id": "two"},
        {"rope_theta": 0.5},
        {"head_dim": 33},
        {"architectures": 5},
        {"rope_scaling": [1]},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
        {"rope_scaling": MINICPM["rope_scaling"] | {"short_factor": [1.0]}},
        {"rope_scaling": MINICPM["rope_scaling"] | {"long_factor": [0.0] * 16}},
        {"sparse_config": {"kernel_size": 33}},
        {"sparse_config": {"block_size": 40}},
        {"sparse_config": {"topk": 0}},
        {"sparse_config": {"dense_len": -2}},
        {"sparse_config": {"use_nope": 1}},
        {"sparse_config": {"lse": "rough"}},
        {"sparse_config": []},
        {"tie_word_embeddings": "yes"},
    ],
    ids=str,
)
def test_odd_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ModelConfig.from_json(MINICPM | change)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": None, "model_type": "gemma"},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"use_sliding_window": True},
        {"partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_what_is_not_supported_is_said(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        ModelConfig.from_json(MINICPM | change)


def test_longrope_takes_the_long_list_beyond_the_original_context() -> None:
    rope = ModelConfig.from_json(MINICPM).rope
    plain = 20000.0 ** -(np.arange(16) / 16)
    for context in (1, 100, 32768):
        np.testing.assert_allclose(rope.inverse_frequencies(32, context), plain / FACTORS, rtol=3e-7)
    for context in (32769, 131072):
        np.testing.assert_allclose(rope.inverse_frequencies(32, context), plain / FACTORS / 2, rtol=3e-7)
    assert rope.magnitude(131072) == 1.0
    extended = ModelConfig.from_json(MINICPM | {"max_position_embeddings": 131072}).rope
    assert extended.magnitude(1) == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32768)))


def test_llama3_blends_by_wavelength() -> None:
    rope = RopeConfig("llama3", 500000.0, 8.0, 1.0, 4.0, 8192)
    for pair, actual in enumerate(rope.inverse_frequencies(128, 131072)):
        inverse = 500000.0 ** (-pair / 64)
        wavelength = 2 * math.pi / inverse
        if wavelength < 8192 / 4:
            expected = inverse
        elif wavelength > 8192:
            expected = inverse / 8
        else:
            blend = (8192 / wavelength - 1) / 3
            expected = (1 - blend) * inverse / 8 + blend * inverse
        assert actual == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "beta_fast": 16.0,
        },
        {
            "rope_type": "longrope",
            "original_max_position_embeddings": 512,
            "short_factor": FACTORS,
            "long_factor": FACTORS,
        },
    ],
    ids=lambda value: value["rope_type"],
)
def test_rope_kinds_agree_with_transformers(parameters: dict[str, Any]) -> None:
    parameters = parameters | {"rope_theta": 30000.0}
    theirs = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=256,
        max_position_embeddings=2048,
        rope_parameters=parameters,
    )
    inverse, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, torch.device("cpu"), seq_len=2048)
    ours = ModelConfig.from_json({**theirs.to_dict(), "architectures": ["LlamaForCausalLM"]})
    np.testing.assert_allclose(ours.rope.inverse_frequencies(ours.head_dim, 2048), inverse.numpy(), rtol=3e-7)
    assert ours.rope.magnitude(2048) == pytest.approx(magnitude, rel=1e-6)
