"""Sums with their working, tables, order of numbers and short word problems.

A working takes one easy step after the other, always in the same order, so that a small model
needs no more than facts of two digits. Those facts themselves are answered at once.
"""

from __future__ import annotations

from random import Random

from default_model.corpus.base import Dialogue, Sampler, casual, until

DIRECT_SHARE = 0.2
"""Share of the sums that are facts of two digits, as 7 + 5 or 12 - 7."""

ADD = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
)
SUBTRACT = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "How much is {a} minus {b}?",
    "Subtract {b} from {a}.",
)
MULTIPLY = (
    "What is {a} x {b}?",
    "What is {a} times {b}?",
    "How much is {a} times {b}?",
    "Multiply {a} by {b}.",
)
COMPARE = {
    "larger": (
        "Which is larger, {a} or {b}?",
        "Which number is larger, {a} or {b}?",
        "Tell me the larger number of {a} and {b}.",
    ),
    "smaller": (
        "Which is smaller, {a} or {b}?",
        "Which number is smaller, {a} or {b}?",
        "Tell me the smaller number of {a} and {b}.",
    ),
}
NEIGHBOR = {
    "after": (
        "What comes after {n}?",
        "Which number comes after {n}?",
        "What is the number after {n}?",
        "Tell me the number after {n}.",
    ),
    "before": (
        "What comes before {n}?",
        "Which number comes before {n}?",
        "What is the number before {n}?",
        "Tell me the number before {n}.",
    ),
}

NAMES = {"Tom": "He", "Ben": "He", "Sam": "He", "Anna": "She", "Lucy": "She", "Mia": "She"}
ITEMS = ("apples", "books", "coins", "cards", "balls", "eggs")
EVENTS = {
    "+": ("gets {b} more", "finds {b} more", "buys {b} more"),
    "-": ("gives away {b}", "loses {b}", "sells {b}"),
}
STORY = "{name} has {a} {items}. {he} {event}. How many {items} does {name} have now?"


def addition_working(a: int, b: int) -> str:
    """`7 + 5 = 12. 30 + 40 = 70. 70 + 12 = 82.` for 37 + 45."""
    if a < 10 and b < 10:
        return f"{a} + {b} = {a + b}."
    ones = a % 10 + b % 10
    tens = a + b - ones
    steps = (
        f"{a % 10} + {b % 10} = {ones}.",
        f"{a - a % 10} + {b - b % 10} = {tens}.",
        f"{tens} + {ones} = {a + b}.",
    )
    return " ".join(steps)


def subtraction_working(a: int, b: int) -> str:
    """`2 < 5, so 82 = 70 + 12. 12 - 5 = 7. 70 - 40 = 30. 30 + 7 = 37.` for 82 - 45."""
    if b < 10 and a - b < 10:
        return f"{a} - {b} = {a - b}."
    borrow = a % 10 < b % 10
    ones = a % 10 + (10 if borrow else 0)
    tens = a - ones
    ones_left = ones - b % 10
    steps = (
        f"{a % 10} {'<' if borrow else '>='} {b % 10}, so {a} = {tens} + {ones}.",
        f"{ones} - {b % 10} = {ones_left}.",
        f"{tens} - {b - b % 10} = {a - b - ones_left}.",
        f"{a - b - ones_left} + {ones_left} = {a - b}.",
    )
    return " ".join(steps)


def two_numbers(rng: Random) -> tuple[int, int]:
    """Any two below 100, or two digits."""
    last = 9 if rng.random() < DIRECT_SHARE else 99
    return rng.randint(0, last), rng.randint(0, last)


def addition(rng: Random, held_out: bool) -> Dialogue:
    """A sum; both orders of its two numbers are in the same part."""
    a, b = until(
        lambda: two_numbers(rng),
        lambda pair: ("+", min(pair), max(pair)),
        held_out,
    )
    question = rng.choice(ADD).format(a=a, b=b)
    answer = f"{addition_working(a, b)} The answer is {a + b}."
    return Dialogue.single(casual(rng, question), answer)


def draw_difference(rng: Random) -> tuple[int, int]:
    """A number below 100 and a smaller one, or a fact as 12 - 7 or 9 - 2."""
    a, b = two_numbers(rng)
    if a < 10 and b < 10:
        return a + b, b
    return max(a, b), min(a, b)


def subtraction(rng: Random, held_out: bool) -> Dialogue:
    """A difference, never below zero."""
    a, b = until(lambda: draw_difference(rng), lambda pair: ("-", *pair), held_out)
    question = rng.choice(SUBTRACT).format(a=a, b=b)
    answer = f"{subtraction_working(a, b)} The answer is {a - b}."
    return Dialogue.single(casual(rng, question), answer)


def multiplication(rng: Random, held_out: bool) -> Dialogue:
    """From the tables. They are learnt by heart, so a wording is held out and not a product."""
    a, b, wording = until(
        lambda: (rng.randint(0, 10), rng.randint(0, 10), rng.choice(MULTIPLY)),
        lambda item: item,
        held_out,
    )
    question = wording.format(a=a, b=b)
    return Dialogue.single(casual(rng, question), f"{a} x {b} = {a * b}. The answer is {a * b}.")


def comparison(rng: Random, held_out: bool) -> Dialogue:
    """The larger or the smaller of two different numbers."""
    wanted = rng.choice(tuple(COMPARE))
    a, b = until(
        lambda: rng.sample(range(100), 2),
        lambda pair: (wanted, min(pair), max(pair)),
        held_out,
    )
    low, high = min(a, b), max(a, b)
    first, second = (high, low) if wanted == "larger" else (low, high)
    question = rng.choice(COMPARE[wanted]).format(a=a, b=b)
    return Dialogue.single(casual(rng, question), f"{first} is {wanted} than {second}.")


def neighbor(rng: Random, held_out: bool) -> Dialogue:
    """The next number, or the one before."""
    side = rng.choice(tuple(NEIGHBOR))
    n, wording = until(
        lambda: (rng.randint(1, 99), rng.choice(NEIGHBOR[side])),
        lambda item: item,
        held_out,
    )
    found = n + 1 if side == "after" else n - 1
    question = wording.format(n=n)
    return Dialogue.single(casual(rng, question), f"{found} comes {side} {n}.")


def draw_story(rng: Random) -> tuple[str, int, int, str]:
    """Operation, operands and things; what is left is never one, for the sake of the plural."""
    operation = rng.choice("+-")
    a, b = rng.randint(2, 9), rng.randint(1, 9)
    return operation, a if operation == "+" else a + b, b, rng.choice(ITEMS)


def story(rng: Random, held_out: bool) -> Dialogue:
    """A word problem; what is held out is its numbers together with its things."""
    operation, a, b, items = until(lambda: draw_story(rng), lambda item: ("story", *item), held_out)
    name, he = rng.choice(tuple(NAMES.items()))
    event = rng.choice(EVENTS[operation]).format(b=b)
    question = STORY.format(name=name, a=a, items=items, he=he, event=event)
    result = a + b if operation == "+" else a - b
    answer = f"{a} {operation} {b} = {result}. {name} has {result} {items} now."
    return Dialogue.single(casual(rng, question), answer)


FORMS: tuple[Sampler, ...] = (
    (addition,) * 5
    + (subtraction,) * 5
    + (multiplication,) * 4
    + (story,) * 3
    + (comparison,) * 2
    + (neighbor,)
)


def sample(rng: Random, held_out: bool) -> Dialogue:
    """A question about numbers; half of the draws are sums and differences."""
    return rng.choice(FORMS)(rng, held_out)
