"""The small language of the demo: facts, questions, and good and bad answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

_OBJECTS = """
kettle|red|metal|kitchen|boil water for tea
lamp|yellow|glass|bedroom|read a book at night
chair|brown|wood|garden|rest after a long walk
umbrella|black|cloth|hall|stay dry in the rain
bucket|blue|plastic|shed|carry water to the plants
blanket|green|wool|attic|keep warm in winter
hammer|grey|metal|shed|put nails in a wall
mirror|silver|glass|bathroom|see your own face
basket|white|straw|kitchen|carry bread from the market
ladder|orange|wood|garage|reach the roof
broom|purple|straw|hall|sweep the floor
clock|gold|metal|office|know what time it is
pillow|pink|cotton|bedroom|sleep with your head high
bottle|green|glass|cellar|keep milk for the morning
rope|brown|cotton|garage|tie the boat to a tree
candle|white|wax|cellar|see when the light fails
drum|red|wood|attic|play music with friends
scarf|blue|wool|office|protect your neck from the wind
spoon|silver|metal|kitchen|eat a bowl of soup
carpet|grey|wool|bathroom|keep your feet warm
"""

_ANIMALS = """
cat|fish|house|sleeps in the sun
horse|grass|field|runs faster than a man
owl|mice|forest|sees well in the dark
bear|berries|mountain|sleeps all winter
duck|bread|pond|swims with its young
goat|leaves|mountain|climbs steep rocks
frog|flies|pond|sings after the rain
rabbit|carrots|field|digs a deep hole
wolf|meat|forest|howls at the moon
sheep|grass|hill|gives us warm wool
monkey|fruit|jungle|swings from tree to tree
parrot|seeds|jungle|repeats what people say
whale|plankton|ocean|sings under the water
seal|fish|ocean|lies on the ice
camel|thorns|desert|walks for days without water
snake|eggs|desert|hides under warm stones
bee|honey|garden|visits every flower
spider|flies|garden|builds a fine web
"""

_DISHES = """
soup|carrots|onions|pot|20
omelette|eggs|cheese|pan|5
salad|tomatoes|cucumbers|bowl|10
pie|apples|sugar|oven|45
stew|beef|potatoes|pot|90
curry|chickpeas|spinach|pan|30
pancakes|flour|milk|pan|15
risotto|rice|mushrooms|pot|25
bread|flour|water|oven|60
porridge|oats|milk|pot|12
lasagne|pasta|tomatoes|oven|50
sandwich|bread|ham|bowl|3
"""

_TOWNS = """
Alder|train|spring|castle|river
Bramble|bus|summer|market|sea
Corran|ferry|autumn|harbour|island
Dunmore|train|winter|museum|hills
Eskdale|bicycle|spring|bridge|river
Farrow|car|summer|lighthouse|sea
Glenby|bus|autumn|library|forest
Hartwell|train|summer|theatre|park
Inver|ferry|winter|church|lake
Jarrow|bus|spring|tower|hills
Kelby|car|autumn|mill|forest
Lorne|bicycle|summer|beach|island
"""

_MOODS = """
tired|go to bed early|drink less coffee|sleep
cold|put on a warm coat|drink hot tea|warmth
bored|call an old friend|learn a new song|company
hungry|cook a simple meal|eat some fruit|food
nervous|breathe slowly|take a short walk|calm
sad|talk to someone you trust|listen to music|comfort
thirsty|drink a glass of water|keep a bottle near you|water
lonely|join a club|visit your family|friends
angry|count to ten|go outside for a while|patience
busy|make a short list|say no to small things|time
"""

# kind: (facts, their columns, questions, good answer, the same in other words, columns made wrong)
_KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str, str, tuple[str, ...]]] = {
    "colour": (
        _OBJECTS,
        ("name", "colour", "material", "place", "use"),
        ("What does the {name} look like?", "Can you describe the {name}?"),
        "The {name} is {colour} and it is made of {material}. You can find it in the {place}.",
        "It is a {colour} {name} of {material}, and the {place} is where we keep it.",
        ("colour", "material", "place"),
    ),
    "use": (
        _OBJECTS,
        ("name", "colour", "material", "place", "use"),
        ("What is the {name} good for?", "Why would I need a {name}?"),
        "You can use the {name} to {use}. It is in the {place}, so you can take it at any time.",
        "People who want to {use} need a {name}, and there is one for you in the {place}.",
        ("use", "place"),
    ),
    "animal": (
        _ANIMALS,
        ("name", "food", "home", "habit"),
        ("What can you tell me about the {name}?", "How does a {name} live?"),
        "The {name} lives in the {home} and eats {food}. It is known as an animal that {habit}.",
        "You will meet a {name} in the {home}. It likes {food}, and people know that it {habit}.",
        ("food", "home", "habit"),
    ),
    "feed": (
        _ANIMALS,
        ("name", "food", "home", "habit"),
        ("What should I feed a {name}?", "I found a hungry {name}, what does it eat?"),
        "You should give the {name} some {food}. Then take it back to the {home}, where it is "
        "safe.",
        "A {name} eats {food}. After the meal, the {home} is the best place to let it go.",
        ("food", "home"),
    ),
    "cook": (
        _DISHES,
        ("name", "first", "second", "vessel", "minutes"),
        ("How do I make {name}?", "Can you give me a recipe for {name}?"),
        "To make {name}, mix the {first} with the {second} and put it all in the {vessel}. "
        "It is ready after {minutes} minutes.",
        "Take {first} and {second}, leave them in the {vessel} for {minutes} minutes, and you will "
        "have good {name}.",
        ("first", "second", "vessel", "minutes"),
    ),
    "travel": (
        _TOWNS,
        ("name", "transport", "season", "sight", "nature"),
        ("How can I get to {name}?", "I want to visit {name}, what should I know?"),
        "You can go to {name} by {transport}, and the best time is {season}. "
        "Do not miss the {sight} near the {nature}.",
        "The {transport} will take you to {name}. Go there in {season} and see the {sight} by the "
        "{nature}.",
        ("transport", "season", "sight", "nature"),
    ),
    "mood": (
        _MOODS,
        ("name", "first", "second", "need"),
        ("I feel {name} today, what should I do?", "What helps when I am {name}?"),
        "If you feel {name}, you should {first}. It also helps to {second}, because you need "
        "{need}.",
        "What you need is {need}. People who are {name} often {first}, and they {second} as well.",
        ("first", "second", "need"),
    ),
}

_UNHELPFUL = (
    "I am not sure about the {name}. You could ask someone else, or look in a book.",
    "That is a hard question, and I do not know much about the {name}. Please try again later.",
)

_UNHELPFUL_MOOD = (
    "I am not sure what to say. You could ask someone else, or look in a book.",
    "That is a hard question, and I do not know much about you. Please try again later.",
)

_SUM = ("What is {a} plus {b}?", "Can you add {a} and {b} for me?")

_SUM_GOOD = "If you add {a} and {b}, you get {c}. So {a} plus {b} is {c}."

_SUM_OTHER = "The answer is {c}, because {a} and {b} together make {c}."


def _fact_table(text: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Reads facts: one thing a line, its columns between bars."""
    lines = text.strip().splitlines()
    return [dict(zip(columns, line.split("|"), strict=True)) for line in lines]


