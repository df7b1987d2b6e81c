"""Words of the tiny world: everything that a generated text can name. Written for this project."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = words("""
    Mia Anna Lucy Rosa Lily Emma Nora Ella Zoe Ruby Clara Ivy Maya Lena Tara Dora Hana Mei Nina Olga Pia Sara
    Tess Una Vera Wendy Yuki Amy Beth Cora Daisy Eva Flora Grace Heidi Iris Jane Kate Luna Molly Nell Opal Polly
    Rita Suki Tina Willa Zara Alma Bella
""")
BOYS = words("""
    Tom Ben Leo Max Sam Finn Jack Noah Omar Paul Ravi Theo Hugo Ivan Jon Karl Luca Milo Nico Otto Pete Rex Sven
    Tim Umar Vito Will Yann Zed Adam Bob Carl Dan Eli Fred Gus Hans Igor Joe Kai Lars Mark Ned Oscar Phil Rob
    Seth Toby Viktor Wang
""")
PETS = words("""
    Pip Dot Coco Bobo Fifi Momo Nib Rolo Taffy Waffle Biscuit Pepper Button Clover Hazel Pebble Sunny Ziggy Tiko
    Bramble Maple Nutmeg Olive Puddle Quill Rusty Smoky Tinker Velvet Whisker Dusty Echo Fern Ginger Honey Jelly
    Kiki Lulu Mango Noodle
""")


@dataclass(frozen=True)
class Animal:
    name: str
    plural: str
    sound: str
    food: str
    home: str
    colour: str
    legs: int


def _animals(table: str) -> tuple[Animal, ...]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return tuple(
        Animal(name, plural, sound, food, home, colour, int(legs))
        for name, plural, sound, food, home, colour, legs in rows
    )


ANIMALS = _animals("""
fox|foxes|bark|berries|den|red|4
rabbit|rabbits|squeak|carrots|burrow|white|4
bear|bears|growl|honey|cave|brown|4
owl|owls|hoot|mice|hollow tree|brown|2
mouse|mice|squeak|cheese|hole|grey|4
duck|ducks|quack|bread|pond|yellow|2
frog|frogs|croak|flies|pond|green|4
cat|cats|meow|fish|basket|black|4
dog|dogs|bark|bones|kennel|brown|4
cow|cows|moo|grass|barn|white|4
horse|horses|neigh|hay|stable|brown|4
pig|pigs|oink|corn|sty|pink|4
sheep|sheep|baa|grass|meadow|white|4
hen|hens|cluck|seeds|coop|brown|2
lion|lions|roar|meat|savanna|yellow|4
elephant|elephants|trumpet|leaves|savanna|grey|4
monkey|monkeys|chatter|bananas|jungle|brown|4
bee|bees|buzz|nectar|hive|yellow|6
bird|birds|chirp|worms|nest|blue|2
squirrel|squirrels|chatter|nuts|tree|red|4
hedgehog|hedgehogs|snuffle|beetles|hedge|brown|4
turtle|turtles|hiss|leaves|shell|green|4
wolf|wolves|howl|meat|den|grey|4
goat|goats|bleat|grass|hill|white|4
penguin|penguins|honk|fish|ice|black|2
snail|snails|hum|lettuce|shell|brown|0
deer|deer|grunt|leaves|forest|brown|4
otter|otters|whistle|fish|river|brown|4
dragon|dragons|roar|hot soup|mountain|green|4
goose|geese|honk|grass|pond|white|2
""")
BY_NAME = {animal.name: animal for animal in ANIMALS}

# (after a preposition of place, bare noun phrase)
PLACES = (
    ("in the forest", "the forest"),
    ("in the garden", "the garden"),
    ("at the beach", "the beach"),
    ("in the park", "the park"),
    ("on the farm", "the farm"),
    ("by the river", "the river"),
    ("on the hill", "the hill"),
    ("in the village", "the village"),
    ("by the lake", "the lake"),
    ("in the meadow", "the meadow"),
    ("at the market", "the market"),
    ("in the city", "the city"),
    ("on the island", "the island"),
    ("in the mountains", "the mountains"),
    ("at the school", "the school"),
    ("near the castle", "the castle"),
    ("in the jungle", "the jungle"),
    ("by the sea", "the sea"),
    ("in the valley", "the valley"),
    ("by the pond", "the pond"),
)
OBJECTS = words("""
    ball kite hat book drum boat lamp bell scarf cup key ring doll car bag coat shoe spoon basket umbrella
    blanket flute pencil box coin balloon bucket apple cookie feather map clock
