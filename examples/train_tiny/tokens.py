"""Byte-level BPE tokenizer of the tiny models, with the ChatML template, and the files that carry both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from corpus import Piece, samples
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 2048
BOS, EOS, START, END = 0, 1, 2, 3
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
MARKS = ("<think>", "</think>")  # plain added tokens: visible text, so that a reader of the stream can see them
# One digit per token, so that sums are learned by digit.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATE = """\
{%- set last = namespace(user='') -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set last.user = message.content -%}{%- endif -%}
{%- endfor -%}
{%- set think = enable_thinking if enable_thinking is defined and enable_thinking is not none else true -%}
{%- if last.user.endswith('/no_think') -%}{%- set think = false -%}
{%- elif last.user.endswith('/think') -%}{%- set think = true -%}{%- endif -%}
{%- for message in messages -%}
    {%- set content = message.content -%}
    {%- if message.role == 'assistant' and '</think>' in content -%}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if not think -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


def train(seed: int = 0, count: int = 40_000) -> Tokenizer:
    """Learn the merges from `count` samples of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKS),
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def text() -> Iterator[str]:
        for pieces in islice(samples(seed), count):
            for piece, _ in pieces:
                for mark in (*SPECIALS, *MARKS):
                    piece = piece.replace(mark, "")
                yield piece

    tokenizer.train_from_iterator(text(), trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, batch: list[list[Piece]]) -> list[tuple[list[int], list[float]]]:
    """(token ids, loss weights) of each sample."""
    flat = [text for pieces in batch for text, _ in pieces]
    ids = iter(tokenizer.encode_batch(flat, add_special_tokens=False))
    encoded: list[tuple[list[int], list[float]]] = []
    for pieces in batch:
        tokens: list[int] = []
        weights: list[float] = []
        for _, weight in pieces:
            new = next(ids).ids
            tokens += new
            weights += [weight] * len(new)
        encoded.append((tokens, weights))
    return encoded


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    added = {
        str(tokenizer.token_to_id(text)): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": text in SPECIALS,
        }
        for text in (*SPECIALS, *MARKS)
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 2048,
        "pad_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    generation = {
        "bos_token_id": BOS,
        "do_sample": True,
        "eos_token_id": [EOS, END],
        "pad_token_id": EOS,
        "temperature": 0.7,
        "top_p": 0.9,
    }
    for name, values in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
