"""The domains with right answers: what they answer is recomputed here, not taken from them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import pytest

from default_model.corpus import arithmetic, code, facts, french
from default_model.corpus.base import Dialogue, is_held_out

DRAWS = 4000
MODULES = pytest.mark.parametrize("module", (arithmetic, facts, code, french))
STEP = re.compile(r"(\d+) ([-+x]) (\d+) = (\d+)")
COMPUTE: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "x": lambda a, b: a * b,
}


def draw(module: Any, held_out: bool, number: int) -> tuple[Dialogue, ...]:
    rng = Random(5)
    return tuple(module.sample(rng, held_out) for _ in range(number))


@cache
def draws(module: Any, held_out: bool = False, number: int = DRAWS) -> tuple[Dialogue, ...]:
    return draw(module, held_out, number)


def last_question(dialogue: Dialogue) -> str:
    return dialogue.turns[-2][1]


def plain(dialogue: Dialogue) -> tuple[str, ...]:
    """The questions without what `casual` does to them."""
    greeting = re.compile(r"^(hi!|hello!|hey,|please) ")
    return tuple(greeting.sub("", text.lower()).strip(' ?."!') for _, text in dialogue.turns)


@MODULES
def test_the_same_seed_gives_the_same_dialogues(module: Any) -> None:
    assert draw(module, False, DRAWS) == draws(module)


@MODULES
def test_the_parts_share_no_dialogue(module: Any) -> None:
    shown = {plain(dialogue) for dialogue in draws(module)}
    kept = {plain(dialogue) for dialogue in draws(module, held_out=True)}
    assert len(kept) > 50
    assert not shown & kept


@MODULES
def test_a_question_has_one_answer_in_both_parts(module: Any) -> None:
    answers: dict[tuple[str, ...], str | None] = {}
    for dialogue in draws(module) + draws(module, held_out=True):
        assert answers.setdefault(plain(dialogue)[:-1], dialogue.answer) == dialogue.answer


@MODULES
def test_a_dialogue_ends_with_its_short_answer(module: Any) -> None:
    for dialogue in draws(module):
        assert [role for role, _ in dialogue.turns] == ["user", "assistant"] * (
            len(dialogue.turns) // 2
        )
        assert dialogue.answer and dialogue.is_right(dialogue.turns[-1][1])
        assert len(dialogue.answer) <= 100
        assert not re.search(r"[{}]|  (?! )", re.sub(r"\n +", "\n", dialogue.answer))


@pytest.mark.parametrize("module", (arithmetic, facts, code))
def test_english_is_ascii(module: Any) -> None:
    assert all(text.isascii() for dialogue in draws(module) for _, text in dialogue.turns)


def test_every_step_of_a_working_is_right_and_easy() -> None:
    for dialogue in draws(arithmetic):
        for a, operation, b, result in STEP.findall(dialogue.answer or ""):
            assert COMPUTE[operation](int(a), int(b)) == int(result)
            if operation == "x":
                assert max(int(a), int(b)) <= 10
            elif int(a) >= 20 or int(b) >= 20:
                assert a.endswith("0"), "only whole tens take part in a step above the digits"


@pytest.mark.parametrize("held_out", (False, True))
def test_sums_differences_and_products_are_right(held_out: bool) -> None:
    asked = re.compile(r"(\d+) (\+|-|x|plus|minus|times|and|by|from) (\d+)")
    signs = {"plus": "+", "minus": "-", "times": "x", "and": "+", "by": "x"}
    checked = 0
    for dialogue in draws(arithmetic, held_out):
        found = asked.search(last_question(dialogue))
        answer = dialogue.answer or ""
        if not found or "The answer is" not in answer:
            continue
        a, word, b = int(found[1]), found[2], int(found[3])
        result = b - a if word == "from" else COMPUTE[signs.get(word, word)](a, b)
        assert answer.endswith(f" The answer is {result}.")
        checked += 1
    assert checked > DRAWS / 2


def test_borrowing_is_said_where_it_is_needed() -> None:
    assert arithmetic.subtraction_working(82, 45) == (
        "2 < 5, so 82 = 70 + 12. 12 - 5 = 7. 70 - 40 = 30. 30 + 7 = 37."
    )
    assert arithmetic.subtraction_working(87, 45) == (
        "7 >= 5, so 87 = 80 + 7. 7 - 5 = 2. 80 - 40 = 40. 40 + 2 = 42."
    )
    assert arithmetic.subtraction_working(12, 5) == "12 - 5 = 7."
    assert arithmetic.addition_working(37, 45) == "7 + 5 = 12. 30 + 40 = 70. 70 + 12 = 82."
    assert arithmetic.addition_working(3, 4) == "3 + 4 = 7."


def test_comparisons_neighbors_and_stories_are_right() -> None:
    kinds = set()
    for dialogue in draws(arithmetic):
        question, answer = last_question(dialogue), dialogue.answer or ""
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        kind = re.search(r"larger|smaller|after|before|more|gives|loses|sells", question)
        if kind is None:
            continue
        kinds.add(kind[0])
        low, high = min(numbers), max(numbers)
        start = {
            "larger": f"{high} is larger than {low}.",
            "smaller": f"{low} is smaller than {high}.",
            "after": f"{high + 1} comes after {high}.",
            "before": f"{high - 1} comes before {high}.",
            "more": f"{numbers[0]} + {numbers[-1]} = {sum(numbers)}.",
        }.get(kind[0], f"{high} - {low} = {high - low}.")
        assert answer.startswith(start)
    assert len(kinds) == 8


@pytest.mark.parametrize(
    ("question", "answer"),
    (
        ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
        ("What language do people speak in Brazil?", "People in Brazil speak Portuguese."),
        ("Where is Kenya?", "Kenya is in Africa."),
        ("How many legs does a hen have?", "A hen has 2 legs."),
        ("What is a baby owl called?", "A baby owl is called an owlet."),
        ("What is the opposite of cold?", "The opposite of cold is hot."),
        ("What color is snow?", "Snow is white."),
        ("Which day comes after Sunday?", "Monday comes after Sunday."),
        ("Which month comes before January?", "December comes before January."),
        ("How many days are in February?", "February has 28 or 29 days."),
        ("How many minutes are in an hour?", "There are 60 minutes in an hour."),
        ("Where does a baker work?", "A baker works in a bakery."),
        ("What is the plural of mouse?", "The plural of mouse is mice."),
    ),
)
def test_facts_read_as_people_say_them(question: str, answer: str) -> None:
    answers = {
        last_question(dialogue): dialogue.answer
        for dialogue in draws(facts, number=20000) + draws(facts, held_out=True)
    }
    assert answers[question] == answer


def test_training_shows_every_fact_in_some_wording() -> None:
    for form, it in facts.FACTS:
        assert not all(is_held_out(it, wording) for wording in form.wordings)


CASES: tuple[tuple[str, tuple[Any, ...], Callable[[int], Any]], ...] = (
    (r"adds (\d+) to", (5,), lambda n: 5 + n),
    (r"subtracts (\d+) from", (5,), lambda n: 5 - n),
    (r"multiplies a number by (\d+)", (5,), lambda n: 5 * n),
    (r"larger than (\d+)", (50,), lambda n: n < 50),
    (r"smaller than (\d+)", (50,), lambda n: n > 50),
    (r"divisible by (\d+)", (36,), lambda n: n in (2, 3, 4, 6, 9, 12, 18)),
    (r"first (\d+) items", (list(range(30)),), lambda n: list(range(n))),
    (r"last (\d+) items", (list(range(30)),), lambda n: list(range(30 - n, 30))),
    (r"repeats a text (\d+) times", ("ab",), lambda n: "".join("ab" for _ in range(n))),
    (r"even", (4,), lambda _: True),
    (r"odd", (4,), lambda _: False),
    (r"largest|maximum", ([3, 9, 2],), lambda _: 9),
    (r"smallest|minimum", ([3, 9, 2],), lambda _: 2),
    (r"sum|all the numbers", ([3, 9, 2],), lambda _: 14),
    (r"average", ([3, 9, 3],), lambda _: 5),
    (r"length", ("tree",), lambda _: 4),
    (r"reverses|around", ("tree",), lambda _: "eert"),
    (r"rectangle", (3, 4), lambda _: 12),
    (r"larger of two", (3, 8), lambda _: 8),
    (r"larger of two", (8, 3), lambda _: 8),
    (r"person", ("Mia",), lambda _: "Hello, Mia!"),
    (r'letter "(\w)"', ("banana",), lambda n: n),
)


def run(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(text, names)  # noqa: S102  the corpus's own text
    return {name: value for name, value in names.items() if callable(value)}


def task_draws() -> list[tuple[str, str]]:
    every = draws(code) + draws(code, held_out=True)
    return [(dialogue.turns[0][1], dialogue.turns[1][1]) for dialogue in every]


@pytest.mark.parametrize(("asked", "arguments", "expected"), CASES)
def test_a_function_does_what_was_asked(
    asked: str, arguments: tuple[Any, ...], expected: Callable[[int], Any]
) -> None:
    found = 0
    for question, text in task_draws():
        match = re.search(asked, question)
        if match is None or not text.startswith("def"):
            continue
        (function,) = run(text).values()
        parameter = match[1] if match.groups() else "0"
        right = expected(int(parameter)) if parameter.isdigit() else arguments[0].count(parameter)
        assert function(*arguments) == right
        found += 1
    assert found > 10


def test_loops_print_as_far_as_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    loops = [pair for pair in task_draws() if pair[1].startswith("for")]
    for question, text in loops[:50]:
        run(text)
        last = int(re.findall(r"\d+", question)[-1])
        assert capsys.readouterr().out.split() == [str(n) for n in range(1, last + 1)]
    assert len(loops) > 50


def test_every_description_is_covered_here() -> None:
    patterns = "|".join(asked for asked, _, _ in CASES)
    for question, text in task_draws():
        if text.startswith("def"):
            assert re.search(patterns, question), question


def test_calls_name_the_function_and_its_argument() -> None:
    calls = [dialogue for dialogue in draws(code) if "all" in last_question(dialogue)[:12].lower()]
    for dialogue in calls:
        match = re.fullmatch(r"(\w+)\((.+)\)", dialogue.answer or "")
        if match is None:
            continue
        assert f"with {match[2]}" in last_question(dialogue)
        if len(dialogue.turns) == 4:
            assert dialogue.turns[1][1].startswith(f"def {match[1]}(")
        else:
            assert f" {match[1]} with" in last_question(dialogue)
    assert len(calls) > DRAWS / 10


@pytest.mark.parametrize(
    ("item", "translation"),
    (
        (("house", "red", "the"), ("the red house", "la maison rouge")),
        (("house", "white", "a"), ("a white house", "une maison blanche")),
        (("cat", "small", "the"), ("the small cat", "le petit chat")),
        (("cup", "pretty", "a"), ("a pretty cup", "une jolie tasse")),
        (("mouse", "green", "a"), ("a green mouse", "une souris verte")),
        (("knife", "blue", "the"), ("the blue knife", "le couteau bleu")),
        (("apple", "", "a"), ("an apple", "une pomme")),
    ),
)
def test_adjectives_agree_and_stand_in_their_place(
    item: tuple[str, str, str], translation: tuple[str, str]
) -> None:
    assert french.noun_phrase(*item) == translation


def test_what_is_described_agrees() -> None:
    assert french.description("car", "black") == ("the car is black", "la voiture est noire")
    assert french.description("hat", "white") == ("the hat is white", "le chapeau est blanc")


def test_no_french_noun_begins_with_a_vowel() -> None:
    """So that no article needs an apostrophe and no adjective its form before a vowel."""
    assert all(name[0] not in "aeiouhé" for name, _ in french.NOUNS.values())


def test_a_noun_phrase_is_held_out_in_both_directions() -> None:
    adjectives = "|".join(french.ADJECTIVES)
    pattern = re.compile(rf"\b(?:the|a) ({adjectives}) ({'|'.join(french.NOUNS)})\b")

    def pairs(held_out: bool) -> set[tuple[str, str]]:
        turns = [dialogue.turns[-2:] for dialogue in draws(french, held_out)]
        return {pair for (_, q), (_, a) in turns for pair in pattern.findall(f"{q} {a}")}

    assert len(pairs(True)) > 10
    assert not pairs(True) & pairs(False)


def test_counting_and_talk_in_french() -> None:
    answers = {last_question(d): d.answer for d in draws(french, number=20000)}
    assert answers["Count to five in French."] == "un, deux, trois, quatre, cinq"
    assert answers["Bonjour !"] == "Bonjour ! Comment ça va ?"
    assert answers["De quelle couleur est le ciel ?"] == "Le ciel est bleu."
    assert answers['What does "merci" mean?'] == "thank you"
