"""Measure an exported tiny model: `python examples/train_tiny/evaluate.py FOLDER`.

Greedy decoding; the questions come from seeds that training never used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import chinese
import corpus
import knowledge
import model as tiny
import tokens
import torch
from corpus import NO_THOUGHT, Conversation, Turn
from facts import facts, passage
from tokenizers import Tokenizer

from arkinfer.ops.attention import new_caches

SEED = 1_000_003  # far from every training seed
Check = Callable[[Random], Conversation]


def prompt(talk: Conversation, thinking: bool) -> str:
    """The template's text up to the last answer, history without reasoning."""
    text = "<s>" + (f"<|im_start|>system\n{talk.system}<|im_end|>\n" if talk.system else "")
    for turn in talk.turns[:-1]:
        text += f"<|im_start|>user\n{turn.user}<|im_end|>\n<|im_start|>assistant\n{turn.answer}<|im_end|>\n"
    text += f"<|im_start|>user\n{talk.turns[-1].user}<|im_end|>\n<|im_start|>assistant\n"
    return text if thinking else text + NO_THOUGHT


@torch.no_grad()
def generate(
    model: tiny.CausalLM, tokenizer: Tokenizer, text: str, limit: int = 400, temperature: float = 0.0, seed: int = 0
) -> str:
    """Continue ``text`` until an end token."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    room = len(ids) + limit
    caches = new_caches(model.config, room + (-room) % 64)
    generator = torch.Generator().manual_seed(seed)
    new, out, start = ids, [], 0
    while len(out) < limit:
        hidden = model(torch.tensor(new), torch.arange(start, start + len(new)), caches)
        start += len(new)
        logits = model.head(hidden[-1:])[0]
        token = (
            int(logits.argmax())
            if not temperature
            else int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
        )
        if token in (tokens.EOS, tokens.END):
            break
        out.append(token)
        new = [token]
    return tokenizer.decode(out, skip_special_tokens=False)


@torch.no_grad()
def exact(model: tiny.CausalLM, tokenizer: Tokenizer, talk: Conversation) -> bool:
    """Whether greedy decoding with thinking off gives the answer to the last token, the end mark included."""
    asked = tokenizer.encode(prompt(talk, False), add_special_tokens=False).ids
    answer = tokenizer.encode(talk.turns[-1].answer + "<|im_end|>", add_special_tokens=False).ids
    ids = torch.tensor(asked + answer)
    with tiny.batched(1):
        hidden = model(ids[:-1], torch.arange(len(ids) - 1))
    return model.head(hidden)[len(asked) - 1 :].argmax(1).tolist() == answer


def _stated(count: int) -> Check:
    """``count`` facts and one question."""

    def make(random: Random) -> Conversation:
        stated = facts(random, count)
        question, answer = random.choice(random.choice(stated).questions)
        return Conversation("", [Turn(f"{passage(random, stated)} {question}", "", answer)])

    return make


def _later_turn(random: Random) -> Conversation:
    while True:
        talk = corpus.fact_talk(random)
        if len(talk.turns) > 2:
            return talk


def _one(source: Callable[[Random], tuple[str, str, str]]) -> Check:
    return lambda random: Conversation("", [Turn(*source(random))])


CHECKS: dict[str, Check] = {
    "one of two stated facts": _stated(2),
    "one of four stated facts": _stated(4),
    "one of eight stated facts": _stated(8),
    "stated facts, third question or later": _later_turn,
    "question about a story": corpus.story_talk,
    "animals": _one(knowledge.animal_question),
    "sums": _one(knowledge.sum_question),
    "repeat after me": _one(
        lambda random: next(qa for qa in iter(lambda: knowledge.copy_question(random), None) if "repeat" in qa[1])
    ),
    "Chinese stated facts": _one(
        lambda random: next(qa for qa in iter(lambda: chinese.question(random), None) if qa[1].startswith("文中"))
    ),
}


def thinking_share(model: tiny.CausalLM, tokenizer: Tokenizer, count: int, thinking: bool) -> float:
    """Share of conversations that have exactly one well-formed reasoning block when on, none when off."""
    random, good = Random(SEED + 7), 0
    for _ in range(count):
        talk = corpus.conversation(random)
        text = generate(model, tokenizer, prompt(talk, thinking))
        if thinking:
            good += (
                text.startswith("<think>\n")
                and text.count("\n</think>\n\n") == 1
                and len(text.split("</think>\n\n")[1]) > 0
            )
        else:
            good += "think>" not in text and len(text) > 0
    return good / count


def measure(model: tiny.CausalLM, tokenizer: Tokenizer, count: int, thoughts: int) -> dict[str, float]:
    figures = {}
    for name, make in CHECKS.items():
        random = Random(SEED)
        figures[name] = sum(exact(model, tokenizer, make(random)) for _ in range(count)) / count
    for name, thinking in (("reasoning block when thinking is on", True), ("no reasoning block when it is off", False)):
        figures[name] = thinking_share(model, tokenizer, thoughts, thinking)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-n", type=int, default=500, help="questions of each kind")
    parser.add_argument("--thoughts", type=int, default=60)
    parser.add_argument("--show", action="store_true", help="print a few texts first")
    arguments = parser.parse_args()
    model, tokenizer = tiny.load(arguments.folder), Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    if arguments.show:
        for user, thinking in (
            ("Tell me a story about a fox.", False),
            ("Tell me a story about a girl named Mia who lost her kite.", True),
            ("Write a story about a dragon in the forest.", False),
            ("Mia's red ball is under the bed. Tom's hat is on the roof. Where is the ball of Mia?", True),
            ("What is 7 + 8?", True),
            ("Hello!", False),
            ("请讲一个小猫的故事。", False),
            ("Explain sparse attention to a child.", False),
            ("What is the capital of Spain?", False),
        ):
            talk = Conversation("", [Turn(user, "", "")])
            print(f"> {user}\n{generate(model, tokenizer, prompt(talk, thinking))}\n", file=sys.stderr)
        print(
            "> (no template, temperature 0.8) Once upon a time\n"
            + generate(model, tokenizer, "<s>Once upon a time", temperature=0.8),
            file=sys.stderr,
        )
    print(json.dumps(measure(model, tokenizer, arguments.n, arguments.thoughts), indent=2))


if __name__ == "__main__":
    main()
