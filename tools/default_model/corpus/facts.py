"""A small world of true facts, each asked in four wordings.

What is held out is a fact in one of its wordings: training shows it in the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from default_model.corpus.base import Dialogue, article, capital, casual, until

COUNTRIES = {
    "France": ("Paris", "French", "Europe"),
    "Spain": ("Madrid", "Spanish", "Europe"),
    "Italy": ("Rome", "Italian", "Europe"),
    "Germany": ("Berlin", "German", "Europe"),
    "Portugal": ("Lisbon", "Portuguese", "Europe"),
    "Greece": ("Athens", "Greek", "Europe"),
    "Poland": ("Warsaw", "Polish", "Europe"),
    "Sweden": ("Stockholm", "Swedish", "Europe"),
    "Norway": ("Oslo", "Norwegian", "Europe"),
    "Austria": ("Vienna", "German", "Europe"),
    "Hungary": ("Budapest", "Hungarian", "Europe"),
    "England": ("London", "English", "Europe"),
    "Ireland": ("Dublin", "English", "Europe"),
    "Japan": ("Tokyo", "Japanese", "Asia"),
    "China": ("Beijing", "Chinese", "Asia"),
    "Vietnam": ("Hanoi", "Vietnamese", "Asia"),
    "Thailand": ("Bangkok", "Thai", "Asia"),
    "Egypt": ("Cairo", "Arabic", "Africa"),
    "Morocco": ("Rabat", "Arabic", "Africa"),
    "Kenya": ("Nairobi", "Swahili", "Africa"),
    "Cuba": ("Havana", "Spanish", "North America"),
    "Brazil": ("Brasilia", "Portuguese", "South America"),
    "Peru": ("Lima", "Spanish", "South America"),
    "Chile": ("Santiago", "Spanish", "South America"),
}
ANIMALS = {
    "dog": ("4", "barks", "puppy", "meat"),
    "cat": ("4", "meows", "kitten", "fish"),
    "cow": ("4", "moos", "calf", "grass"),
    "horse": ("4", "neighs", "foal", "grass"),
    "sheep": ("4", "bleats", "lamb", "grass"),
    "goat": ("4", "bleats", "kid", "leaves"),
    "pig": ("4", "oinks", "piglet", "corn"),
    "hen": ("2", "clucks", "chick", "seeds"),
    "duck": ("2", "quacks", "duckling", "plants"),
    "goose": ("2", "honks", "gosling", "grass"),
    "owl": ("2", "hoots", "owlet", "mice"),
    "lion": ("4", "roars", "cub", "meat"),
    "bear": ("4", "growls", "cub", "fish"),
    "wolf": ("4", "howls", "pup", "meat"),
    "frog": ("4", "croaks", "tadpole", "insects"),
    "elephant": ("4", "trumpets", "calf", "leaves"),
}
OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("tall", "short"),
    ("fast", "slow"),
    ("happy", "sad"),
    ("old", "young"),
    ("wet", "dry"),
    ("full", "empty"),
    ("good", "bad"),
    ("hard", "soft"),
    ("strong", "weak"),
    ("clean", "dirty"),
)
COLORS = {
    "grass": "green",
    "snow": "white",
    "milk": "white",
    "blood": "red",
    "coal": "black",
    "chocolate": "brown",
    "a banana": "yellow",
    "a lemon": "yellow",
    "a tomato": "red",
    "a carrot": "orange",
    "the sky": "blue",
    "the sun": "yellow",
    "an elephant": "gray",
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = {
    "January": "31",
    "February": "28 or 29",
    "March": "31",
    "April": "30",
    "May": "31",
    "June": "30",
    "July": "31",
    "August": "31",
    "September": "30",
    "October": "31",
    "November": "30",
    "December": "31",
}
SPANS = {
    "days are in a week": "7 days in a week",
    "months are in a year": "12 months in a year",
    "hours are in a day": "24 hours in a day",
    "minutes are in an hour": "60 minutes in an hour",
    "seconds are in a minute": "60 seconds in a minute",
}
PROFESSIONS = {
    "baker": ("makes bread", "in a bakery"),
    "teacher": ("teaches children", "in a school"),
    "doctor": ("helps sick people", "in a hospital"),
    "farmer": ("grows food", "on a farm"),
    "cook": ("makes meals", "in a kitchen"),
    "sailor": ("sails ships", "on a ship"),
    "pilot": ("flies planes", "in a plane"),
    "singer": ("sings songs", "on a stage"),
}
PLURALS = {
    "cat": "cats",
    "box": "boxes",
    "bus": "buses",
    "city": "cities",
    "baby": "babies",
    "leaf": "leaves",
    "wolf": "wolves",
    "knife": "knives",
    "child": "children",
    "man": "men",
    "woman": "women",
    "foot": "feet",
    "tooth": "teeth",
    "mouse": "mice",
    "goose": "geese",
    "sheep": "sheep",
}


@dataclass(frozen=True, slots=True)
class Form:
    """Facts of one kind: {it} is what is asked about, {a} the same with its article."""

    wordings: tuple[str, ...]
    answer: str
    facts: Mapping[str, str]


def column(table: Mapping[str, tuple[str, ...]], index: int) -> dict[str, str]:
    """One property of everything in a table."""
    return {name: values[index] for name, values in table.items()}


def following(names: tuple[str, ...]) -> dict[str, str]:
    """What comes after each of the names, around the circle."""
    return dict(zip(names, names[1:] + names[:1], strict=True))


def preceding(names: tuple[str, ...]) -> dict[str, str]:
    """What comes before each of the names, around the circle."""
    return {after: before for before, after in following(names).items()}


def order_forms(kind: str, names: tuple[str, ...]) -> tuple[Form, Form]:
    """Questions about what comes after and before."""
    after, before = (
        Form(
            (
                f"Which {kind} comes {side} {{it}}?",
                f"What {kind} comes {side} {{it}}?",
                f"What is the {kind} {side} {{it}}?",
                f"Tell me the {kind} {side} {{it}}.",
            ),
            f"{{value}} comes {side} {{it}}.",
            table,
        )
        for side, table in (("after", following(names)), ("before", preceding(names)))
    )
    return after, before


COUNTRY_FORMS = (
    Form(
        (
            "What is the capital of {it}?",
            "What is the capital city of {it}?",
            "Which city is the capital of {it}?",
            "Tell me the capital of {it}.",
        ),
        "The capital of {it} is {value}.",
        column(COUNTRIES, 0),
    ),
    Form(
        (
            "What language do people speak in {it}?",
            "Which language do people speak in {it}?",
            "What do people in {it} speak?",
            "Tell me the language of {it}.",
        ),
        "People in {it} speak {value}.",
        column(COUNTRIES, 1),
    ),
    Form(
        (
            "Where is {it}?",
            "On which continent is {it}?",
            "What continent is {it} in?",
            "Tell me where {it} is.",
        ),
        "{it} is in {value}.",
        column(COUNTRIES, 2),
    ),
)
ANIMAL_FORMS = (
    Form(
        (
            "How many legs does {a} have?",
            "How many legs has {a}?",
            "What number of legs does {a} have?",
            "Tell me how many legs {a} has.",
        ),
        "{a} has {value} legs.",
        column(ANIMALS, 0),
    ),
    Form(
        (
            "What sound does {a} make?",
            "What noise does {a} make?",
            "Which sound does {a} make?",
            "Tell me the sound of {a}.",
        ),
        "{a} {value}.",
        column(ANIMALS, 1),
    ),
    Form(
        (
            "What is a baby {it} called?",
            "What is the baby of {a} called?",
            "What do you call a baby {it}?",
            "Tell me the name of a baby {it}.",
        ),
        "A baby {it} is called {value}.",
        {name: article(baby) for name, baby in column(ANIMALS, 2).items()},
    ),
    Form(
        (
            "What does {a} eat?",
            "What food does {a} eat?",
            "What is the food of {a}?",
            "Tell me what {a} eats.",
        ),
        "{a} eats {value}.",
        column(ANIMALS, 3),
    ),
)
WORD_FORMS = (
    Form(
        (
            "What is the opposite of {it}?",
            "Which word is the opposite of {it}?",
            "What is the contrary of {it}?",
            "Tell me the opposite of {it}.",
        ),
        "The opposite of {it} is {value}.",
        dict(OPPOSITES) | {right: left for left, right in OPPOSITES},
    ),
    Form(
        (
            "What is the plural of {it}?",
            "What is the plural of the word {it}?",
            "Which word is the plural of {it}?",
            "Tell me the plural of {it}.",
        ),
        "The plural of {it} is {value}.",
        PLURALS,
    ),
    Form(
        (
            "What color is {it}?",
            "Which color is {it}?",
            "What is the color of {it}?",
            "Tell me the color of {it}.",
        ),
        "{it} is {value}.",
        COLORS,
    ),
)
CALENDAR_FORMS = (
    *order_forms("day", DAYS),
    *order_forms("month", tuple(MONTHS)),
    Form(
        (
            "How many days are in {it}?",
            "How many days does {it} have?",
            "How many days are there in {it}?",
            "Tell me how many days {it} has.",
        ),
        "{it} has {value} days.",
        MONTHS,
    ),
    Form(
        (
            "How many {it}?",
            "Do you know how many {it}?",
            "Can you tell me how many {it}?",
            "Tell me how many {it}.",
        ),
        "There are {value}.",
        SPANS,
    ),
)
PROFESSION_FORMS = (
    Form(
        (
            "What does {a} do?",
            "What is the work of {a}?",
            "What is the job of {a}?",
            "Tell me what {a} does.",
        ),
        "{a} {value}.",
        column(PROFESSIONS, 0),
    ),
    Form(
        (
            "Where does {a} work?",
            "In which place does {a} work?",
            "What is the place where {a} works?",
            "Tell me where {a} works.",
        ),
        "{a} works {value}.",
        column(PROFESSIONS, 1),
    ),
)
FORMS = COUNTRY_FORMS + ANIMAL_FORMS + WORD_FORMS + CALENDAR_FORMS + PROFESSION_FORMS
FACTS = tuple((form, it) for form in FORMS for it in form.facts)
"""Every fact is as likely as any other."""


def draw_fact(rng: Random) -> tuple[Form, str, str]:
    """A form, what it is about, and a wording."""
    form, it = rng.choice(FACTS)
    return form, it, rng.choice(form.wordings)


def sample(rng: Random, held_out: bool) -> Dialogue:
    """A question about the world."""
    form, it, wording = until(lambda: draw_fact(rng), lambda item: item[1:], held_out)
    names = {"it": it, "a": article(it), "value": form.facts[it]}
    question = wording.format_map(names)
    return Dialogue.single(casual(rng, question), capital(form.answer.format_map(names)))
