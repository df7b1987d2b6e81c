"""The constructed model finds every needle, and its files are what make.py writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arkinfer.checkpoint import BUNDLED
from arkinfer.config import SparseConfig
from arkinfer.models.decoder import CausalLM
from examples.needle import make, retrieve


@pytest.fixture(scope="module")
def sparse_model() -> CausalLM:
    """The bundled model, sparse from the first token and with a small budget, so that selection counts early."""
    model = retrieve.open_model("sparse")
    for layer in model.model.layers:
        layer.self_attn.sparse = SparseConfig(topk=4, window_size=128, dense_len=-1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("length", [120, 3000])
def test_finds_every_needle_dense(length: int, dtype: torch.dtype) -> None:
    assert retrieve.retrieve(retrieve.open_model("dense"), length, dtype) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_finds_every_needle_among_few_selected_blocks(sparse_model: CausalLM, dtype: torch.dtype) -> None:
    # Six of 64 blocks are read: the first, three local ones, and two that scores choose among 32 needles.
    assert retrieve.retrieve(sparse_model, 4096, dtype) == 1.0


def test_a_key_that_was_not_hidden_gets_no_answer() -> None:
    model = retrieve.open_model("dense")
    words = make.vocabulary()
    text = ["<s>", "the", "fox", "crimson", "by", "the", "river", "what", "is", "the", "otter"]
    tokens = torch.tensor([words.index(word) for word in text])
    with torch.no_grad():
        logits = model.head(model(tokens, torch.arange(len(tokens))))
    assert words[int(logits[-1].argmax())] == "</s>"


def test_bundled_files_are_what_the_script_writes(tmp_path: Path) -> None:
    make.write(tmp_path)
    bundled = BUNDLED / "needle"
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in bundled.iterdir()}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (bundled / file.name).read_bytes(), file.name
    assert sum(file.stat().st_size for file in bundled.iterdir()) < 1_000_000