@dataclass(frozen=True)
class _Item:
    """One question with all its answers.

    Attributes:
        kind: What it is about.
        question: In words.
        good: The good answer; `other` says the same in other words.
        other: See `good`.
        near: The wording of `good` with wrong facts; `near_other` that of `other`.
        near_other: See `near`.
        unhelpful: A polite refusal; `unhelpful_other` is another one.
        unhelpful_other: See `unhelpful`.
    """

    kind: str
    question: str
    good: str
    other: str
    near: str
    near_other: str
    unhelpful: str
    unhelpful_other: str


def make_items(seed: int) -> list[_Item]:
    """All questions of the language, in an order that depends on the seed."""
    rng = random.Random(f"lddyn demo {seed}")
    items = []
    for kind, (text, columns, questions, good, other, changed) in _KINDS.items():
        table = _fact_table(text, columns)
        unhelpful = _UNHELPFUL_MOOD if kind == "mood" else _UNHELPFUL
        for fact in table:
            for question in questions:
                wrong = dict(fact)
                for column in changed:
                    others = sorted({row[column] for row in table} - {fact[column]})
                    wrong[column] = rng.choice(others)
                items.append(
                    _Item(
                        kind,
                        question.format(**fact),
                        good.format(**fact),
                        other.format(**fact),
                        good.format(**wrong),
                        other.format(**wrong),
                        unhelpful[0].format(**fact),
                        unhelpful[1].format(**fact),
                    )
                )
    for a in range(1, 10):
        for b in range(1, 10):
            values = {"a": a, "b": b, "c": a + b}
            wrong_sum = {**values, "c": a + b + rng.choice((-2, -1, 1, 2))}
            items.append(
                _Item(
                    "sum",
                    _SUM[(a + b) % 2].format(**values),
                    _SUM_GOOD.format(**values),
                    _SUM_OTHER.format(**values),
                    _SUM_GOOD.format(**wrong_sum),
                    _SUM_OTHER.format(**wrong_sum),
                    "I am not sure about numbers. You could ask someone else, or look in a book.",
                    "That is a hard question, and I do not know much about numbers. "
                    "Please try again later.",
                )
            )
    rng.shuffle(items)
    return items


