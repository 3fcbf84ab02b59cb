"""Small Python functions and loops from a description, and calls of them.

A family has one description with a number or a letter in it (then the parameter is held out), or
several descriptions of one and the same function (then the wording is).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from default_model.corpus.base import Dialogue, Role, casual, until

FRAMES = (
    "Write a Python {kind} that {task}.",
    "Write a {kind} that {task}.",
    "Give me a Python {kind} that {task}.",
    "Can you write a {kind} that {task}?",
)
CALLS = (
    "Call {name} with {argument}.",
    "Show me a call of {name} with {argument}.",
    "Write a call of {name} with {argument}.",
    "How do I call {name} with {argument}?",
)
THEN_CALLS = ("Now call it with {argument}.", "Call it with {argument}.")
SHARES = (0.75, 0.9)
"""Below the first a task alone, below the second a call, else a task and then a call of it."""

NUMBERS = tuple(str(number) for number in range(1, 100))
SMALL = tuple(str(number) for number in range(2, 21))
LETTERS = tuple("abcdefghilmnoprstuwy")
WORDS = ("cat", "dog", "red", "tree", "house", "water", "bread", "green", "apple", "sun")


@dataclass(frozen=True, slots=True)
class Family:
    """Code for {n} in `parameters`; `takes` is the kind of its argument, if one can be given."""

    name: str
    tasks: tuple[str, ...]
    code: str
    parameters: tuple[str, ...] = ("",)
    takes: str = ""
    kind: str = "function"


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of code to ask for, in one wording."""

    family: Family
    parameter: str
    wording: str

    @property
    def key(self) -> tuple[str, str]:
        """What is held out: the parameter, or the wording where there is none."""
        return self.family.name, self.parameter or self.wording

    @property
    def name(self) -> str:
        """How the function is called."""
        return self.family.name.format(n=self.parameter)

    @property
    def code(self) -> str:
        """The right answer."""
        return self.family.code.format(n=self.parameter)


def with_number(name: str, task: str, result: str, parameters: tuple[str, ...]) -> Family:
    """A function of one number."""
    code = f"def {name}(x):\n    return {result}"
    return Family(name, (task,), code, parameters, "number")


def of_numbers(name: str, result: str, tasks: tuple[str, ...]) -> Family:
    """A function of a list of numbers."""
    return Family(name, tasks, f"def {name}(numbers):\n    return {result}", takes="list")


def of_text(name: str, result: str, tasks: tuple[str, ...]) -> Family:
    """A function of a text."""
    return Family(name, tasks, f"def {name}(text):\n    return {result}", takes="text")


WITH_PARAMETER = (
    with_number("add_{n}", "adds {n} to a number", "x + {n}", NUMBERS),
    with_number("subtract_{n}", "subtracts {n} from a number", "x - {n}", NUMBERS),
    with_number("multiply_by_{n}", "multiplies a number by {n}", "x * {n}", NUMBERS),
    with_number("larger_than_{n}", "checks if a number is larger than {n}", "x > {n}", NUMBERS),
    with_number("smaller_than_{n}", "checks if a number is smaller than {n}", "x < {n}", NUMBERS),
    with_number(
        "divisible_by_{n}", "checks if a number is divisible by {n}", "x % {n} == 0", SMALL
    ),
    Family(
        "first_{n}",
        ("returns the first {n} items of a list",),
        "def first_{n}(items):\n    return items[:{n}]",
        SMALL,
        "list",
    ),
    Family(
        "last_{n}",
        ("returns the last {n} items of a list",),
        "def last_{n}(items):\n    return items[-{n}:]",
        SMALL,
        "list",
    ),
    Family(
        "count_{n}",
        ('counts the letter "{n}" in a text',),
        'def count_{n}(text):\n    return text.count("{n}")',
        LETTERS,
        "text",
    ),
    Family(
        "repeat_{n}",
        ("repeats a text {n} times",),
        "def repeat_{n}(text):\n    return text * {n}",
        SMALL,
        "text",
    ),
    Family(
        "print_to_{n}",
        ("prints the numbers from 1 to {n}",),
        "for i in range({n}):\n    print(i + 1)",
        NUMBERS,
        kind="for loop",
    ),
)
WITHOUT_PARAMETER = (
    Family(
        "is_even",
        ("checks if a number is even", "returns true for an even number"),
        "def is_even(x):\n    return x % 2 == 0",
        takes="number",
    ),
    Family(
        "is_odd",
        ("checks if a number is odd", "returns true for an odd number"),
        "def is_odd(x):\n    return x % 2 == 1",
        takes="number",
    ),
    of_numbers(
        "largest",
        "max(numbers)",
        ("finds the largest number of a list", "returns the maximum of a list"),
    ),
    of_numbers(
        "smallest",
        "min(numbers)",
        ("finds the smallest number of a list", "returns the minimum of a list"),
    ),
    of_numbers(
        "total",
        "sum(numbers)",
        ("adds all the numbers of a list", "returns the sum of a list"),
    ),
    of_numbers(
        "average",
        "sum(numbers) / len(numbers)",
        ("finds the average of a list", "returns the average of a list"),
    ),
    of_text("length", "len(text)", ("finds the length of a text", "returns the length of a text")),
    of_text("reverse", "text[::-1]", ("reverses a text", "turns a text around")),
    Family(
        "area",
        ("returns the area of a rectangle", "finds the area of a rectangle"),
        "def area(width, height):\n    return width * height",
    ),
    Family(
        "larger",
        ("returns the larger of two numbers", "finds the larger of two numbers"),
        "def larger(a, b):\n    if a > b:\n        return a\n    return b",
    ),
    Family(
        "greet",
        ("greets a person by name", "says hello to a person by name"),
        'def greet(name):\n    return "Hello, " + name + "!"',
    ),
)
FAMILIES = WITH_PARAMETER + WITHOUT_PARAMETER


