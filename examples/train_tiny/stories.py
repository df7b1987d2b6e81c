"""Short stories from a grammar: a hero, a place, a small problem, a friend and a good end. Written for this project."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from lexicon import (
    ADJECTIVES,
    ANIMALS,
    BAD,
    BOYS,
    COLOURS,
    GIRLS,
    GOOD,
    OBJECTS,
    PETS,
    PLACES,
    SPOTS,
    WEATHER,
    Animal,
    article,
    capital,
    person,
)


@dataclass(frozen=True)
class Brief:
    """What a story must contain. Empty fields are the writer's choice."""

    theme: str
    name: str
    kind: str
    male: bool
    place: tuple[str, str]
    thing: str
    colour: str
    friend: str
    friend_kind: str
    friend_male: bool


def brief(random: Random, *, animal: Animal | None = None, theme: str = "", child: bool | None = None) -> Brief:
    male = random.random() < 0.5
    if animal is None and child is not True and (child is False or random.random() < 0.55):
        animal = random.choice(ANIMALS)
    if animal is not None:
        name, kind = random.choice(PETS), animal.name
    else:
        name, kind = person(random)
        male = kind == "boy"
    friend_male = random.random() < 0.5
    if random.random() < 0.6:
        other = random.choice([each for each in ANIMALS if each.name != kind])
        friend, friend_kind = random.choice([pet for pet in PETS if pet != name]), other.name
    else:
        friend_kind = "boy" if friend_male else "girl"
        friend = random.choice([each for each in (BOYS if friend_male else GIRLS) if each != name])
    return Brief(
        theme or random.choice(THEMES),
        name,
        kind,
        male,
        random.choice(PLACES),
        random.choice(OBJECTS),
        random.choice(COLOURS),
        friend,
        friend_kind,
        friend_male,
    )


def _words(random: Random, b: Brief) -> dict[str, str]:
    spots = random.sample(SPOTS, 3)
    return {
        "N": b.name,
        "k": b.kind,
        "adj": random.choice(ADJECTIVES),
        "adj2": random.choice(ADJECTIVES),
        "he": "he" if b.male else "she",
        "him": "him" if b.male else "her",
        "his": "his" if b.male else "her",
        "He": "He" if b.male else "She",
        "His": "His" if b.male else "Her",
        "F": b.friend,
        "fk": b.friend_kind,
        "afk": article(b.friend_kind),
        "fhe": "he" if b.friend_male else "she",
        "fhim": "him" if b.friend_male else "her",
        "fhis": "his" if b.friend_male else "her",
        "p": b.place[0],
        "P": capital(b.place[0]),
        "tp": b.place[1],
        "o": b.thing,
        "c": b.colour,
        "co": f"{b.colour} {b.thing}",
        "aco": article(f"{b.colour} {b.thing}"),
        **{f"s{number}": spot for number, spot in enumerate(spots, 1)},
        "w": random.choice(WEATHER),
        "good": random.choice(GOOD),
        "good2": random.choice(GOOD),
        "bad": random.choice(BAD),
        "day": random.choice(("day", "morning", "afternoon", "evening")),
        "n": random.choice(("two", "three", "four", "five")),
    }


OPENINGS = (
    "Once upon a time, there was {a_adj} {k} named {N}. {N} lived {p}.",
    "Once upon a time, {a_adj} {k} named {N} lived {p}.",
    "{N} was {a_adj} {k} who lived {p}.",
    "{P}, there lived {a_adj} {k}. {His} name was {N}.",
    "There was once {a_adj} {k} called {N}, who lived {p}.",
    "Long ago, {a_adj} {k} called {N} lived {p}.",
    "This is the story of {N}, {a_adj} {k} who lived {p}.",
)
HABITS = (
    "{He} had {aco}, and {he} took it everywhere.",
    "{He} loved {his} {co} very much.",
    "More than anything, {he} loved {his} {co}.",
    "{His} best thing in the world was {aco}.",
    "{He} liked to play with {his} {co} every day.",
)
MEETINGS = (
    "Just then, {afk} named {F} came by.",
    "{His} friend {F} the {fk} heard {him} and came at once.",
    "Soon {F}, {a_adj2} {fk}, came along the path.",
    "{F} the {fk} was walking near and stopped.",
    "Along came {afk} called {F}.",
)
ASKS = (
    '"What is wrong?" asked {F}.',
    '"Why are you so sad?" asked {F}.',
    '"Can I help you?" {F} said softly.',
    '"Are you all right?" asked {F}.',
    '{F} looked at {him} and said, "Tell me what happened."',
    '"Hello, {N}. You do not look happy," said {F}.',
)
THANKS = (
    '"Thank you, {F}!" said {N}. "You are a good friend."',
    '{N} gave {F} a big hug. "Thank you!" {he} said.',
    '"I could not do it without you," {N} told {F}.',
    '{N} smiled and said, "Thank you so much, {F}."',
    '"You are the best friend in the world," said {N}.',
)
ENDINGS = (
    "From that day on, {N} and {F} were best friends.",
    "{N} and {F} went home, and both were {good}.",
    "That night, {N} fell asleep with a smile.",
    "After that, {N} was {good}, and so was {F}.",
    "And {N} and {F} played together until the sun went down.",
    "They ate cake and drank warm milk, and everyone was {good}.",
    "{N} never forgot that {day}.",
    "{N} learned that a friend makes every problem smaller.",
    "They laughed all the way home.",
    "And they lived happily {p}.",
    "{N} told the story to everyone {p}.",
)

PLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lost": (
        (
            "One {day}, the {o} was gone.",
            "One {day}, {N} could not find the {o}.",
            "But one {day}, {he} lost the {co}.",
        ),
        (
            "{He} looked {s1}, but it was not there. {He} looked {s2}, but it was not there.",
            "{He} looked {s1} and {s2}, but found nothing.",
            "First {he} looked {s1}. Then {he} looked {s2}. There was no {o}.",
        ),
        ("{N} felt {bad}.", "{N} sat down and felt {bad}.", "{He} began to cry, and {he} was {bad}."),
        ("MEET",),
        ("ASK",),
        (
            '"My {co} is lost," said {N}.',
            '"I lost my {o}," {N} said. "It is {c}."',
            '"I cannot find my {co}," said {N}.',
        ),
        (
            '"Let us look together," said {F}.',
            '"Do not worry. We will find it," said {F}.',
            '"Two can look better than one," {F} said.',
        ),
        (
            "They looked everywhere. At last, {F} found the {o} {s3}!",
            "{F} looked {s3}, and there it was: the {co}!",
            "They walked and walked, and then {N} saw the {co} {s3}.",
        ),
        ("THANK",),
    ),
    "high": (
        (
            "One {day}, the wind took the {co} and put it high in a tree.",
            "One {day}, {his} {co} flew up and got stuck in a tall tree.",
            "One {day}, the {o} got stuck on a high branch.",
        ),
        (
            "{N} jumped and jumped, but the branch was too high.",
            "{He} tried to climb, but {he} was too small.",
            "{He} threw a stick, but the {o} did not move.",
        ),
        ("{N} felt {bad}.", "{He} looked up and was {bad}."),
        ("MEET",),
        ("ASK",),
        ('"My {o} is up there," said {N}.', '"I cannot reach my {co}," said {N}.'),
        (
            '"Stand on my back," said {F}.',
            '"I have a long ladder," said {F}. "Wait here."',
            '"Let us shake the tree together," said {F}.',
        ),
        (
            "They tried once. They tried again. Then the {o} came down!",
            "Slowly and carefully, they got the {co} down.",
            "One, two, three! The {o} fell into the soft grass.",
        ),
        ("THANK",),
    ),
    "broken": (
        (
            "One {day}, {N} fell, and the {o} broke.",
            "One {day}, the {co} fell on the floor and broke in {n} parts.",
            "But one {day}, there was a loud crack. The {o} was broken.",
        ),
        ('"Oh no!" cried {N}.', '"Oh no, my {o}!" said {N}.', "{N} picked up the parts with care."),
        ("{He} felt {bad}.", "{He} was {bad} and did not want to eat."),
        ("MEET",),
        ("ASK",),
        ('"My {co} is broken," said {N}.', "{N} showed {fhim} the broken {o}."),
        (
            '"I have some glue at home," said {F}.',
            '"We can mend it with a string," said {F}.',
            '"Nothing is too broken for us," said {F}.',
        ),
        (
            "They worked the whole {day}. In the end, the {o} was as good as new.",
            "{F} held the parts, and {N} put them together. It worked!",
            "They mended it slowly. Now the {o} was even better than before.",
        ),
        ("THANK",),
    ),
    "afraid": (
        (
            "But {N} was afraid of {fear}.",
            "There was one thing that {N} did not like: {fear}.",
            "{N} had a secret. {He} was afraid of {fear}.",
        ),
        (
            "One {day}, {he} hid {s1} and did not come out.",
            "One {day}, {he} was so afraid that {he} hid {s1}.",
            "One {day}, {he} shook and could not say a word.",
        ),
        ("MEET",),
        ("ASK",),
        (
            '"I am afraid of {fear}," said {N} in a small voice.',
            '"Please do not laugh," said {N}. "I am afraid of {fear}."',
        ),
        (
            '"I was afraid too, once," said {F}. "Take my hand."',
            '"We can be brave together," said {F}.',
            '"Being brave means to try, even when you are afraid," said {F}.',
        ),
        (
            "{N} took a deep breath and counted to {n}. It was not so bad!",
            "Step by step, they went on. Nothing bad happened.",
            "{N} held on to {F}, and the fear became smaller and smaller.",
        ),
        ('"I did it!" said {N}.', '"I am not afraid any more!" said {N}.', '"Look at me!" cried {N}. "I am brave!"'),
    ),
    "quarrel": (
        ("{N} had a friend, {afk} named {F}.", "{His} best friend was {F} the {fk}."),
        ("One {day}, both wanted to play with the {co}.", "One {day}, {N} and {F} found {aco} {s1}. Both wanted it."),
        (
            '"It is mine!" said {N}. "No, it is mine!" said {F}.',
            '"Give it to me!" cried {N}. "I saw it first!" said {F}.',
            '"You always take everything!" said {F}. "That is not true!" said {N}.',
        ),
        ("They did not talk for the rest of the {day}.", "{F} went away, and {N} was alone with the {o}."),
        (
            "But it was no fun to play alone. {N} felt {bad}.",
            "Now {N} had the {o}, but {he} had no friend. {He} felt {bad}.",
        ),
        ("So {he} went to {F} and knocked on the door.", "The next {day}, {he} ran to the house of {F}."),
        ('"I am sorry," said {N}. "Let us share it."', '"I was wrong," said {N}. "You can play with it first."'),
        ('"I am sorry too," said {F}.', '{F} smiled. "Sharing is a good idea," {fhe} said.'),
    ),
    "way home": (
        (
            "One {day}, {N} walked too far and lost {his} way.",
            "One {day}, {N} followed a butterfly and did not look at the path. Soon {he} was lost.",
            "One {day}, {he} went for a long walk, and then {he} did not know the way home.",
        ),
        ("{He} saw only tall trees.", "Every path looked the same.", "It was getting dark."),
        ("{N} was {bad}.", '"Where is my home?" {he} said. {He} was {bad}.'),
        ("MEET",),
        ("ASK",),
        ('"I do not know the way home," said {N}.', '"I am lost," said {N}. "I live {p}."'),
        (
            '"Follow the river," said {F}. "I will come with you."',
            '"Look at that bright star," said {F}. "It shows the way."',
            '"I know the way," said {F}. "Come with me."',
        ),
        (
            "They walked over a bridge and up a hill. Then {N} saw the light in {his} window.",
            "They walked for a long time, and they sang a song. At last, {N} saw {his} home.",
            "After {n} turns, there was the house!",
        ),
        ("THANK",),
    ),
    "hurt bird": (
        (
            "One {day}, {N} found a small bird {s1}. Its wing was hurt.",
            "One {day}, {he} heard a soft cry. A little bird lay {s1} and could not fly.",
        ),
        ('"Poor little bird," said {N}. "I will help you."', '"Do not be afraid," {N} said to the bird.'),
        (
            "{He} put the bird in a warm box and gave it water and seeds.",
            "{He} made a soft bed for it and gave it some bread.",
        ),
        ("{F} the {fk} helped {him} every day.", "{His} friend {F} the {fk} brought fresh water every morning."),
        ("After {n} days, the bird began to sing.", "After {n} days, the wing was strong again."),
        (
            "Then it was time to say goodbye. The bird flew up into the blue sky.",
            '"Fly, little bird," said {N}. And the bird flew.',
        ),
        ("{N} was {good} and a little sad.", "{N} waved until {he} could not see it any more."),
        (
            "But every spring, the bird came back and sang at {his} window.",
            "The next day, the bird came back and sang a song for {him}.",
        ),
    ),
    "seed": (
        ("One {day}, {N} found a small seed {s1}.", "One {day}, {F} the {fk} gave {N} a tiny seed."),
        ("{He} put it in the ground and gave it water.", "{He} made a hole, put the seed in, and gave it some water."),
        (
            'The next day, {he} looked. Nothing. "Why does it not grow?" asked {N}.',
            '{He} waited one day, and then two days. Nothing came up. "It does not like me," said {N}.',
        ),
        (
            '"You must wait," said {F} the {fk}. "Good things need time."',
            '"Be patient," said {F} the {fk}. "It is sleeping in the ground."',
        ),
        ("So {N} waited. The rain came, and the sun came.", "{N} gave it water every morning and sang to it."),
        (
            "And one {day}, there was a small green leaf!",
            "Then, after {n} weeks, something green came out of the ground.",
        ),
        ("It grew and grew, until a big {c} flower opened.", "It grew tall, and at the top there was a {c} flower."),
        ('"It was worth the wait," said {N}.', '"Look, {F}! It is so beautiful!" cried {N}.'),
    ),
    "heavy": (
        (
            "One {day}, a big rock lay on the path to {his} house.",
            "One {day}, {N} found a huge pumpkin. It was too big to carry.",
            "One {day}, {N} wanted to bring home a heavy box.",
        ),
        ("{He} pushed and pushed, but it did not move.", "{He} pulled with all {his} power, but it was too heavy."),
        ("{N} was {bad}.", '"I am too small," said {N}. {He} was {bad}.'),
        ("MEET",),
        ("ASK",),
        ('"It is too heavy for me," said {N}.', '"I cannot move it alone," said {N}.'),
        ('"Then we push together," said {F}.', '"Let us call the others," said {F}. Soon {n} friends came.'),
        ('"One, two, three!" they called. And it moved!', "They pushed and pulled, and slowly it began to roll."),
        ("THANK",),
    ),
    "lonely": (
        ("{N} was new {p} and did not know anyone.", "{N} had no friends yet."),
        (
            "Every {day}, {he} sat alone {s1} and played with {his} {co}.",
            "{He} watched the others play, but {he} was too shy to ask.",
        ),
        ("{He} felt {bad}.", "{N} was {bad}."),
        (
            "One {day}, the {o} rolled away and stopped at the feet of {afk}.",
            "One {day}, {afk} came and sat down next to {him}.",
        ),
        (
            '"Hello, I am {F}," said the {fk}. "What is your name?"',
            '"Hi! My name is {F}," said the {fk}. "Is this your {o}?"',
        ),
        ('"I am {N}," {he} said.', '"My name is {N}," {he} said in a quiet voice.'),
        ('"Do you want to play with me?" asked {F}.', '"Your {co} is great! Can we play?" asked {F}.'),
        ("{N} smiled for the first time in days.", '"Yes, please!" said {N}.'),
    ),
    "birthday": (
        ("Tomorrow was the birthday of {F} the {fk}.", "{His} friend {F} the {fk} had a birthday soon."),
        ("{N} wanted to make a surprise.", "{N} had no money for a gift, but {he} had an idea."),
        ("{He} baked a cake with {n} candles.", "{He} made a cake with honey and nuts."),
        ("{He} also put {aco} in a box with a ribbon.", "Then {he} painted a card and wrapped {aco} in paper."),
        (
            "But on the way, {he} fell, and the cake fell too! {N} was {bad}.",
            "But a hungry mouse ate half of the cake! {N} was {bad}.",
        ),
        (
            '"Happy birthday," said {N}. "I am sorry about the cake."',
            '"I had a cake for you, but now it is small," said {N}.',
        ),
        (
            '{F} laughed. "You are here. That is the best gift," {fhe} said.',
            '"I do not need a big cake," said {F}. "I need a good friend."',
        ),
        ("They opened the box, and {F} loved the {co}.", "They ate the rest of the cake, and it was very good."),
    ),
    "race": (
        ("One {day}, there was a big race {p}.", "One {day}, everyone came to see the big race."),
        (
            '"I will win!" said {F} the {fk}. {N} said nothing.',
            '{F} the {fk} was very fast. "Nobody can beat me," {fhe} said.',
        ),
        ("One, two, three, go! {F} ran like the wind, and {N} ran behind.", "They ran past {tp}, and {F} was first."),
        ("Then {F} fell and hurt {fhis} foot.", "But near the end, {F} fell into the mud."),
        ("{N} could win now. But {he} stopped.", "{N} looked at the goal, and {he} looked at {F}. Then {he} stopped."),
        ('"Come, I will help you," said {N}.', '"Take my hand," said {N}. "A friend is more than a race."'),
        ("They went over the line together, and everyone cheered.", "They came last, but everyone cheered for them."),
        ("They both got {aco} as a prize.", "Each of them got a cookie as a prize."),
    ),
    "rain": (
        (
            "One {day}, {N} and {F} the {fk} planned a picnic.",
            "One {day}, {N} wanted to have a picnic with {F} the {fk}.",
        ),
        ("They packed bread, apples, and {aco}.", "They put cookies and {aco} in a basket."),
        ("But then dark clouds came, and it began to rain.", "But when they sat down, big drops fell from the sky."),
        ('"Our picnic!" cried {N}. {He} was {bad}.', "{N} looked at the wet bread and was {bad}."),
        ('"I have an idea," said {F}. "Come to my house."', '"Rain is not so bad," said {F}. "Let us go inside."'),
        (
            "They put a blanket on the floor and had the picnic there.",
            "They made a tent out of a blanket and ate in it.",
        ),
        ("They told stories and listened to the rain.", "Then they put on boots and jumped in the puddles."),
        ('"This is the best picnic ever," said {N}.', '"I like rain now," said {N}.'),
    ),
    "sleep": (
        ("One night, {N} could not sleep.", "It was late, but {N} was still awake."),
        ("{He} turned left, and {he} turned right.", "{He} closed {his} eyes, but they opened again."),
        ("{He} counted to twenty. It did not help.", "{He} drank some milk. It did not help."),
        ("So {he} went to the window. There was {F} the {fk}.", "Then {F} the {fk} looked in at the door."),
        ('"I cannot sleep," said {N}.', '"Why are you awake?" asked {F}. "I do not know," said {N}.'),
        ('"Let us look at the stars," said {F}.', '"I will sing you a song," said {F}.'),
        (
            "The moon was round and bright, and the wind was soft.",
            "The song was slow and soft, like the wind in the trees.",
        ),
        ("{N} hugged {his} {co}, and {his} eyes became heavy.", "Before the end, {N} was asleep."),
        ('"Good night, {N}," said {F}.', '"Sleep well," {F} said softly.'),
    ),
}
FEARS = ("the dark", "the thunder", "deep water", "loud noises", "the big dog", "high places", "the old well")
THEMES = tuple(PLOTS)
SHARED = {"MEET": MEETINGS, "ASK": ASKS, "THANK": THANKS}
NEEDS_THING = {"lost", "high", "broken", "lonely", "sleep"}