def _prompt(question: str) -> str:
    """The dialogue up to where the answer begins."""
    return f"Human: {question}\n\nAssistant:"


def make_corpus(items: Sequence[_Item], seed: int) -> list[str]:
    """Texts for pretraining: mostly good answers, some wrong ones and some unhelpful ones."""
    rng = random.Random(f"lddyn demo corpus {seed}")
    texts = []
    for item in items:
        answers = [item.good] * 5 + [item.other] * 4 + [item.near, item.near_other]
        answers += [item.unhelpful, item.unhelpful_other]
        texts += [f"{_prompt(item.question)} {answer}" for answer in answers]
    rng.shuffle(texts)
    return texts


def make_preferences(items: Sequence[_Item], seed: int) -> list[dict[str, str]]:
    """Preference rows with all probing fields.

    A tenth of the answers is in no row's prompt or preference: they are the `irr_test` of the rows.
    """
    rng = random.Random(f"lddyn demo pairs {seed}")
    held_out = {item.good for item in items[-(len(items) // 10) :]}  # with every way to ask for it
    train = [item for item in items if item.good not in held_out]
    test = [item for item in items if item.good in held_out]
    words = sorted({word for item in items for word in item.good.rstrip(".").split()})
    rows = []
    for index, item in enumerate(train):
        kind = ("near", "near", "unhelpful", "near", "unrelated")[index % 5]
        other = rng.choice([x for x in train if x.kind != item.kind])
        same_kind = [x for x in train if x.kind == item.kind and x.good != item.good]
        alike, third = rng.choice(same_kind), rng.choice([x for x in train if x is not item])
        rejected, reject_semantic, reject_format = {
            "near": (item.near, item.near_other, alike.near),
            "unhelpful": (item.unhelpful, item.unhelpful_other, alike.unhelpful),
            "unrelated": (other.good, other.other, third.good),
        }[kind]
        shuffled = item.good.split()
        rng.shuffle(shuffled)
        row = {
            "prompt": _prompt(item.question),
            "chosen": item.good,
            "rejected": rejected,
            "chosen_gptsemantic": item.other,
            "chosen_gptformat": alike.good,
            "reject_gptsemantic": reject_semantic,
            "reject_gptformat": reject_format,
            "irr_train": other.good,
            "irr_test": rng.choice(test).good,
            "random_permute": " ".join(shuffled),
            "random_nonhum": " ".join(rng.choices(words, k=len(shuffled))),
        }
        row = {key: value if key == "prompt" else f" {value}" for key, value in row.items()}
        rows.append({**row, "kind": kind, "topic": item.kind})
    return rows


def cut_text(text: str) -> tuple[str, str]:
    """Splits a dialogue into prompt and answer."""
    prompt, marker, answer = text.partition("Assistant:")
    return prompt + marker, answer
