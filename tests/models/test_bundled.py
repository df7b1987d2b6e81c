"""The bundled tiny models: sizes, formats, tokenizer and template, and what they can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import arkinfer
from arkinfer.checkpoint.ternary import detect
from arkinfer.config import ModelConfig
from arkinfer.models import create
from arkinfer.quant.ternary import pack
from arkinfer.runtime.template import ChatTemplate
from tests.checkpoints import InMemory

FOLDER = Path(arkinfer.__file__).parent / "bundled"
NAMES = ("tiny-minicpm", "tiny-bitcpm")
TEXTS = (
    "Once upon a time, there was a little fox named Pip.",
    "小明的球在桌子上。你好！",
    "naïve café, Ωμέγα, emoji 🦊, tab\tand\n\n  spaces  ",
    "12 + 345 = 357",
    "<|im_start|>user\nHello!<|im_end|>\n",
    "<think>\nI think.\n</think>\n\nYes.",
)


def _json(name: str, file: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((FOLDER / name / file).read_text(encoding="utf-8"))
    return values


def _tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / name / "tokenizer.json"))


def _model(name: str) -> Any:
    model = create(ModelConfig.from_json(_json(name, "config.json")))
    model.load_state_dict({key: value.float() for key, value in load_file(FOLDER / name / "model.safetensors").items()})
    return model.eval()


def _render(name: str, messages: list[dict[str, str]], thinking: bool | None = None) -> str:
    source = _json(name, "tokenizer_config.json")["chat_template"]
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "<|im_end|>"}).render(messages, thinking=thinking)


@torch.no_grad()
def _answer(model: Any, tokenizer: Tokenizer, text: str, limit: int = 60) -> str:
    ids = tokenizer.encode(text).ids
    asked = len(ids)
    while len(ids) < asked + limit:
        hidden = model(torch.tensor(ids), torch.arange(len(ids)))
        token = int(model.head(hidden[-1:])[0].argmax())
        if token in model.config.eos_ids:
            break
        ids.append(token)
    return tokenizer.decode(ids[asked:], skip_special_tokens=False)


def test_both_fit_the_package() -> None:
    total = sum(path.stat().st_size for name in NAMES for path in (FOLDER / name).iterdir())
    assert total <= 12_000_000


@pytest.mark.parametrize("name", NAMES)
def test_config_says_what_the_design_says(name: str) -> None:
    config = ModelConfig.from_json(_json(name, "config.json"))
    assert (config.family, config.layers, config.vocab_size, config.tie_embeddings) == ("minicpm", 4, 2048, True)
    assert config.embedding_scale == 12 and config.residual_scale == pytest.approx(0.7) and config.logit_scale == 0.5
    assert config.bos_id == 0 and config.eos_ids == (1, 3) and config.sparse is None
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    assert config.rope.inverse_frequencies(64, 2048)[-1] == pytest.approx(float(plain[-1]) / 8, rel=1e-4), (
        "longrope must not be trivial"
    )


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_the_checkpoint_names_in_bfloat16(name: str) -> None:
    tensors = load_file(FOLDER / name / "model.safetensors")
    model = create(ModelConfig.from_json(_json(name, "config.json")))
    assert set(tensors) == set(model.state_dict()) - {"lm_head.weight"}
    assert all(tensor.dtype == torch.bfloat16 and bool(tensor.isfinite().all()) for tensor in tensors.values())
    model.load_state_dict({key: value.float() for key, value in tensors.items()})


@pytest.mark.parametrize("name", NAMES)
def test_only_bitcpm_is_ternary_in_groups_of_64(name: str) -> None:
    for key, tensor in load_file(FOLDER / name / "model.safetensors").items():
        if not key.endswith("_proj.weight"):
            continue
        expected = 64 if name == "tiny-bitcpm" else None
        assert detect(InMemory(tensor)) == expected, key
        if expected:
            zeros = float((pack(tensor, 64).weight == 0b01010101).float().mean())
            assert zeros < 0.5, "mostly zeros: not trained"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_every_text_back(name: str, text: str) -> None:
    tokenizer = _tokenizer(name)
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == 0, "BOS comes from the tokenizer, as in MiniCPM4"
    assert tokenizer.decode(encoded.ids[1:], skip_special_tokens=False) == text


@pytest.mark.parametrize("name", NAMES)
def test_marks_are_plain_tokens_and_controls_are_special(name: str) -> None:
    tokenizer = _tokenizer(name)
    assert tokenizer.get_vocab_size() == 2048
    assert [
        tokenizer.token_to_id(text) for text in ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    ] == [0, 1, 2, 3, 2046, 2047]
    ids = tokenizer.encode("<think>a</think><|im_end|>").ids
    assert tokenizer.decode(ids) == "<think>a</think>"


@pytest.mark.parametrize(
    ("suffix", "option", "thinks"),
    [
        ("", None, True),
        ("", True, True),
        ("", False, False),
        (" /no_think", True, False),
        (" /think", False, True),
        (" /no_think", None, False),
    ],
)
def test_template_switches_thinking(suffix: str, option: bool | None, thinks: bool) -> None:
    text = _render("tiny-minicpm", [{"role": "user", "content": "Hi" + suffix}], option)
    head = f"<|im_start|>user\nHi{suffix}<|im_end|>\n<|im_start|>assistant\n"
    assert text == head + ("" if thinks else "<think>\n\n</think>\n\n")


def test_template_drops_old_reasoning_and_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    messages = [
        {"role": "system", "content": "You are Tiny."},
        {"role": "user", "content": "Hi /no_think"},
        {"role": "assistant", "content": "<think>\nGreet.\n</think>\n\nHello!"},
        {"role": "user", "content": "Bye"},
    ]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER / "tiny-minicpm")
    for thinking in (None, False, True):
        ours = _render("tiny-minicpm", messages, thinking)
        options = {} if thinking is None else {"enable_thinking": thinking}
        assert "Greet" not in ours and "<|im_start|>assistant\nHello!<|im_end|>\n" in ours
        assert ours == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


@pytest.mark.parametrize("name", NAMES)
def test_both_share_tokenizer_and_template(name: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (FOLDER / name / file).read_bytes() == (FOLDER / NAMES[0] / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_answers_from_the_context_and_thinks_only_when_asked(name: str) -> None:
    model, tokenizer = _model(name), _tokenizer(name)
    question = "Mia's red ball is under the bed. Tom's hat is on the roof. Where is Mia's ball?"
    messages = [{"role": "user", "content": question}]
    plain = _answer(model, tokenizer, _render(name, messages, False))
    assert plain == "Mia's ball is under the bed."
    thought = _answer(model, tokenizer, _render(name, messages, True))
    assert thought.startswith("<think>\n") and thought.endswith("</think>\n\nMia's ball is under the bed.")