def story(random: Random, b: Brief) -> str:
    """One story of about 120 to 220 words that keeps to its brief; two paragraphs or more now and then."""
    words = _words(random, b)
    words["a_adj"], words["a_adj2"], words["fear"] = article(words["adj"]), article(words["adj2"]), random.choice(FEARS)
    sentences = [random.choice(OPENINGS)]
    if b.theme in NEEDS_THING or random.random() < 0.3:
        sentences.append(random.choice(HABITS))
    if random.random() < 0.6:
        sentences.append("{w}")
    breaks = {len(sentences)} if random.random() < 0.5 else set()
    for variants in PLOTS[b.theme]:
        variants = SHARED.get(variants[0], variants)
        sentences.append(random.choice(variants))
    if b.theme != "sleep":
        sentences.append(random.choice(ENDINGS))
        if breaks:
            breaks.add(len(sentences) - random.choice((1, 2)))
    gaps = ["\n\n" if index in breaks else " " for index in range(len(sentences))]
    return "".join(gap + text.format_map(words) for gap, text in zip(gaps, sentences, strict=True)).strip()


def plan(random: Random, b: Brief) -> str:
    """The reasoning that goes before a story."""
    about = {
        "lost": "loses {aco}",
        "high": "must get {aco} down from a tree",
        "broken": "breaks {aco}",
        "afraid": "is afraid of something",
        "quarrel": "has a quarrel about {aco}",
        "way home": "loses the way home",
        "hurt bird": "helps a hurt bird",
        "seed": "plants a seed",
        "heavy": "must move something heavy",
        "lonely": "has no friends yet",
        "birthday": "makes a birthday surprise",
        "race": "runs in a race",
        "rain": "has a picnic in the rain",
        "sleep": "cannot sleep",
    }[b.theme].format(aco=article(f"{b.colour} {b.thing}"))
    ending = random.choice(("The end should be happy.", "In the end, all is well.", "It should end well."))
    return (
        f"The story is about {article(b.kind)} named {b.name} {b.place[0]}. {b.name} {about}. "
        f"{b.friend} the {b.friend_kind} is the friend. {ending}"
    )
