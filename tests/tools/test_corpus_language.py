"""Stories, chat and reading: the answers are found again here, from the dialogue alone."""

from __future__ import annotations

import re
from functools import cache
from random import Random
from typing import Any

import pytest

from default_model.corpus import chat, reading, stories, words
from default_model.corpus.base import Dialogue, is_held_out

DRAWS = 3000
MODULES = pytest.mark.parametrize("module", (stories, chat, reading))
PARTS = pytest.mark.parametrize("held_out", (False, True))
NOISE = re.compile(r"^(hi!|hello!|hey,|please) ")
OPENING = re.compile(r"Once upon a time, there was (an? [a-z ]+) named (\w+)( who had an? .+?)?\. ")
MOST_WORDS = 115


def draw(module: Any, held_out: bool) -> tuple[Dialogue, ...]:
    rng = Random(7)
    return tuple(module.sample(rng, held_out) for _ in range(DRAWS))


@cache
def draws(module: Any, held_out: bool) -> tuple[Dialogue, ...]:
    return draw(module, held_out)


def plain(text: str) -> str:
    """A turn without what `casual` does to it."""
    return NOISE.sub("", text.lower()).rstrip("?.!")


def opening(dialogue: Dialogue) -> tuple[str, str]:
    """(`a brave fox`, `Pip`)."""
    found = OPENING.match(dialogue.turns[1][1])
    assert found is not None
    return found[1], found[2]


@MODULES
@PARTS
def test_the_same_seed_gives_the_same_dialogues(module: Any, held_out: bool) -> None:
    assert draw(module, held_out) == draws(module, held_out)


@MODULES
def test_the_parts_share_no_dialogue(module: Any) -> None:
    shown, kept = (
        {tuple(plain(text) for _, text in dialogue.turns) for dialogue in draws(module, part)}
        for part in (False, True)
    )
    assert len(kept) > 200
    assert not shown & kept


