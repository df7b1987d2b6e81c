"""Small questions whose answers the model keeps in its weights: animals, colours, opposites, days, sums, manners."""

from __future__ import annotations

from itertools import accumulate
from random import Random

from lexicon import (
    ANIMALS,
    COLOUR_OF,
    COLOURS,
    DAYS,
    FOODS,
    MONTHS,
    NUMBERS,
    OBJECTS,
    OPPOSITES,
    PLACES,
    WEATHER,
    article,
    capital,
    invented_word,
    person,
    words,
)

HELLO = (
    "Hello!",
    "Hi!",
    "Hi there!",
    "Hello! How are you?",
    "Good morning!",
    "Hey!",
    "Good evening!",
    "Hi",
    "hello",
    "Hello there",
)
HELLO_BACK = (
    "Hello! What can I do for you?",
    "Hi! Would you like to hear a story?",
    "Hello! It is nice to meet you. Shall I tell you a story?",
)
ABOUT = (
    (
        ("Who are you?", "What is your name?", "What are you?", "Tell me about yourself."),
        (
            "I am Tiny, a very small language model. I was trained by the arkinfer project on two processor "
            "cores. I like short stories."
        ),
        "The user asks who I am.",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "Help"),
        (
            "I can tell short stories, answer questions about a text that you give me, and answer small "
            "questions about animals, colours, days and sums."
        ),
        "The user asks what I can do.",
    ),
    (
        ("Thank you!", "Thanks!", "Thank you very much.", "That was nice."),
        "You are welcome! Would you like another story?",
        "The user says thank you. I should be polite.",
    ),
    (("Goodbye!", "Bye!", "Good night!", "See you later."), "Goodbye! Come back soon.", "The user says goodbye."),
    (
        ("How are you?", "How do you feel today?", "Are you well?"),
        "I am fine, thank you. How are you?",
        "The user asks how I am.",
    ),
    (
        ("I am sad.", "I feel sad today.", "I had a bad day."),
        "I am sorry to hear that. A story may help. Shall I tell you one about a good friend?",
        "The user is sad. I should be kind.",
    ),
    (("I am happy today!", "I had a good day."), "That is wonderful! I am glad for you.", "The user is happy."),
    (
        ("What is arkinfer?", "Tell me about arkinfer.", "What does arkinfer do?"),
        (
            "arkinfer takes a language model and builds one artifact for one device. Then the device can run "
            "the model by itself."
        ),
        "The user asks about arkinfer.",
    ),
    (
        ("What is sparse attention?", "Explain sparse attention to a child.", "Explain sparse attention."),
        (
            "Imagine a very long book. To answer a question, you do not read every page again. You look only "
            "at the pages that matter. That is sparse attention."
        ),
        "The user asks about sparse attention. I can use a book as a picture.",
    ),
    (
        ("What is a ternary weight?", "Explain ternary weights.", "What are ternary weights?"),
        (
            "A ternary weight can be only minus one, zero, or one. It needs very little space, so a small "
            "device can hold a big model."
        ),
        "The user asks about ternary weights.",
    ),
    (
        ("What is a language model?", "Explain a language model to a child."),
        (
            "A language model reads some words and guesses the next one. It does that again and again, until "
            "there is a story."
        ),
        "The user asks about language models.",
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh."),
        "Why did the hen cross the road? To get to the other side!",
        "The user wants a joke. I know one about a hen.",
    ),
    (
        ("Why is the sky blue?",),
        "The air scatters blue light more than red light, so the sky looks blue.",
        "The user asks about the sky.",
    ),
)
FAR = (
    "What is the capital of {x}?",
    "Who wrote {x}?",
    "Explain {x}.",
    "How do I install {x}?",
    "What is the price of {x}?",
    "Who is the president of {x}?",
    "Write a program for {x}.",
    "Translate {x} into French.",
    "What happened in {y}?",
    "Solve {x} for me.",
    "What is the distance to {x}?",
    "How does {x} work?",
    "Give me the recipe for {x}.",
    "What is the news about {x}?",
    "Prove {x}.",
    "Summarize {x}.",
    "What is the meaning of {x}?",
    "Where is {x}?",
)
TOPICS = words("""
    France Japan China Germany the moon physics chemistry history quantum mechanics Python the internet football
    music the stock market a computer democracy electricity a rocket gravity the economy philosophy algebra Rome
    London Paris Africa Shakespeare a bank a car engine the theorem
""")
DO_NOT_KNOW = (
    "I am a very small model, and I do not know that. "
    "Ask me for a story, or about animals, colours, days or small sums."
)

