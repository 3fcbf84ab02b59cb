"""English to French and back, and a little talk in French.

A noun with an adjective is held out in both directions and in all its shapes; a fixed phrase or a
question in French is held out in one of its wordings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from default_model.corpus.base import Dialogue, Role, Sampler, article, capital, casual, until

NOUNS = {
    "house": ("maison", "f"),
    "table": ("table", "f"),
    "chair": ("chaise", "f"),
    "door": ("porte", "f"),
    "car": ("voiture", "f"),
    "flower": ("fleur", "f"),
    "dress": ("robe", "f"),
    "apple": ("pomme", "f"),
    "lamp": ("lampe", "f"),
    "cow": ("vache", "f"),
    "mouse": ("souris", "f"),
    "cup": ("tasse", "f"),
    "cat": ("chat", "m"),
    "dog": ("chien", "m"),
    "book": ("livre", "m"),
    "bed": ("lit", "m"),
    "garden": ("jardin", "m"),
    "hat": ("chapeau", "m"),
    "bag": ("sac", "m"),
    "ball": ("ballon", "m"),
    "boat": ("bateau", "m"),
    "fish": ("poisson", "m"),
    "knife": ("couteau", "m"),
    "train": ("train", "m"),
}


@dataclass(frozen=True, slots=True)
class Adjective:
    """Both its forms, and whether it stands before its noun."""

    masculine: str
    feminine: str
    before: bool = False

    def agreeing(self, gender: str) -> str:
        """The form for a noun of this gender."""
        return self.masculine if gender == "m" else self.feminine


ADJECTIVES = {
    "red": Adjective("rouge", "rouge"),
    "green": Adjective("vert", "verte"),
    "blue": Adjective("bleu", "bleue"),
    "black": Adjective("noir", "noire"),
    "white": Adjective("blanc", "blanche"),
    "big": Adjective("grand", "grande", before=True),
    "small": Adjective("petit", "petite", before=True),
    "pretty": Adjective("joli", "jolie", before=True),
}
PLAIN = ""
"""In the place of an adjective: the noun alone."""

ARTICLES = {
    ("the", "m"): "le",
    ("the", "f"): "la",
    ("a", "m"): "un",
    ("a", "f"): "une",
}
SENTENCES = (
    ("I have a {noun}", "j'ai {un} {nom}"),
    ("I see the {noun}", "je vois {le} {nom}"),
    ("here is the {noun}", "voici {le} {nom}"),
    ("where is the {noun}?", "où est {le} {nom} ?"),
)
PHRASES = {
    "good morning": "bonjour",
    "good evening": "bonsoir",
    "good night": "bonne nuit",
    "goodbye": "au revoir",
    "thank you": "merci",
    "thank you very much": "merci beaucoup",
    "please": "s'il te plaît",
    "yes": "oui",
    "no": "non",
    "see you tomorrow": "à demain",
    "how are you?": "comment ça va ?",
    "what is your name?": "comment t'appelles-tu ?",
    "my name is Tom": "je m'appelle Tom",
    "my name is Anna": "je m'appelle Anna",
    "I am hungry": "j'ai faim",
    "I am thirsty": "j'ai soif",
    "I am happy": "je suis content",
    "I like bread": "j'aime le pain",
    "I like milk": "j'aime le lait",
    "I like cheese": "j'aime le fromage",
    "I like soup": "j'aime la soupe",
}
NUMBERS = {
    "one": "un",
    "two": "deux",
    "three": "trois",
    "four": "quatre",
    "five": "cinq",
    "six": "six",
    "seven": "sept",
    "eight": "huit",
    "nine": "neuf",
    "ten": "dix",
}
TO_FRENCH = (
    'How do you say "{text}" in French?',
    'What is "{text}" in French?',
    'Say "{text}" in French.',
    'Translate to French: "{text}"',
)
TO_ENGLISH = (
    'What does "{text}" mean?',
    'What does "{text}" mean in English?',
    'What is "{text}" in English?',
    'Translate to English: "{text}"',
)
AND_THEN = 'And "{text}"?'
COUNT = (
    "Count to {number} in French.",
    "Count from one to {number} in French.",
    "Can you count to {number} in French?",
    "How do you count to {number} in French?",
)


@dataclass(frozen=True, slots=True)
class Talk:
    """French questions of one kind, {it} what they are about, with their answer in French."""

    wordings: tuple[str, ...]
    answer: str
    facts: Mapping[str, str]


def remark(answer: str, *wordings: str) -> Talk:
    """Ways to say one and the same thing, and what one says to that."""
    return Talk(wordings, answer, {PLAIN: PLAIN})


FACTS = (
    Talk(
        (
            "De quelle couleur est {it} ?",
            "Dis-moi, de quelle couleur est {it} ?",
            "{it}, c'est de quelle couleur ?",
        ),
        "{it} est {value}.",
        {
            "la neige": "blanche",
            "le lait": "blanc",
            "le ciel": "bleu",
            "la mer": "bleue",
            "le soleil": "jaune",
            "la banane": "jaune",
            "la tomate": "rouge",
            "la nuit": "noire",
        },
    ),
    Talk(
        (
            "Que mange {it} ?",
            "Dis-moi, que mange {it} ?",
            "{it}, ça mange quoi ?",
        ),
        "{it} mange {value}.",
        {
            "le chat": "du poisson",
            "le chien": "de la viande",
            "la souris": "du fromage",
            "la vache": "de l'herbe",
            "la poule": "des graines",
            "le lapin": "des carottes",
        },
    ),
    Talk(
        (
            "Quelle est la capitale {it} ?",
            "Quelle ville est la capitale {it} ?",
            "Dis-moi, quelle est la capitale {it} ?",
        ),
        "La capitale {it} est {value}.",
        {
            "de la France": "Paris",
            "de l'Espagne": "Madrid",
            "de l'Italie": "Rome",
            "du Japon": "Tokyo",
        },
    ),
    Talk(
        (
            "Quel jour vient après {it} ?",
            "Quel est le jour après {it} ?",
            "Après {it}, c'est quel jour ?",
        ),
        "Après {it}, c'est {value}.",
        {
            "lundi": "mardi",
            "mardi": "mercredi",
            "mercredi": "jeudi",
            "jeudi": "vendredi",
            "vendredi": "samedi",
            "samedi": "dimanche",
            "dimanche": "lundi",
        },
    ),
)
REMARKS = (
    remark("Bonjour ! Comment ça va ?", "Bonjour !", "Bonjour, petit modèle !", "Salut !"),
    remark("Bonsoir ! Comment ça va ?", "Bonsoir !", "Bonsoir, petit modèle !"),
    remark(
        "Ça va bien, merci !",
        "Comment ça va ?",
        "Ça va ?",
        "Bonjour ! Comment ça va ?",
        "Salut ! Ça va ?",
    ),
    remark(
        "Je suis un petit modèle.",
        "Comment t'appelles-tu ?",
        "Qui es-tu ?",
        "Bonjour ! Qui es-tu ?",
        "Bonjour ! Comment t'appelles-tu ?",
    ),
    remark(
        "Oui, je parle un peu français.",
        "Parles-tu français ?",
        "Tu parles français ?",
        "Bonjour ! Parles-tu français ?",
    ),
    remark("De rien !", "Merci !", "Merci beaucoup !", "Merci, petit modèle !"),
    remark("Au revoir ! À demain !", "Au revoir !", "Au revoir, petit modèle !", "À demain !"),
    remark("Bonne nuit ! Dors bien !", "Bonne nuit !", "Bonne nuit, petit modèle !"),
    remark(
        "J'habite dans un ordinateur.",
        "Où habites-tu ?",
        "Tu habites où ?",
        "Dis-moi, où habites-tu ?",
    ),
    remark(
        "Oui, j'aime les chats.",
        "Aimes-tu les chats ?",
        "Tu aimes les chats ?",
        "Dis-moi, aimes-tu les chats ?",
    ),
    remark(
        "Oui, bien sûr !",
        "Peux-tu m'aider ?",
        "Tu peux m'aider ?",
        "Bonjour ! Peux-tu m'aider ?",
    ),
)
TALKS = tuple((talk, it) for talk in FACTS + REMARKS for it in talk.facts)


@dataclass(frozen=True, slots=True)
class Translation:
    """The same in both languages; what is held out is its key."""

    english: str
    french: str
    key: tuple[str, ...]


def noun_phrase(noun: str, adjective: str, definite: str) -> tuple[str, str]:
    """`the red house` and `la maison rouge`; the adjective may be left out."""
    name, gender = NOUNS[noun]
    words = [ARTICLES[definite, gender], name]
    if adjective:
        described = ADJECTIVES[adjective]
        words.insert(1 if described.before else 2, described.agreeing(gender))
    english = f"{adjective} {noun}".strip()
    return f"the {english}" if definite == "the" else article(english), " ".join(words)


def description(noun: str, adjective: str) -> tuple[str, str]:
    """`the house is red` and `la maison est rouge`."""
    english, french = noun_phrase(noun, PLAIN, "the")
    agreeing = ADJECTIVES[adjective].agreeing(NOUNS[noun][1])
    return f"{english} is {adjective}", f"{french} est {agreeing}"


def draw_described(rng: Random) -> Translation:
    """A noun, in most cases with an adjective."""
    noun = rng.choice(tuple(NOUNS))
    adjective = rng.choice((*ADJECTIVES, PLAIN))
    shape = rng.choice(("the", "the", "a", "a", "is" if adjective else "the"))
    pair = description(noun, adjective) if shape == "is" else noun_phrase(noun, adjective, shape)
    return Translation(*pair, ("noun", noun, adjective))


def draw_sentence(rng: Random) -> Translation:
    """A short sentence around a noun."""
    english, french = rng.choice(SENTENCES)
    noun, (name, gender) = rng.choice(tuple(NOUNS.items()))
    the, a = ARTICLES["the", gender], ARTICLES["a", gender]
    return Translation(
        english.replace("a {noun}", article(noun)).format(noun=noun),
        french.format(le=the, un=a, nom=name),
        ("sentence", english, noun),
    )


def asked(rng: Random, item: Translation, to_french: bool) -> tuple[str, str]:
    """A question for the translation, and its answer."""
    if to_french:
        return rng.choice(TO_FRENCH).format(text=item.english), item.french
    return rng.choice(TO_ENGLISH).format(text=item.french), item.english


def translate(rng: Random, item: Translation) -> Dialogue:
    """One translation, more often into French than from it."""
    question, answer = asked(rng, item, rng.random() < 0.65)
    return Dialogue.single(casual(rng, question), answer)


def described(rng: Random, held_out: bool) -> Dialogue:
    """A noun phrase, or a noun that is described."""
    return translate(rng, until(lambda: draw_described(rng), lambda item: item.key, held_out))


def sentence(rng: Random, held_out: bool) -> Dialogue:
    """A short sentence."""
    return translate(rng, until(lambda: draw_sentence(rng), lambda item: item.key, held_out))


def two_translations(rng: Random, held_out: bool) -> Dialogue:
    """A noun phrase that training shows, and `And "the red car"?`, which may be held out."""
    first = until(lambda: draw_described(rng), lambda item: item.key, False)
    then = until(lambda: draw_described(rng), lambda item: item.key, held_out)
    to_french = rng.random() < 0.65
    question, answer = asked(rng, first, to_french)
    text, last = (then.english, then.french) if to_french else (then.french, then.english)
    turns: tuple[tuple[Role, str], ...] = (
        ("user", casual(rng, question)),
        ("assistant", answer),
        ("user", casual(rng, AND_THEN.format(text=text))),
        ("assistant", last),
    )
    return Dialogue(turns, last)


def phrase(rng: Random, held_out: bool) -> Dialogue:
    """A fixed phrase or a number; its direction is part of its wording."""
    known = tuple((PHRASES | NUMBERS).items())
    (english, french), wording = until(
        lambda: (rng.choice(known), rng.choice(TO_FRENCH + TO_ENGLISH)),
        lambda item: (item[0][0], item[1]),
        held_out,
    )
    text, answer = (english, french) if wording in TO_FRENCH else (french, english)
    return Dialogue.single(casual(rng, wording.format(text=text)), answer)


def counting(rng: Random, held_out: bool) -> Dialogue:
    """`un, deux, trois`."""
    last, wording = until(
        lambda: (rng.randint(2, len(NUMBERS)), rng.choice(COUNT)),
        lambda item: ("count", *item),
        held_out,
    )
    question = wording.format(number=tuple(NUMBERS)[last - 1])
    return Dialogue.single(casual(rng, question), ", ".join(tuple(NUMBERS.values())[:last]))


def casual_french(rng: Random, question: str) -> str:
    """As people type it: without the space before its mark, without the mark, or in lower case."""
    kind = rng.random()
    if kind < 0.15:
        return question.replace(" ?", "?").replace(" !", "!")
    if kind < 0.22:
        return question.rstrip("?! ")
    if kind < 0.30:
        return question[0].lower() + question[1:]
    return question


def draw_talk(rng: Random) -> tuple[Talk, str, str]:
    """A kind of question, what it is about, and a wording."""
    talk, it = rng.choice(TALKS)
    return talk, it, rng.choice(talk.wordings)


def talking(rng: Random, held_out: bool) -> Dialogue:
    """A question in French, answered in French."""
    talk, it, wording = until(
        lambda: draw_talk(rng), lambda item: ("talk", item[1], item[2]), held_out
    )
    question = capital(wording.format(it=it))
    answer = capital(talk.answer.format(it=it, value=talk.facts[it]))
    return Dialogue.single(casual_french(rng, question), answer)


FORMS: tuple[Sampler, ...] = (
    (described,) * 8
    + (two_translations,) * 2
    + (sentence,) * 3
    + (phrase,) * 3
    + (counting,)
    + (talking,) * 5
)


def sample(rng: Random, held_out: bool) -> Dialogue:
    """Something in French."""
    return rng.choice(FORMS)(rng, held_out)
