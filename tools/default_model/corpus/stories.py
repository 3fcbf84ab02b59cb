"""Little stories with a hero, a friend, a thing, a place and a moral, in five plots.

The prompt may name the hero, its kind, its trait, the thing or the theme; the first sentence
takes up what the prompt named, so that the model learns to copy it.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from default_model.corpus.base import Dialogue, Role, article, capital, casual, until
from default_model.corpus.words import (
    ANIMAL_NAMES,
    ANIMALS,
    BOYS,
    CHILDREN,
    COLORS,
    FOODS,
    GIRLS,
    PLACES,
    THINGS,
    made_up_name,
    pronouns,
)

TRAITS = (
    "brave", "kind", "little", "happy", "clever", "shy", "funny", "quiet", "young", "friendly",
)  # fmt: skip
PET_NAMES = ANIMAL_NAMES * 5 + CHILDREN
SKILLS = ("sing", "dance", "swim", "read", "climb a tree", "ride a bike")
DARK_PLACES = ("a dark cave", "a dark house", "a deep hole")

ASKED = (
    "Tell me a story{}.",
    "Write a story{}.",
    "Can you tell me a story{}?",
    "Tell me a short story{}.",
    "Make up a story{}.",
)
WHO_IS_THE_HERO = (
    "Who is the story about?",
    "Who was the story about?",
    "Who is the hero of the story?",
)
WHO_IS_THE_FRIEND = (
    "Who is the friend in the story?",
    "Who was the friend?",
    "What is the name of the friend?",
)
FOLLOWED_UP = 0.15


@dataclass(frozen=True, slots=True)
class Plot:
    """What the story is about, a word that every telling has, and its beats in several wordings."""

    themes: tuple[str, ...]
    word: str
    beats: tuple[tuple[str, ...], ...]


LOST = Plot(
    ("helping a friend", "friends", "something that was lost"),
    "help",
    (
        ("{owns}",),
        (
            "One day, {he} went to the {place} and lost the {noun}.",
            "One day, {he} was near the {place}, and the {noun} was gone.",
            "One day, {he} came home from the {place} without the {noun}.",
        ),
        (
            "{hero} looked here and there, but {he} could not find it.",
            "{hero} looked all day, but it was not there.",
            "{hero} was very sad and began to cry.",
        ),
        (
            "Then {he} met {a_friend} named {friend}.",
            "Then {a_friend} named {friend} came along.",
        ),
        (
            '"Why are you sad?" asked {friend}. "I lost my {thing}," said {hero}.',
            '"What is wrong?" asked {friend}. "I can not find my {noun}," said {hero}.',
        ),
        (
            '"I will help you look for it," said {friend}.',
            '"Do not cry. Let me help you," said {friend}.',
        ),
        (
            "At last, {friend} saw the {noun} under an old tree.",
            "They looked together, and {friend} found the {noun} in the grass.",
            "They went back, and there was the {noun}, behind a big stone.",
        ),
        (
            '"Thank you, {friend}!" said {hero}, and {he} was happy again.',
            "{hero} was so happy that {he} gave {friend} a hug.",
        ),
        (
            "{hero} learned that a good friend is a great help.",
            "With the help of a friend, a bad day can become a good day.",
        ),
    ),
)
SHARING = Plot(
    ("sharing", "sharing with a friend"),
    "share",
    (
        ("{owns}",),
        (
            "One day, {hero} took the {noun} to the {place}.",
            "One day, {he} went to the {place} and took the {noun} along.",
        ),
        (
            "There {he} met {a_friend} named {friend}, who had nothing to play with.",
            "There {he} saw {a_friend} named {friend}, who was all alone.",
        ),
        (
            '"May I hold the {noun}?" asked {friend}. "No, it is mine," said {hero}.',
            '"What a nice {noun}! May I have it?" asked {friend}. "No," said {hero}.',
        ),
        (
            "{friend} was sad and went away.",
            "{friend} did not say a word.",
        ),
        (
            "But soon {hero} felt alone, and it was no fun.",
            "Then {hero} felt bad and was not happy at all.",
        ),
        (
            '"I am sorry, {friend}," said {hero}. "Let us share the {noun}."',
            '"Come, {friend}, let us share it," said {hero}, and gave {f_him} the {noun}.',
        ),
        (
            "They played together until the sun went down.",
            "{friend} was happy and gave {hero} some {food}.",
            "They laughed and played, and then they ate some {food}.",
        ),
        (
            "{hero} learned that it is good to share.",
            "When you share, you have more fun.",
            "Good things are even better when you share them.",
        ),
    ),
)
BRAVE = Plot(
    ("being brave", "a brave heart"),
    "brave",
    (
        ("{owns}",),
        (
            "One day, {he} forgot the {noun} in {dark_place} near the {place}.",
            "One day, {he} lost the {noun} in {dark_place} near the {place}.",
        ),
        (
            "{hero} wanted it back, but {he} was afraid.",
            "{hero} wanted to get it, but {he} was very afraid.",
        ),
        (
            "{He} went there with {his} friend {friend}, {a_friend}.",
            "{His} friend {friend}, {a_friend}, came along.",
        ),
        (
            '"Are you afraid?" asked {friend}. "Yes, but I will try," said {hero}.',
            '"It is so dark," said {friend}. "I know, but I will go," said {hero}.',
        ),
        (
            "{hero} took a deep breath and went in.",
            "{hero} closed {his} eyes and then went in.",
        ),
        (
            "It was dark and cold, but {he} did not stop.",
            "{He} heard something, but it was only the wind.",
        ),
        (
            'Then {he} found the {noun} and ran back. "You are so brave!" said {friend}.',
            'At last, {he} came out with the {noun}. "How brave you are!" said {friend}.',
        ),
        (
            "To be brave is to try even when you are afraid.",
            "You can be afraid and be brave all the same.",
        ),
    ),
)
TRUTH = Plot(
    ("telling the truth", "the truth"),
    "truth",
    (
        ("{owns}",),
        (
            "One day, {he} ran into the house with the {noun} and broke a plate.",
            "One day, {he} played with the {noun} and broke a big plate.",
        ),
        (
            "{hero} was afraid and put the plate under the bed.",
            "{hero} was afraid and hid behind the door.",
        ),
        (
            'Soon {his} mother came home. "Who broke my plate?" she asked.',
            '{His} mother came in and saw it. "Who did this?" she asked.',
        ),
        (
            '"It was the wind," said {hero}.',
            "{hero} did not say a word.",
        ),
        (
            'Then {a_friend} named {friend} said, "Tell her the truth."',
            'But {his} friend {friend}, {a_friend}, said, "Tell her the truth."',
        ),
        (
            '"I broke it, and I am sorry," said {hero}.',
            'So {hero} said, "It was me. I am very sorry."',
        ),
        (
            '{His} mother was not angry. "Thank you," she said, and gave {him} a hug.',
            '{His} mother smiled. "I am happy that you told me," she said.',
        ),
        (
            "{hero} learned that it is always best to tell the truth.",
            "The truth can be hard to say, but it makes the heart happy.",
        ),
    ),
)
PRACTICE = Plot(
    ("practice", "learning something new"),
    "practice",
    (
        (
            "{hero} wanted to learn to {skill}.",
            "{He} wanted to {skill}, but {he} did not know how.",
        ),
        (
            "One day, {he} went to the {place} and tried, but it was hard.",
            "One day, {he} tried near the {place}, but {he} could not do it.",
        ),
        (
            '"I will never learn it," said {hero}.',
            "{hero} was sad and wanted to stop.",
        ),
        (
            "Then {he} met {a_friend} named {friend}.",
            "Then {a_friend} named {friend} came along.",
        ),
        (
            '"I could not {skill} at first," said {friend}. "Try a little every day."',
            '"It is hard at first," said {friend}. "Do not stop. Try again."',
        ),
        (
            "So {hero} tried again the next day, and the next.",
            "So {hero} tried again, every morning and every night.",
        ),
        (
            "Every day it was a little better.",
            "{friend} came every day to help {him}.",
        ),
        (
            'At last, {hero} could {skill}! "You did it!" said {friend}.',
            "Then, one day, {he} could {skill}! {hero} and {friend} laughed and danced.",
        ),
        (
            "{hero} learned that practice makes hard things easy.",
            "With a little practice every day, hard things become easy.",
        ),
    ),
)
PLOTS = (LOST, SHARING, BRAVE, TRUTH, PRACTICE)
PLOT_OF_TRAIT = {"brave": BRAVE, "kind": SHARING}


@dataclass(frozen=True, slots=True)
class Character:
    """Somebody of a story; the trait may be empty."""

    name: str
    kind: str
    trait: str = ""

    @property
    def described(self) -> str:
        """`a brave fox`."""
        return article(f"{self.trait} {self.kind}".strip())


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a prompt tells of the story: `words` are those that the story has to take up."""

    subject: str = ""
    words: tuple[str, ...] = ()
    names_thing: bool = False


