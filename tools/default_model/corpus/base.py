"""What a domain of the corpus gives: a dialogue a draw, with its right answer if there is one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

Role = Literal["user", "assistant"]
T = TypeVar("T")
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns that begin with the user's and end with the assistant's.

    `answer` is the one right last turn, or None where several are right (a story, a joke);
    `must_contain` are the words that a right last turn has to have all the same, as a hero's name.
    """

    turns: tuple[tuple[Role, str], ...]
    answer: str | None = None
    must_contain: tuple[str, ...] = ()

    @staticmethod
    def single(question: str, answer: str) -> Dialogue:
        """A question and its one right answer."""
        return Dialogue((("user", question), ("assistant", answer)), answer)

    def is_right(self, reply: str) -> bool:
        """Whether `reply` (whole, without the end token) is right."""
        if self.answer is not None:
            return reply.strip() == self.answer
        return all(word in reply for word in self.must_contain)


Sampler = Callable[[Random, bool], Dialogue]
"""(rng, held_out) -> a dialogue of the training part, or of the part that training never sees."""


def is_held_out(*key: object) -> bool:
    """Whether the item that `key` names is kept from training; the same on every machine."""
    text = "|".join(str(part) for part in key)
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


def until(draw: Callable[[], T], key: Callable[[T], tuple[object, ...]], held_out: bool) -> T:
    """Draw until the item belongs to the wanted part."""
    while True:
        item = draw()
        if is_held_out(*key(item)) == held_out:
            return item


def listing(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def article(noun: str) -> str:
    """`a ball`, `an owl`."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def casual(rng: Random, question: str) -> str:
    """The question as people type it: in one case of four without its stop, or with a greeting."""
    kind = rng.random()
    if kind < 0.08:
        return question.rstrip("?.")
    if kind < 0.16:
        return question[0].lower() + question[1:]
    if kind < 0.20:
        return f"Please {question[0].lower()}{question[1:]}" if question.endswith(".") else question
    if kind < 0.25:
        return f"{rng.choice(('Hi!', 'Hello!', 'Hey,'))} {question}"
    return question
