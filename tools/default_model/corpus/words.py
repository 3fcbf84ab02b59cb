"""The small world that the domains share: who lives in it, what they have, where they go."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

GIRLS = (
    "Mia", "Ada", "Lily", "Emma", "Zoe", "Anna", "Lucy",
    "Ella", "Nora", "Ruby", "Sara", "Ivy", "Maya", "Clara",
)  # fmt: skip
BOYS = (
    "Tom", "Ben", "Leo", "Max", "Sam", "Jack", "Noah",
    "Finn", "Oscar", "Theo", "Adam", "Hugo", "Paul", "Eric",
)  # fmt: skip
CHILDREN = GIRLS + BOYS
ANIMALS = (
    "fox", "bear", "cat", "dog", "rabbit", "owl", "mouse",
    "duck", "frog", "horse", "bird", "turtle", "lion", "pig",
)  # fmt: skip
ANIMAL_NAMES = (
    "Pip", "Rusty", "Milo", "Toby", "Bruno", "Otto", "Benny",
    "Luna", "Bella", "Nala", "Tilda", "Mika", "Kira", "Rosa",
)  # fmt: skip
COLORS = (
    "red", "blue", "green", "yellow", "black", "white", "brown", "orange", "pink", "gray",
)  # fmt: skip
THINGS = (
    "ball", "kite", "book", "hat", "key", "cup", "boat", "box", "lamp", "drum",
    "bell", "coat", "doll", "spoon", "ring", "shell", "basket", "scarf", "flower", "bag",
)  # fmt: skip
PLACES = (
    "park", "forest", "river", "garden", "beach", "hill", "lake", "farm", "school", "market",
)  # fmt: skip
FOODS = (
    "bread", "cheese", "cake", "soup", "rice", "honey", "milk", "jam", "fruit", "pie",
)  # fmt: skip

_STARTS = ("Zo", "Mi", "Ra", "Lu", "Ki", "Ta", "Be", "No", "Do", "Fe", "Sa", "Vi", "Ha", "Jo")
_MIDDLES = ("", "", "la", "ri", "do", "me")
_ENDS = ("ra", "lo", "na", "mi", "to", "vi", "ben", "dor", "lin", "mar", "nik", "sel")


@dataclass(frozen=True, slots=True)
class Pronouns:
    """How a text speaks of somebody."""

    he: str
    him: str
    his: str


SHE = Pronouns("she", "her", "her")
HE = Pronouns("he", "him", "his")


def pronouns(kind: str, name: str) -> Pronouns:
    """Those of a girl, a boy, or an animal: she where it has a girl's name or one in -a."""
    if kind in ("girl", "boy"):
        return SHE if kind == "girl" else HE
    return SHE if name in GIRLS or (name.endswith("a") and name not in BOYS) else HE


def made_up_name(rng: Random) -> str:
    """A name of syllables, mostly one that no table has: names of any kind have to be copied."""
    return rng.choice(_STARTS) + rng.choice(_MIDDLES) + rng.choice(_ENDS)