def number(rng: Random) -> str:
    """A number below 100."""
    return str(rng.randint(0, 99))


def number_list(rng: Random) -> str:
    """Three digits in brackets."""
    return f"[{rng.randint(0, 9)}, {rng.randint(0, 9)}, {rng.randint(0, 9)}]"


def text(rng: Random) -> str:
    """A word in quotes."""
    return f'"{rng.choice(WORDS)}"'


ARGUMENTS: dict[str, Callable[[Random], str]] = {
    "number": number,
    "list": number_list,
    "text": text,
}
CALLABLE = tuple(family for family in FAMILIES if family.takes)


def draw_task(rng: Random, families: tuple[Family, ...]) -> Task:
    """Code to ask for."""
    family = rng.choice(families)
    parameter = rng.choice(family.parameters)
    task = rng.choice(family.tasks).format(n=parameter)
    return Task(family, parameter, rng.choice(FRAMES).format(kind=family.kind, task=task))


def draw_argument(rng: Random, task: Task) -> str:
    """What a call of the function may be given."""
    return ARGUMENTS[task.family.takes](rng)


def call_key(item: tuple[Task, str]) -> tuple[str, str, str]:
    """A call is held out by its function and its argument."""
    task, argument = item
    return "call", task.name, argument


def draw_shown_task(rng: Random) -> Task:
    """A function that can be called, as training shows it."""
    return until(lambda: draw_task(rng, CALLABLE), lambda task: task.key, False)


def ask_code(rng: Random, held_out: bool) -> Dialogue:
    """A description and its code."""
    task = until(lambda: draw_task(rng, FAMILIES), lambda task: task.key, held_out)
    return Dialogue.single(casual(rng, task.wording), task.code)


def ask_call(rng: Random, held_out: bool) -> Dialogue:
    """The name of a function, and a call of it."""

    def draw() -> tuple[Task, str]:
        task = draw_task(rng, CALLABLE)
        return task, draw_argument(rng, task)

    task, argument = until(draw, call_key, held_out)
    question = rng.choice(CALLS).format(name=task.name, argument=argument)
    return Dialogue.single(casual(rng, question), f"{task.name}({argument})")


def ask_both(rng: Random, held_out: bool) -> Dialogue:
    """Code that training shows, and then a call of it, which alone may be held out."""

    def draw() -> tuple[Task, str]:
        task = draw_shown_task(rng)
        return task, draw_argument(rng, task)

    task, argument = until(draw, call_key, held_out)
    call = f"{task.name}({argument})"
    turns: tuple[tuple[Role, str], ...] = (
        ("user", casual(rng, task.wording)),
        ("assistant", task.code),
        ("user", casual(rng, rng.choice(THEN_CALLS).format(argument=argument))),
        ("assistant", call),
    )
    return Dialogue(turns, call)


def sample(rng: Random, held_out: bool) -> Dialogue:
    """A question about code."""
    share = rng.random()
    if share < SHARES[0]:
        return ask_code(rng, held_out)
    return ask_call(rng, held_out) if share < SHARES[1] else ask_both(rng, held_out)
