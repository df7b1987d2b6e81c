"""The bundled models' own templates and tokenizers, beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import arkinfer
from arkinfer.runtime.template import ChatTemplate
from arkinfer.runtime.tokenizer import Tokenizer

BUNDLED = Path(arkinfer.__file__).parent / "bundled"
TALKS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "Where does Mia live? 你好"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who? /no_think"}],
    "turns": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOne."},
        {"role": "user", "content": "Two?"},
    ],
}


@pytest.mark.parametrize("name", ["tiny-minicpm", "tiny-bitcpm", "needle"])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("thinking", [None, True, False])
def test_text_and_ids_are_those_of_transformers(name: str, talk: str, thinking: bool | None) -> None:
    transformers = pytest.importorskip("transformers")
    folder = BUNDLED / name
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = {
        key: settings[key] for key in ("bos_token", "eos_token", "pad_token") if isinstance(settings.get(key), str)
    }
    options = {} if thinking is None else {"enable_thinking": thinking}
    expected = theirs.apply_chat_template(TALKS[talk], tokenize=False, add_generation_prompt=True, **options)
    actual = ChatTemplate(settings["chat_template"], tokens).render(TALKS[talk], thinking=thinking)
    assert actual == expected
    ours = Tokenizer.from_file(folder / "tokenizer.json")
    ids = ours.encode(actual)
    assert ids == theirs(expected, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