def draw_character(rng: Random) -> Character:
    """A child or an animal, one of seven with a name of no table."""
    kind = rng.choice(ANIMALS) if rng.random() < 0.7 else rng.choice(("girl", "boy"))
    names = {"girl": GIRLS, "boy": BOYS}.get(kind, PET_NAMES)
    return Character(made_up_name(rng) if rng.random() < 0.15 else rng.choice(names), kind)


def draw_hero(rng: Random) -> Character:
    """A character, mostly with a trait."""
    drawn = draw_character(rng)
    return Character(drawn.name, drawn.kind, rng.choice(TRAITS) if rng.random() < 0.75 else "")


def draw_friend(rng: Random, hero: Character) -> Character:
    """Somebody whom a reader does not mistake for the hero."""
    while True:
        friend = draw_character(rng)
        if friend.name != hero.name and friend.kind != hero.kind:
            return friend


def draw_thing(rng: Random) -> str:
    """`red ball`."""
    return f"{rng.choice(COLORS)} {rng.choice(THINGS)}"


def draw_plot(rng: Random, hero: Character) -> Plot:
    """The plot that the hero's trait asks for, or any."""
    return PLOT_OF_TRAIT.get(hero.trait) or rng.choice(PLOTS)


def prompt_of_hero(rng: Random, hero: Character, thing: str, named: bool) -> Prompt:
    """A prompt about the hero, one of three with the thing."""
    subject, words = hero.described, (*hero.trait.split(), hero.kind)
    if named:
        subject, words = f"{subject} named {hero.name}", (*words, hero.name)
    if rng.random() < 0.33:
        return Prompt(f"{subject} and {article(thing)}", (*words, thing), names_thing=True)
    return Prompt(subject, words)