""")
COLOURS = words("""
    red blue green yellow pink brown black white orange purple grey
""")
SPOTS = (
    "under the bed",
    "behind the door",
    "on the table",
    "in the box",
    "under the old tree",
    "behind the sofa",
    "on the shelf",
    "in the kitchen",
    "under the chair",
    "next to the window",
    "in the basket",
    "behind the big rock",
    "in the tall grass",
    "on the roof",
    "near the gate",
    "in the drawer",
    "under the bridge",
    "beside the well",
    "on the bench",
    "in the barn",
    "behind the curtain",
    "inside the cupboard",
    "under the stairs",
    "in the bathroom",
    "on the piano",
    "in the blue bag",
    "next to the lamp",
    "behind the house",
)
FOODS = words("""
    apples pears plums cherries bread soup rice noodles cake honey cheese carrots pancakes grapes nuts beans
    corn cookies eggs fish
""")
JOBS = words("""
    baker farmer teacher doctor painter singer pilot sailor driver cook gardener writer
""")
WEATHER = (
    "It was a sunny day.",
    "It was a warm morning.",
    "The sky was blue and clear.",
    "A soft wind was blowing.",
    "It was a cold winter day.",
    "The snow was white and deep.",
    "It was a rainy afternoon.",
    "Grey clouds hung in the sky.",
    "It was a bright spring morning.",
    "The leaves were red and gold.",
    "It was a hot summer day.",
    "A little fog lay over the grass.",
    "The stars were shining.",
    "The sun was just coming up.",
    "The birds were singing.",
    "It was a quiet evening.",
)
ADJECTIVES = words("""
    little small brave kind shy clever cheerful curious gentle young happy funny sleepy friendly quiet
""")
GOOD = ("happy", "proud", "glad", "very happy", "so happy", "full of joy", "thankful", "calm")
BAD = ("sad", "worried", "upset", "very sad", "unhappy", "a little afraid", "lonely")
NUMBERS = words("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty
""")
DAYS = words("""
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
""")
MONTHS = words("""
    January February March April May June July August September October November December
""")
OPPOSITES = (
    ("big", "small"),
    ("hot", "cold"),
    ("up", "down"),
    ("fast", "slow"),
    ("day", "night"),
    ("happy", "sad"),
    ("open", "closed"),
    ("old", "young"),
    ("full", "empty"),
    ("wet", "dry"),
    ("hard", "soft"),
    ("long", "short"),
    ("light", "dark"),
    ("loud", "quiet"),
    ("high", "low"),
    ("near", "far"),
    ("good", "bad"),
    ("left", "right"),
    ("in", "out"),
    ("black", "white"),
    ("early", "late"),
    ("clean", "dirty"),
    ("strong", "weak"),
    ("rich", "poor"),
)
COLOUR_OF = (
    ("the sky", "blue"),
    ("grass", "green"),
    ("snow", "white"),
    ("the sun", "yellow"),
    ("a banana", "yellow"),
    ("a lemon", "yellow"),
    ("a strawberry", "red"),
    ("milk", "white"),
    ("coal", "black"),
    ("a carrot", "orange"),
    ("a leaf in summer", "green"),
    ("the sea", "blue"),
    ("chocolate", "brown"),
    ("a cherry", "red"),
    ("a cloud", "white"),
    ("the night", "black"),
    ("a pumpkin", "orange"),
    ("a plum", "purple"),
)

_ONSETS = words("""
    b d f g k l m n p r s t v z
""")
_VOWELS = words("""
    a e i o u
""")


def article(phrase: str) -> str:
    """`phrase` with the indefinite article that its first letter asks for."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def plural(noun: str) -> str:
    if noun.endswith(("x", "s", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def invented_word(random: Random) -> str:
    """A word that no list holds, so that only copying can repeat it."""
    return "".join(random.choice(_ONSETS) + random.choice(_VOWELS) for _ in range(random.choice((2, 2, 3))))


def person(random: Random) -> tuple[str, str]:
    """A first name and "girl" or "boy"; one in eight is invented."""
    kind = random.choice(("girl", "boy"))
    if random.random() < 0.125:
        return capital(invented_word(random)), kind
    return random.choice(GIRLS if kind == "girl" else BOYS), kind