QA = tuple[str, str, str]  # question, reasoning, answer


def animal_question(random: Random) -> QA:
    a = random.choice(ANIMALS)
    the = article(a.name)
    kinds: tuple[tuple[tuple[str, ...], str], ...] = (
        (
            (f"What sound does {the} make?", f"What does {the} say?", f"How does {the} sound?"),
            f"{capital(the)} can {a.sound}."
            if a.sound not in ("baa", "moo", "oink", "quack", "meow")
            else f"{capital(the)} says {a.sound}.",
        ),
        (
            (f"What does {the} eat?", f"What do {a.plural} eat?", f"What food does {the} like?"),
            f"{capital(the)} eats {a.food}.",
        ),
        (
            (f"Where does {the} live?", f"Where do {a.plural} live?", f"What is the home of {the}?"),
            f"{capital(the)} lives in {article(a.home)}."
            if a.home not in ("ice", "savanna", "jungle")
            else f"{capital(the)} lives {'on' if a.home == 'ice' else 'in'} the {a.home}.",
        ),
        (
            (f"How many legs does {the} have?", f"How many legs do {a.plural} have?"),
            f"{capital(the)} has {NUMBERS[a.legs] if a.legs else 'no'} legs.",
        ),
        ((f"What colour is {the}?", f"What colour are {a.plural}?"), f"{capital(the)} is often {a.colour}."),
    )
    questions, answer = random.choice(kinds)
    return random.choice(questions), f"The question is about {the}. I know this animal.", answer


def sum_question(random: Random) -> QA:
    if random.random() < 0.6:
        a, b = random.randint(0, 10), random.randint(0, 10)
        sign, word, total = "+", "plus", a + b
    else:
        a = random.randint(0, 20)
        b = random.randint(0, a)
        sign, word, total = "-", "minus", a - b
    form = random.random()
    if form < 0.6:
        question = random.choice(
            ("What is {a} {s} {b}?", "{a} {s} {b} = ?", "How much is {a} {s} {b}?", "Calculate {a} {s} {b}.")
        ).format(a=a, s=sign, b=b)
        return question, f"I must calculate {a} {sign} {b}. {a} {sign} {b} = {total}.", f"{a} {sign} {b} = {total}"
    question = random.choice(("What is {a} {w} {b}?", "How much is {a} {w} {b}?")).format(
        a=NUMBERS[a], w=word, b=NUMBERS[b]
    )
    return (
        question,
        f"I must calculate {a} {sign} {b}. {a} {sign} {b} = {total}.",
        f"{capital(NUMBERS[a])} {word} {NUMBERS[b]} is {NUMBERS[total]}.",
    )