def draw_prompt(rng: Random, plot: Plot, hero: Character, thing: str) -> Prompt:
    """A prompt of any form: plain, by theme, by a child's name, by kind, by kind and name."""
    form = rng.random()
    if form < 0.12:
        return Prompt()
    if form < 0.24:
        return Prompt(rng.choice(plot.themes), (plot.word,))
    if form < 0.34 and hero.kind in ("girl", "boy"):
        return Prompt(hero.name, (hero.name,))
    return prompt_of_hero(rng, hero, thing, named=form > 0.5)


def owning(hero: Character, thing: str, names_thing: bool) -> str:
    """The sentence that gives the hero its thing, or tells of the thing the hero has already."""
    he = capital(pronouns(hero.kind, hero.name).he)
    return f"{he} liked the {thing} very much." if names_thing else f"{he} had {article(thing)}."


def fields(
    rng: Random, hero: Character, friend: Character, thing: str, names_thing: bool
) -> dict[str, str]:
    """What the beats of one story fill in."""
    of_hero = pronouns(hero.kind, hero.name)
    noun = thing.split()[1]
    return {
        "hero": hero.name,
        "he": of_hero.he,
        "him": of_hero.him,
        "his": of_hero.his,
        "He": capital(of_hero.he),
        "His": capital(of_hero.his),
        "friend": friend.name,
        "a_friend": friend.described,
        "f_him": pronouns(friend.kind, friend.name).him,
        "thing": thing,
        "noun": noun,
        "owns": owning(hero, thing, names_thing),
        "skill": f"draw the {noun}" if names_thing else rng.choice(SKILLS),
        "place": rng.choice(PLACES),
        "dark_place": rng.choice(DARK_PLACES),
        "food": rng.choice(FOODS),
    }


def tell(
    rng: Random, plot: Plot, hero: Character, friend: Character, thing: str, names_thing: bool
) -> str:
    """The story, with what the prompt names in its first sentence."""
    who_had = f" who had {article(thing)}" if names_thing else ""
    opening = f"Once upon a time, there was {hero.described} named {hero.name}{who_had}."
    beats = " ".join(rng.choice(beat) for beat in plot.beats)
    return f"{opening} {beats.format_map(fields(rng, hero, friend, thing, names_thing))}"


def follow_up(rng: Random, hero: Character, friend: Character) -> tuple[str, str]:
    """A question about the story that was just told, and its answer."""
    if rng.random() < 0.7:
        return rng.choice(WHO_IS_THE_HERO), f"The story is about {hero.name}, {hero.described}."
    return rng.choice(WHO_IS_THE_FRIEND), f"The friend is {friend.name}, {friend.described}."


def sample(rng: Random, held_out: bool) -> Dialogue:
    """A story; those held out have a hero (name, kind, trait) that training never sees."""
    hero = until(lambda: draw_hero(rng), lambda h: ("story", h.name, h.kind, h.trait), held_out)
    thing, plot, friend = draw_thing(rng), draw_plot(rng, hero), draw_friend(rng, hero)
    if held_out:
        prompt = prompt_of_hero(rng, hero, thing, named=True)
    else:
        prompt = draw_prompt(rng, plot, hero, thing)
    story = tell(rng, plot, hero, friend, thing, prompt.names_thing)
    about = f" about {prompt.subject}" if prompt.subject else ""
    turns: tuple[tuple[Role, str], ...] = (
        ("user", casual(rng, rng.choice(ASKED).format(about))),
        ("assistant", story),
    )
    if rng.random() >= FOLLOWED_UP:
        return Dialogue(turns, must_contain=prompt.words)
    question, answer = follow_up(rng, hero, friend)
    return Dialogue((*turns, ("user", casual(rng, question)), ("assistant", answer)), answer)
