"""Questions about facts that the conversation itself states: random facts, so that only reading gives the answer."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from lexicon import (
    ANIMALS,
    COLOURS,
    FOODS,
    JOBS,
    NUMBERS,
    OBJECTS,
    PETS,
    PLACES,
    SPOTS,
    article,
    capital,
    invented_word,
    person,
    plural,
)

FILLER = (
    "The sun is shining.",
    "It is raining outside.",
    "The windows are open.",
    "The soup is ready.",
    "It is a quiet day.",
    "The clock is old.",
    "A bird is singing.",
    "The garden is full of flowers.",
    "Everyone is happy.",
    "The door is closed.",
    "It is Monday.",
    "It is cold today.",
)


@dataclass(frozen=True)
class Fact:
    """One stated fact with the questions that it answers."""

    text: str
    questions: tuple[tuple[str, str], ...]
    subject: str


def _where(random: Random, name: str) -> Fact:
    thing, colour, spot = random.choice(OBJECTS), random.choice(COLOURS), random.choice(SPOTS)
    full = f"{name}'s {colour} {thing} is {spot}."
    text = random.choice(
        (full, full, f"{name} put the {colour} {thing} {spot}.", f"The {colour} {thing} of {name} is {spot}.")
    )
    answer = f"{name}'s {thing} is {spot}."
    return Fact(
        text,
        (
            (f"Where is {name}'s {thing}?", answer),
            (f"Where is {name}'s {thing}?", answer),
            (f"Where can I find {name}'s {thing}?", answer),
            (f"Where is the {thing} of {name}?", answer),
            (f"What colour is {name}'s {thing}?", f"{name}'s {thing} is {colour}."),
            (f"Whose {thing} is {spot}?", f"It is {name}'s {thing}."),
            (f"What is {spot}?", f"{name}'s {colour} {thing} is {spot}."),
        ),
        name,
    )


def _count(random: Random, name: str) -> Fact:
    number, things = random.choice(NUMBERS[2:13]), plural(random.choice(OBJECTS))
    text = random.choice((f"{name} has {number} {things}.", f"There are {number} {things} in {name}'s room."))
    return Fact(text, ((f"How many {things} does {name} have?", f"{name} has {number} {things}."),), name)


def _likes(random: Random, name: str) -> Fact:
    food = random.choice(FOODS)
    text = random.choice(
        (f"{name} likes {food}.", f"{name} loves to eat {food}.", f"{name}'s favourite food is {food}.")
    )
    return Fact(
        text,
        (
            (f"What does {name} like to eat?", f"{name} likes {food}."),
            (f"What food does {name} like?", f"{name} likes {food}."),
            (f"Who likes {food}?", f"{name} likes {food}."),
        ),
        name,
    )


def _lives(random: Random, name: str) -> Fact:
    place = random.choice(PLACES)[0]
    return Fact(
        f"{name} lives {place}.",
        ((f"Where does {name} live?", f"{name} lives {place}."), (f"Who lives {place}?", f"{name} lives {place}.")),
        name,
    )


def _pet(random: Random, name: str) -> Fact:
    animal = random.choice(ANIMALS).name
    pet = random.choice(PETS) if random.random() < 0.6 else capital(invented_word(random))
    text = random.choice((f"{name} has {article(animal)} named {pet}.", f"{name}'s {animal} is called {pet}."))
    return Fact(
        text,
        (
            (f"What is the name of {name}'s {animal}?", f"{name}'s {animal} is called {pet}."),
            (f"What animal does {name} have?", f"{name} has {article(animal)}."),
            (f"Who is {pet}?", f"{pet} is {name}'s {animal}."),
            (f"What kind of animal is {pet}?", f"{pet} is {article(animal)}."),
        ),
        name,
    )


def _job(random: Random, name: str) -> Fact:
    job = random.choice(JOBS)
    return Fact(
        f"{name} is {article(job)}.",
        (
            (f"What is {name}'s job?", f"{name} is {article(job)}."),
            (f"What does {name} do?", f"{name} is {article(job)}."),
        ),
        name,
    )


def _colour(random: Random, name: str) -> Fact:
    colour = random.choice(COLOURS)
    return Fact(
        f"{name}'s favourite colour is {colour}.",
        ((f"What is {name}'s favourite colour?", f"{name}'s favourite colour is {colour}."),),
        name,
    )


def _code(random: Random, name: str) -> Fact:
    code = invented_word(random) if random.random() < 0.5 else "".join(random.choice("0123456789") for _ in range(4))
    what = random.choice(("secret word", "code", "password", "magic word"))
    return Fact(
        f"{name}'s {what} is {code}.",
        (
            (f"What is {name}'s {what}?", f"{name}'s {what} is {code}."),
            (f"Tell me the {what} of {name}.", f"{name}'s {what} is {code}."),
        ),
        name,
    )


MAKERS = (_where, _where, _where, _where, _count, _likes, _lives, _pet, _pet, _job, _colour, _code)


def facts(random: Random, count: int) -> list[Fact]:
    """`count` facts in which no two answer the same question and no object, food, place or number appears twice."""
    chosen: list[Fact] = []
    questions: set[str] = set()
    people = [person(random)[0] for _ in range(random.randint(2, max(2, count)))]
    while len(chosen) < count:
        fact = random.choice(MAKERS)(random, random.choice(people))
        asked = {question for question, _ in fact.questions}
        if not asked & questions:
            questions |= asked
            chosen.append(fact)
    return chosen


def passage(random: Random, stated: list[Fact]) -> str:
    """The facts as one paragraph, now and then with a sentence between them that answers nothing, or as a list."""
    if random.random() < 0.15:
        return "\n".join(f"- {fact.text}" for fact in stated)
    sentences: list[str] = []
    for fact in stated:
        if random.random() < 0.25:
            sentences.append(random.choice(FILLER))
        sentences.append(fact.text)
    return " ".join(sentences)


def reason(random: Random, question: str, fact: Fact) -> str:
    """The reasoning that quotes the one fact that matters."""
    lead = random.choice(("The question is about", "I must look for", "I look for the sentence about"))
    return f"{lead} {fact.subject}. The text says: {fact.text}"