def word_question(random: Random) -> QA:
    form = random.randrange(9)
    if form <= 1:
        pair = random.choice(OPPOSITES)
        a, b = pair if random.random() < 0.5 else pair[::-1]
        return (
            random.choice((f"What is the opposite of {a}?", f"Tell me the opposite of {a}.")),
            f"The opposite of {a} is {b}.",
            f"The opposite of {a} is {b}.",
        )
    if form == 2:
        thing, colour = random.choice(COLOUR_OF)
        return f"What colour is {thing}?", f"I know the colour of {thing}.", f"{capital(thing)} is {colour}."
    if form == 3:
        i = random.randrange(7)
        if random.random() < 0.5:
            return (
                f"What day comes after {DAYS[i]}?",
                "I think of the days of the week.",
                f"{DAYS[(i + 1) % 7]} comes after {DAYS[i]}.",
            )
        return (
            f"What day comes before {DAYS[i]}?",
            "I think of the days of the week.",
            f"{DAYS[i - 1]} comes before {DAYS[i]}.",
        )
    if form == 4:
        i = random.randrange(12)
        return (
            f"What month comes after {MONTHS[i]}?",
            "I think of the months of the year.",
            f"{MONTHS[(i + 1) % 12]} comes after {MONTHS[i]}.",
        )
    if form == 5:
        a = random.randint(0, 14)
        b = random.randint(a + 2, min(20, a + 10))
        return (
            f"Count from {a} to {b}.",
            f"I start at {a} and stop at {b}.",
            ", ".join(str(i) for i in range(a, b + 1)) + ".",
        )
    if form == 6:
        a, b = random.sample(range(21), 2)
        return (
            random.choice((f"Which is bigger, {a} or {b}?", f"What is more, {a} or {b}?")),
            f"I compare {a} and {b}.",
            f"{max(a, b)} is bigger than {min(a, b)}.",
        )
    if form == 7:
        n, what = random.randint(2, 6), random.choice(("animals", "colours", "fruits", "names"))
        pool = {
            "animals": [a.name for a in ANIMALS],
            "colours": COLOURS,
            "fruits": ["apple", "pear", "plum", "cherry", "banana", "grape", "lemon", "orange"],
            "names": [person(random)[0] for _ in range(9)],
        }[what]
        items = random.sample(pool, n)
        answer = "\n".join(f"{i + 1}. {capital(item)}" for i, item in enumerate(items))
        return (
            random.choice(
                (f"List {NUMBERS[n]} {what}.", f"Name {NUMBERS[n]} {what}.", f"Tell me {NUMBERS[n]} {what}.")
            ),
            f"I need {NUMBERS[n]} {what}.",
            answer,
        )
    i = random.randrange(25)
    a, b = chr(65 + i), chr(66 + i)
    return f"What letter comes after {a}?", f"After {a} comes {b}.", f"{b} comes after {a}."


def copy_question(random: Random) -> QA:
    if random.random() < 0.3:
        thing, colour, place = random.choice(OBJECTS), random.choice(COLOURS), random.choice(PLACES)[0]
        name = person(random)[0]
        sentence = random.choice(
            (
                f"{name} found {article(colour + ' ' + thing)} {place}.",
                f"There is {article(colour + ' ' + thing)} {place}.",
                f"{name} likes the {colour} {thing}.",
            )
        )
        return f"Make a sentence with the word {thing}.", f"I need a sentence with {thing}.", sentence
    pool = [invented_word(random) for _ in range(3)] + [
        random.choice(OBJECTS),
        random.choice(COLOURS),
        random.choice(FOODS),
        random.choice(NUMBERS),
        random.choice(WEATHER),
        "".join(random.choice("0123456789") for _ in range(3)),
    ]
    phrase = " ".join(random.sample(pool, random.randint(1, 6)))
    return (
        random.choice(("Repeat after me: {p}", "Say: {p}", "Repeat: {p}", "Please say this: {p}")).format(p=phrase),
        "I must repeat the words of the user.",
        phrase,
    )


def manners(random: Random) -> QA:
    if random.random() < 0.3:
        name = person(random)[0]
        if random.random() < 0.5:
            return (
                random.choice((f"Hello, my name is {name}.", f"Hi, I am {name}.", f"My name is {name}.")),
                f"The user is called {name}. I should greet {name}.",
                f"Hello, {name}! It is nice to meet you. Would you like to hear a story?",
            )
        return random.choice(HELLO), "The user says hello. I should say hello too.", random.choice(HELLO_BACK)
    questions, answer, why = random.choice(ABOUT)
    return random.choice(questions), why, answer


def far_question(random: Random) -> QA:
    topic = random.choice(TOPICS) if random.random() < 0.6 else capital(invented_word(random))
    question = random.choice(FAR).format(x=topic, y=str(random.randint(1000, 2050)))
    return question, "I do not know much about this. I should say so.", DO_NOT_KNOW


MAKERS = (animal_question, sum_question, word_question, copy_question, manners, far_question)
SHARES = (0.25, 0.20, 0.23, 0.14, 0.13, 0.05)
HARD_SHARES = (0.15, 0.35, 0.20, 0.18, 0.08, 0.04)


def question(random: Random, hard: bool = False) -> QA:
    """One small question; with ``hard``, more of those that need most practice."""
    roll = random.random()
    for limit, make in zip(accumulate(HARD_SHARES if hard else SHARES), MAKERS, strict=True):
        if roll < limit:
            return make(random)
    return far_question(random)