@MODULES
@PARTS
def test_turns_alternate_and_the_last_is_right(module: Any, held_out: bool) -> None:
    for dialogue in draws(module, held_out):
        roles = [role for role, _ in dialogue.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert dialogue.is_right(dialogue.turns[-1][1]), dialogue


@MODULES
@PARTS
def test_the_text_is_ascii_without_fields_left_open(module: Any, held_out: bool) -> None:
    for dialogue in draws(module, held_out):
        for _, text in dialogue.turns:
            assert text.isascii() and text == text.strip()
            assert not set("{}") & set(text) and "  " not in text


@pytest.mark.parametrize("module", (chat, reading))
def test_a_question_has_one_answer_in_both_parts(module: Any) -> None:
    answers: dict[tuple[str, ...], str | None] = {}
    for dialogue in draws(module, False) + draws(module, True):
        asked = tuple(plain(text) for _, text in dialogue.turns[:-1])
        assert answers.setdefault(asked, dialogue.answer) == dialogue.answer


def test_a_name_has_one_table() -> None:
    names = words.CHILDREN + words.ANIMAL_NAMES
    assert len(set(names)) == len(names) == 42
    assert len(set(reading.WORDS)) == len(reading.WORDS)


# ---- stories


@PARTS
def test_a_story_has_its_length(held_out: bool) -> None:
    lengths = [len(dialogue.turns[1][1].split()) for dialogue in draws(stories, held_out)]
    assert min(lengths) >= 60
    assert max(lengths) <= MOST_WORDS
    assert sum(lengths) / len(lengths) <= 105


def test_no_hero_of_the_held_out_part_is_in_training() -> None:
    shown, kept = ({opening(each) for each in draws(stories, part)} for part in (False, True))
    assert len(kept) > 100
    assert not shown & kept


@PARTS
def test_the_first_sentence_takes_up_what_the_prompt_names(held_out: bool) -> None:
    named = re.compile(r"about (an? [\w ]+?) named (\w+)(?: and an? (\w+ \w+))?[.?]?$")
    prompts = 0
    for dialogue in draws(stories, held_out):
        (_, prompt), (_, story) = dialogue.turns[:2]
        if asked := named.search(prompt):
            prompts += 1
            assert opening(dialogue) == (asked[1], asked[2])
            assert asked[3] is None or asked[3] in story.split(".")[0]
    assert prompts > DRAWS / 4


def test_the_prompt_of_the_readme_is_in_training() -> None:
    prompt = "Tell me a story about a brave fox named Pip."
    hero = stories.Character("Pip", "fox", "brave")
    about = stories.Prompt("a brave fox named Pip", ("brave", "fox", "Pip"))
    drawn = (stories.prompt_of_hero(Random(seed), hero, "red ball", True) for seed in range(20))
    assert about in drawn
    assert stories.ASKED[0].format(f" about {about.subject}") == prompt
    assert not is_held_out("story", hero.name, hero.kind, hero.trait)


def test_a_prompt_by_theme_asks_for_a_word_that_every_telling_has() -> None:
    rng, hero, friend = Random(1), stories.Character("Pip", "fox"), stories.Character("Ada", "girl")
    for plot in stories.PLOTS:
        for _ in range(200):
            assert plot.word in stories.tell(rng, plot, hero, friend, "red ball", False)


@PARTS
def test_the_only_names_of_a_story_are_the_hero_and_the_friend(held_out: bool) -> None:
    tables = {*words.CHILDREN, *words.ANIMAL_NAMES}
    for dialogue in draws(stories, held_out):
        found = tables & set(re.findall(r"\w+", dialogue.turns[1][1]))
        assert len(found) <= 2 and found <= {opening(dialogue)[1], *friends(dialogue)}


def friends(dialogue: Dialogue) -> list[str]:
    """Who comes into the story as the hero's friend."""
    story = dialogue.turns[1][1].split(".", 1)[1]
    return re.findall(r"an? (?:\w+) named (\w+)", story) + re.findall(r"friend (\w+), an?", story)


@PARTS
def test_only_the_mother_has_other_pronouns_than_the_hero(held_out: bool) -> None:
    for dialogue in draws(stories, held_out):
        described, name = opening(dialogue)
        he = words.pronouns(described.split()[-1], name).he
        other = {"he": "she", "she": "he"}[he]
        story = dialogue.turns[1][1]
        if "mother" not in story:
            assert not re.search(rf"\b{other}\b", story, re.IGNORECASE), story


def test_a_follow_up_asks_who_the_hero_or_the_friend_is() -> None:
    followed = [each for each in draws(stories, False) if len(each.turns) == 4]
    assert 0.1 < len(followed) / DRAWS < 0.2
    for dialogue in followed:
        described, name = opening(dialogue)
        of_hero = f"The story is about {name}, {described}."
        assert dialogue.answer == of_hero or friends(dialogue)[0] in str(dialogue.answer)
        assert (dialogue.answer == of_hero) == ("friend" not in dialogue.turns[2][1].lower())


# ---- chat


def test_what_was_told_is_remembered_whatever_comes_between() -> None:
    lengths = set()
    for dialogue in draws(chat, False) + draws(chat, True):
        answer = str(dialogue.answer)
        if found := re.match(r"Your (?:favorite \w+ is|name is) (?:the )?(\w+)\.$", answer):
            assert found[1] in dialogue.turns[0][1]
            lengths.add(len(dialogue.turns))
        elif answer == chat.NO_NAME_YET:
            assert not any("meet you" in text for _, text in dialogue.turns)
    assert lengths == {4, 6, 8}


def test_what_is_not_known_is_refused_by_its_name() -> None:
    topics: dict[bool, set[str]] = {False: set(), True: set()}
    for part, seen in topics.items():
        for dialogue in draws(chat, part):
            if found := re.search(r"do not know about (.+)\. Ask", str(dialogue.answer)):
                assert found[1] in dialogue.turns[-2][1]
                seen.add(found[1])
    assert len(topics[True]) > 40
    assert not topics[True] & topics[False]


def test_training_shows_two_wordings_of_every_answer_held_out() -> None:
    shown = [each.reply for part in (chat.SAID_OF_PART, chat.ASKED_OF_PART) for each in part[False]]
    kept = {each.reply for part in (chat.SAID_OF_PART, chat.ASKED_OF_PART) for each in part[True]}
    assert len(kept) >= 4
    assert all(shown.count(reply) >= 2 for reply in kept)


def test_every_wording_belongs_to_one_group() -> None:
    wordings = [plain(wording) for group, _ in chat.SAID + chat.ASKED for wording in group]
    assert len(wordings) == len(set(wordings))
    assert {each.lower() for each in chat.WHAT_IS_MY_NAME}.isdisjoint(wordings)


# ---- reading

SENTENCES = {
    "has": re.compile(r"(?P<who>[A-Z]\w+) has an? (?P<color>\w+) (?P<thing>\w+)\."),
    "lives": re.compile(r"(?P<who>[A-Z]\w+) lives (?P<spot>near the \w+)\."),
    "put": re.compile(r"(?P<who>[A-Z]\w+) put the (?P<thing>\w+) (?P<spot>\w+ the \w+)\."),
    "likes": re.compile(r"(?P<who>[A-Z]\w+) likes (?P<food>\w+)\."),
}


def answers_in(text: str) -> dict[str, str]:
    """Everything that can be asked about the text, in its first wording, with the answers."""
    known: dict[str, str] = {}
    for name, color, thing in SENTENCES["has"].findall(text):
        known[f"who has the {thing}"] = f"{name} has the {thing}."
        known[f"what color is the {thing}"] = f"The {thing} is {color}."
        a = "an" if color == "orange" else "a"
        known[f"what does {name} have".lower()] = f"{name} has {a} {color} {thing}."
    for name, spot in SENTENCES["lives"].findall(text):
        known[f"where does {name} live".lower()] = f"{name} lives {spot}."
        known[f"who lives {spot}"] = f"{name} lives {spot}."
    for name, thing, spot in SENTENCES["put"].findall(text):
        known[f"where is the {thing}"] = known[f"what is {spot}"] = f"The {thing} is {spot}."
        known[f"who put the {thing} {spot}"] = f"{name} put the {thing} {spot}."
    for name, food in SENTENCES["likes"].findall(text):
        known[f"who likes {food}"] = known[f"what does {name} like".lower()] = (
            f"{name} likes {food}."
        )
    return known


@PARTS
def test_the_text_gives_the_answer(held_out: bool) -> None:
    found = 0
    for dialogue in draws(reading, held_out):
        text = dialogue.turns[0][1]
        known = answers_in(text)
        if known:
            assert dialogue.answer in known.values()
            question = plain(text).rsplit(". ", 1)[-1]
            found += question in known
            assert known.get(question, dialogue.answer) == dialogue.answer
    assert found > DRAWS / 8


@PARTS
def test_a_list_gives_its_words(held_out: bool) -> None:
    lists = 0
    for dialogue in draws(reading, held_out):
        question, answer = dialogue.turns[0][1], str(dialogue.answer)
        if answers_in(question):
            continue
        lists += 1
        said = re.sub(r"[,.?]", "", question.rsplit(": ", 1)[1]).split()
        assert 2 <= len(said) <= 6
        place = 0 if "first" in question else -1
        one = f"The {'last' if place else 'first'} word is {said[place]}."
        assert answer == (one if "word is" in answer else " ".join(said))
    assert lists > DRAWS / 5
