"""Questions whose answer stands in the question: who has what, and words to say again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from default_model.corpus.base import Dialogue, article, casual, until
from default_model.corpus.words import (
    ANIMAL_NAMES,
    ANIMALS,
    CHILDREN,
    COLORS,
    FOODS,
    PLACES,
    THINGS,
    made_up_name,
)

SPOTS = (
    "in the box", "under the bed", "on the table", "behind the door", "in the bag",
    "on the chair", "under the tree", "near the lamp", "in the kitchen", "behind the house",
)  # fmt: skip
PUT_AWAY = tuple(thing for thing in THINGS if thing not in ("box", "lamp", "bag"))
WORDS = ANIMALS + COLORS + THINGS + PLACES + FOODS
INTRODUCED = ("Read this: {}", "Here is a text: {}", "Look at this text: {}")
SAY = ("Repeat: {}", "Repeat after me: {}", "Say: {}", "Say this: {}", "Repeat these words: {}")
FIRST = (
    "What is the first word of this list: {}?",
    "What is the first word: {}?",
    "Which word comes first: {}?",
    "Tell me the first word of this list: {}.",
)
LAST = (
    "What is the last word of this list: {}?",
    "What is the last word: {}?",
    "Which word comes last: {}?",
    "Tell me the last word of this list: {}.",
)


@dataclass(frozen=True, slots=True)
class Fact:
    """A sentence, and the questions that it answers: their wordings, and the answer."""

    sentence: str
    asked: tuple[tuple[tuple[str, ...], str], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """Facts to read and the one that is asked about."""

    facts: tuple[Fact, ...]
    about: Fact


def has(name: str, color: str, thing: str) -> Fact:
    """`Tom has a red ball.`"""
    sentence = f"{name} has {article(f'{color} {thing}')}."
    who = (f"Who has the {thing}?", f"Tell me who has the {thing}.", f"Which one has the {thing}?")
    what = (f"What does {name} have?", f"Tell me what {name} has.", f"What thing does {name} have?")
    which = (
        f"What color is the {thing}?",
        f"What is the color of the {thing}?",
        f"Tell me the color of the {thing}.",
    )
    return Fact(
        sentence,
        ((who, f"{name} has the {thing}."), (what, sentence), (which, f"The {thing} is {color}.")),
    )


def lives(name: str, place: str) -> Fact:
    """`Mia lives near the lake.`"""
    sentence = f"{name} lives near the {place}."
    where = (
        f"Where does {name} live?",
        f"Tell me where {name} lives.",
        f"Which place does {name} live near?",
    )
    who = (
        f"Who lives near the {place}?",
        f"Tell me who lives near the {place}.",
        f"Which one lives near the {place}?",
    )
    return Fact(sentence, ((where, sentence), (who, sentence)))


def puts(name: str, thing: str, spot: str) -> Fact:
    """`Ben put the key in the box.`"""
    sentence = f"{name} put the {thing} {spot}."
    where = (
        f"Where is the {thing}?",
        f"Tell me where the {thing} is.",
        f"Where can I find the {thing}?",
    )
    what = (
        f"What is {spot}?",
        f"Tell me what is {spot}.",
        f"Which thing is {spot}?",
    )
    who = (
        f"Who put the {thing} {spot}?",
        f"Tell me who put the {thing} {spot}.",
        f"Which one put the {thing} {spot}?",
    )
    found = f"The {thing} is {spot}."
    return Fact(sentence, ((where, found), (what, found), (who, sentence)))


def likes(name: str, food: str) -> Fact:
    """`Ada likes cheese.`"""
    sentence = f"{name} likes {food}."
    what = (
        f"What does {name} like?",
        f"Tell me what {name} likes.",
        f"Which food does {name} like?",
    )
    who = (f"Who likes {food}?", f"Tell me who likes {food}.", f"Which one likes {food}?")
    return Fact(sentence, ((what, sentence), (who, sentence)))


def draw_names(rng: Random, count: int) -> list[str]:
    """Different names, one of five from no table."""
    names: list[str] = []
    while len(names) < count:
        name = made_up_name(rng) if rng.random() < 0.2 else rng.choice(CHILDREN + ANIMAL_NAMES)
        if name not in names:
            names.append(name)
    return names


def draw_having(rng: Random, names: list[str]) -> list[Fact]:
    """Each has a thing of a color, no two alike in either."""
    count = len(names)
    drawn = zip(names, rng.sample(COLORS, count), rng.sample(THINGS, count), strict=True)
    return [has(*each) for each in drawn]


def draw_living(rng: Random, names: list[str]) -> list[Fact]:
    """Each lives near another place."""
    return [lives(*each) for each in zip(names, rng.sample(PLACES, len(names)), strict=True)]


def draw_putting(rng: Random, names: list[str]) -> list[Fact]:
    """Each put another thing in another spot."""
    count = len(names)
    drawn = zip(names, rng.sample(PUT_AWAY, count), rng.sample(SPOTS, count), strict=True)
    return [puts(*each) for each in drawn]


def draw_liking(rng: Random, names: list[str]) -> list[Fact]:
    """Each likes another food."""
    return [likes(*each) for each in zip(names, rng.sample(FOODS, len(names)), strict=True)]


DRAWS: tuple[Callable[[Random, list[str]], list[Fact]], ...] = (
    draw_having,
    draw_living,
    draw_putting,
    draw_liking,
)


def draw_text(rng: Random) -> Text:
    """Two or three facts about as many people; one text of five mixes what it tells."""
    names = draw_names(rng, rng.choice((2, 2, 3)))
    if rng.random() < 0.2:
        tellings = rng.sample(DRAWS, 2)
        facts = [draw(rng, [name])[0] for draw, name in zip(tellings, names[:2], strict=True)]
    else:
        facts = rng.choice(DRAWS)(rng, names)
    return Text(tuple(facts), rng.choice(facts))


def told(text: Text) -> str:
    """The text as one reads it."""
    return " ".join(fact.sentence for fact in text.facts)


def ask_about_text(rng: Random, held_out: bool) -> Dialogue:
    """A text and a question about it; texts are held out by what they tell."""
    text = until(lambda: draw_text(rng), lambda drawn: ("text", told(drawn)), held_out)
    wordings, answer = rng.choice(text.about.asked)
    question = f"{told(text)} {rng.choice(wordings)}"
    if rng.random() < 0.4:
        question = casual(rng, rng.choice(INTRODUCED).format(question))
    return Dialogue.single(question, answer)


def draw_words(rng: Random) -> tuple[str, ...]:
    """Two to six different words, one list of four with a word of no table."""
    words = rng.sample(WORDS, rng.randint(2, 6))
    if rng.random() < 0.25:
        words[rng.randrange(len(words))] = made_up_name(rng).lower()
    return tuple(words)


def ask_for_words(rng: Random, held_out: bool) -> Dialogue:
    """A list to say again, or its first or last word; lists are held out."""
    words = until(lambda: draw_words(rng), lambda drawn: ("words", *drawn), held_out)
    kind = rng.random()
    if kind < 0.5:
        line = " ".join(words)
        return Dialogue.single(casual(rng, rng.choice(SAY).format(line)), line)
    wordings, place, word = (FIRST, "first", words[0]) if kind < 0.75 else (LAST, "last", words[-1])
    question = rng.choice(wordings).format(", ".join(words))
    return Dialogue.single(casual(rng, question), f"The {place} word is {word}.")


def sample(rng: Random, held_out: bool) -> Dialogue:
    """Two of three are texts to read, the others lists of words."""
    return ask_about_text(rng, held_out) if rng.random() < 0.67 else ask_for_words(rng, held_out)
