"""The training text: an endless, seeded stream of samples, each a list of (text, loss weight) pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random

import chinese
from facts import facts, passage, reason
from knowledge import question
from lexicon import ANIMALS, article
from stories import THEMES, brief, plan, story

Piece = tuple[str, float]
CONTEXT_WEIGHT = 0.1  # text that the user writes: read, hardly learned
# A story has hundreds of tokens that could well be others; a short answer has few, and each must be right.
ANSWER_WEIGHT = 4.0
LONG_ANSWER = 300  # characters; above it is a story
NO_THOUGHT = "<think>\n\n</think>\n\n"

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly storyteller.",
    "Answer in short sentences.",
    "You are Tiny.",
    "You tell stories to children.",
)
ASK_ABOUT = (
    "{t} {q}",
    "{t} {q}",
    "{t}\n{q}",
    "{t}\n\n{q}",
    "Read this: {t} {q}",
    "Here are some facts. {t} {q}",
    "{t} Now tell me: {q}",
    "{q} {t}",
)
THEME_WORDS = {
    "lost": "a lost {o}",
    "high": "{ao} in a tree",
    "broken": "a broken {o}",
    "afraid": "being afraid",
    "quarrel": "a quarrel",
    "way home": "the way home",
    "hurt bird": "a hurt bird",
    "seed": "a seed",
    "heavy": "something heavy",
    "lonely": "a lonely {k}",
    "birthday": "a birthday",
    "race": "a race",
    "rain": "a rainy day",
    "sleep": "a night without sleep",
}


@dataclass
class Turn:
    user: str
    reasoning: str
    answer: str


@dataclass
class Conversation:
    system: str
    turns: list[Turn] = field(default_factory=list)


def story_request(random: Random) -> Turn:
    """A request that names an animal, a child, a place, a theme, or several of them; the story keeps to it."""
    lead = random.choice(
        (
            "Tell me a story",
            "Write a story",
            "Tell me a short story",
            "Write a short story",
            "Please tell me a story",
            "I want a story",
            "Can you tell me a story",
            "tell me a story",
        )
    )
    form = random.randrange(10)
    theme = random.choice(THEMES)
    if form <= 2:
        b = brief(random, animal=random.choice(ANIMALS), theme=theme)
        about = f" about {article(b.kind)}"
    elif form == 3:
        b = brief(random, animal=random.choice(ANIMALS), theme=theme)
        about = f" about {article(b.kind)} {random.choice(('named', 'called'))} {b.name}"
    elif form == 4:
        b = brief(random, child=True, theme=theme)
        about = random.choice(
            (f" about {article(b.kind)} named {b.name}", f" about {b.name}", f" about a little {b.kind}")
        )
        if b.name not in about and "little" not in about:
            about = f" about {b.name}"
    elif form == 5:
        b = brief(random, theme=theme)
        about = random.choice((f" that happens {b.place[0]}", f" about {b.place[1]}", f" {b.place[0]}"))
    elif form == 6:
        b = brief(random, animal=random.choice(ANIMALS), theme=theme)
        about = f" about {article(b.kind)} {b.place[0]}"
    elif form == 7:
        b = brief(random, theme=theme)
        about = " about " + THEME_WORDS[theme].format(o=b.thing, ao=article(b.thing), k=b.kind)
    elif form == 8:
        b = brief(random, animal=random.choice(ANIMALS), theme=theme)
        about = f" about {article(b.kind)} and {article(b.friend_kind)}"
    else:
        b = brief(random, theme=theme)
        about = ""
    end = "?" if lead.startswith("Can") else random.choice((".", ".", ".", ", please.", "!", ""))
    return Turn(lead + about + end, plan(random, b), story(random, b))


def story_talk(random: Random) -> Conversation:
    """A story and, often, questions about it."""
    theme = random.choice(THEMES)
    animal = random.random() < 0.6
    b = brief(random, animal=random.choice(ANIMALS) if animal else None, child=not animal, theme=theme)
    told = story(random, b)
    facts_of = [
        (f"Where did {b.name} live?", f"{b.name} lived {b.place[0]}."),
        ("Who is the story about?", f"The story is about {article(b.kind)} named {b.name}."),
        (f"Who was {b.friend}?", f"{b.friend} was {article(b.friend_kind)}."),
        (f"What was the name of the {b.kind}?", f"The {b.kind} was called {b.name}."),
        ("Who was the friend?", f"The friend was {b.friend} the {b.friend_kind}."),
    ]
    if theme in ("lost", "high", "broken"):
        what = {"lost": "lose", "high": "get down", "broken": "break"}[theme]
        past = {"lost": "lost", "high": "got down", "broken": "broke"}[theme]
        facts_of += [
            (f"What did {b.name} {what}?", f"{b.name} {past} the {b.thing}."),
            (f"What colour was the {b.thing}?", f"The {b.thing} was {b.colour}."),
            (f"Who helped {b.name}?", f"{b.friend} the {b.friend_kind} helped {b.name}."),
        ]
    asked = random.sample(facts_of, random.randint(1, 3))
    turns = [Turn(q, f"I think of the story. {a}", a) for q, a in asked]
    if random.random() < 0.5:
        lead = random.choice(
            (f"Tell me a story about {article(b.kind)} named {b.name}.", f"Tell me a story about {article(b.kind)}.")
        )
        return Conversation("", [Turn(lead, plan(random, b), told), *turns])
    turns[0].user = random.choice(("Read this story. {s}\n\n{q}", "{s}\n\n{q}", "{s} {q}")).format(
        s=told, q=turns[0].user
    )
    return Conversation("", turns)


def fact_talk(random: Random, questions: tuple[int, ...] = (1, 1, 2, 3, 4)) -> Conversation:
    """Facts in the system message or the first question, then as many questions about them as ``questions`` allows."""
    stated = facts(random, random.choice((1, 2, 2, 3, 3, 4, 4, 5, 6, 8)))
    text = passage(random, stated)
    turns: list[Turn] = []
    for _ in range(random.choice(questions)):
        fact = random.choice(stated)
        asked, answer = random.choice(fact.questions)
        turns.append(Turn(asked, reason(random, asked, fact), answer))
    roll = random.random()
    if roll < 0.25:
        return Conversation(random.choice(("{t}", "You know these facts. {t}", "Facts: {t}")).format(t=text), turns)
    if roll < 0.4:
        return Conversation(
            "",
            [
                Turn(
                    text,
                    "The user tells me some facts. I should remember them.",
                    random.choice(("I see. What do you want to know?", "Thank you. I will remember that.")),
                ),
                *turns,
            ],
        )
    turns[0].user = random.choice(ASK_ABOUT).format(t=text, q=turns[0].user)
    return Conversation("", turns)


# Shares of fact talk, story requests, story talk and small questions; the rest is Chinese.
STORY_MIX = (0.42, 0.18, 0.10, 0.22)
READING_MIX = (0.46, 0.06, 0.07, 0.35)


def conversation(random: Random, reading: bool = False) -> Conversation:
    facts_end, stories_end, talk_end, small_end = accumulate(READING_MIX if reading else STORY_MIX)
    roll = random.random()
    if roll < facts_end:
        talk = fact_talk(random, (1, 2, 4, 6, 8)) if reading else fact_talk(random)
    elif roll < stories_end:
        talk = Conversation("", [story_request(random)])
        if random.random() < 0.15:
            talk.turns.append(story_request(random))
    elif roll < talk_end:
        talk = story_talk(random)
    elif roll < small_end:
        talk = Conversation("", [Turn(*question(random, reading)) for _ in range(random.choice((1, 1, 2, 3, 4)))])
    else:
        talk = Conversation("", [Turn(*chinese.question(random)) for _ in range(random.choice((1, 1, 2)))])
    if not talk.system and random.random() < 0.15:
        talk.system = random.choice(SYSTEMS)
    return talk


def render(random: Random, talk: Conversation, reading: bool = False) -> list[Piece]:
    """ChatML pieces as the template writes them, with thinking on, off, or switched by the user's last words.

    Half of the histories keep each turn's reasoning block, as a session that reuses its cache has them; the others drop
    it, as the template does, and then only the last answer is learned: an answer without a block must never look right.
    """
    thinking = random.random() < 0.4
    kept = random.random() < (0.85 if reading else 0.5)
    context = 0.0 if reading else CONTEXT_WEIGHT
    pieces: list[Piece] = [("<s>", 0.0)]
    if talk.system:
        pieces.append((f"<|im_start|>system\n{talk.system}<|im_end|>\n", context))
    for index, turn in enumerate(talk.turns):
        last = index == len(talk.turns) - 1
        user, think = turn.user, thinking
        if random.random() < 0.12:
            think = random.random() < 0.5
            user += " /think" if think else " /no_think"
        pieces.append((f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", context))
        weight = ANSWER_WEIGHT if reading and len(turn.answer) <= LONG_ANSWER else 1.0
        if last or kept:
            if think:
                pieces.append((f"<think>\n{turn.reasoning}\n</think>\n\n{turn.answer}<|im_end|>", weight))
            else:
                pieces += [(NO_THOUGHT, 0.0), (f"{turn.answer}<|im_end|>", weight)]
        else:
            pieces.append((f"{turn.answer}<|im_end|>", 0.0))
        pieces.append(("\n", 0.0))
    return pieces


def sample(random: Random, reading: bool = False) -> list[Piece]:
    """One sample: a plain story in one of five, a conversation otherwise.

    With ``reading``, fewer stories, and short answers weigh more: for a model that already writes well.
    """
    if random.random() < (0.06 if reading else 0.2):
        b = brief(random)
        return [("<s>", 0.0), (story(random, b) + "</s>", 1.0)]
    return render(random, conversation(random, reading), reading)


def samples(seed: int) -> Iterator[list[Piece]]:
    random = Random(seed)
    while True:
        yield sample(random)
