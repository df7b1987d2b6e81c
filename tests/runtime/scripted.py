"""A model whose every word is known: an Executor that recites a script, and a small byte-level tokenizer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from arkinfer.artifact import Artifact, Writer
from arkinfer.backends.base import Executor, Rows, State
from arkinfer.errors import UserError
from arkinfer.runtime.engine import Engine
from arkinfer.runtime.options import Generation, Thinking
from arkinfer.runtime.template import ChatTemplate
from arkinfer.runtime.tokenizer import Tokenizer

SPECIALS = ["<|end|>", "<s>", "<|user|>", "<|assistant|>", "<|system|>"]
TAGS = ["<think>", "</think>"]
END, BOS = 0, 1
TEMPLATE = (
    "{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte after the special tokens: every character outside ASCII is split over several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={letter: index + len(SPECIALS) + 2 for index, letter in enumerate(alphabet)}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    # Ids 0 to 6: they are given to the added tokens by putting their spellings into the vocabulary first.
    vocab = {token: index for index, token in enumerate([*SPECIALS, *TAGS])} | inner.get_vocab()
    inner.model = models.BPE(vocab=vocab, merges=[])
    inner.add_special_tokens(SPECIALS)
    inner.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in TAGS])
    return inner


class ScriptedState(State):
    def __init__(self, capacity: int) -> None:
        self.tokens: list[int] = []
        self.capacity = capacity

    @property
    def length(self) -> int:  # type: ignore[override]
        return len(self.tokens)

    def truncate(self, length: int) -> None:
        assert 0 <= length <= len(self.tokens)
        del self.tokens[length:]

    def fork(self) -> ScriptedState:
        twin = ScriptedState(self.capacity)
        twin.tokens = list(self.tokens)
        return twin


class ScriptedExecutor(Executor):
    """After context ``c`` the most likely token is ``reply(c)``; its logit is 9, the others' depend on the context."""

    def __init__(self, reply: Callable[[list[int]], int], vocab_size: int, max_context: int = 4096) -> None:
        self.reply = reply
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.threads = 1
        self.isa = "scripted"
        self.steps: list[int] = []
        self.before_step: Callable[[], None] = lambda: None
        self.closed = 0
        self._inside = threading.Lock()

    def new_state(self, capacity: int | None = None) -> ScriptedState:
        return ScriptedState(min(capacity or self.max_context, self.max_context))

    def step(self, tokens: Sequence[int], state: State, logits: Rows = "last") -> np.ndarray:
        assert isinstance(state, ScriptedState)
        assert self._inside.acquire(blocking=False), "two steps at once"
        try:
            self.before_step()
            if state.length + len(tokens) > state.capacity:
                raise UserError("the context is full")
            self.steps.append(len(tokens))
            rows = []
            for token in tokens:
                state.tokens.append(token)
                rows.append(self._logits(state.tokens))
            return np.array({"last": rows[-1:], "all": rows, "none": []}[logits], np.float32)
        finally:
            self._inside.release()

    def _logits(self, context: list[int]) -> np.ndarray:
        phase = np.float32(sum(context) % 97)
        row = np.sin(phase + np.arange(self.vocab_size, dtype=np.float32))
        row[self.reply(context)] = 9
        return row

    def tap(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        return {}

    def close(self) -> None:
        self.closed += 1

    def fill(self, state: State, depth: int) -> None:
        assert isinstance(state, ScriptedState)
        state.tokens = [7] * depth

    def decode_bytes(self, depth: int) -> int:
        return 1_000_000 + 100 * depth

    def prefill_ops(self, tokens: int, depth: int) -> int:
        return 2_000_000 * tokens


def reciting(tokenizer: Tokenizer, answer: str | Callable[[str], str]) -> Callable[[list[int]], int]:
    """Return a reply function: after the last ``<|assistant|>`` (or ``:``) comes ``answer``, then the end.

    A callable answer is given the whole prompt's text.
    """
    opener = tokenizer.token_id("<|assistant|>")
    colon = tokenizer.encode(":")[0]

    def reply(context: list[int]) -> int:
        marks = [index for index, token in enumerate(context) if token in (opener, colon)]
        if not marks:
            return END
        start = next((index for index in marks if context[index] == colon), marks[-1])
        if opener in context:
            start = max(index for index in marks if context[index] == opener)
        prompt = tokenizer.decode(context[:start], keep=tokenizer.special_ids)
        script = [*tokenizer.encode(answer if isinstance(answer, str) else answer(prompt)), END]
        said = context[start + 1 :]
        return script[len(said)] if len(said) < len(script) else END

    return reply


def engine_that_says(
    answer: str | Callable[[str], str],
    *,
    thinking: bool = True,
    max_context: int = 4096,
    add_bos: bool = False,
    template: str | None = TEMPLATE,
) -> Engine:
    """Return an Engine on a scripted model. ``engine.executor`` is the ScriptedExecutor."""
    tokenizer = Tokenizer(byte_tokenizer())
    executor = ScriptedExecutor(reciting(tokenizer, answer), tokenizer.vocab_size, max_context)
    tags = Thinking("<think>", "</think>") if thinking else None
    generation = Generation(bos_id=BOS, eos_ids=frozenset({END}), add_bos=add_bos, thinking=tags)
    chat = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "<|end|>"}) if template is not None else None
    return Engine(executor, tokenizer, generation, chat)


def user(content: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


ANSWER = "<think>\nHm.\n</think>\n\nIt is 4, 你好."


def open(artifact: Artifact, threads: int | None = None, attention: str | None = None) -> ScriptedExecutor:
    """The backend `scripted`: its artifacts say ANSWER, or what their payload/script.txt holds."""
    tokenizer = Tokenizer.from_file(artifact.file("tokenizer.json"))
    script = artifact.file("payload/script.txt").read_text(encoding="utf-8")
    executor = ScriptedExecutor(reciting(tokenizer, script), tokenizer.vocab_size, artifact.manifest.context)
    executor.threads = threads or 1
    return executor


def write_artifact(
    folder: Path, script: str = ANSWER, *, template: str | None = TEMPLATE, context: int = 2048, thinking: bool = True
) -> Path:
    """Seal an artifact of the backend `scripted` in ``folder`` and return its path."""
    tags = {"open": "<think>", "close": "</think>"} if thinking else None
    generation = {"bos_id": BOS, "eos_ids": [END], "pad_id": None, "add_bos": False, "thinking": tags}
    fields = {
        "name": "scripted",
        "arkinfer": "0.1.0",
        "target": {"name": "cpu"},
        "backend": "scripted",
        "model": {"family": "minicpm", "parameters": 12_345_678},
        "weights": "int4",
        "activations": "int8",
        "kv": "fp16",
        "attention": "auto",
        "context": context,
        "graph_digest": "0" * 64,
        "toolchain": {"scriptkit": "1.2"},
        "limits": {},
        "parity": {"passed": True, "mean_kl": 1.1e-7, "top1": 1.0, "positions": 2048, "suite": "fast"},
        "quality": {"lossless": True},
        "provenance": {"model": "scripted-model", "notes": ["scale_depth absent, took 1.4"]},
    }
    with Writer(folder / "scripted.ark", force=True) as writer:
        byte_tokenizer().save(str(writer.path("tokenizer.json")))
        writer.path("generation.json").write_text(json.dumps(generation), encoding="utf-8")
        writer.path("payload/script.txt").write_text(script, encoding="utf-8")
        writer.path("payload/graph.txt").write_text("%0 = embedding(tokens)\n", encoding="utf-8")
        if template is not None:
            writer.path("template.jinja").write_text(template, encoding="utf-8")
        return writer.seal(fields).path
