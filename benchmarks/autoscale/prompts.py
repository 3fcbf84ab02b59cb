"""Prompts of the default model's domains, with answers as long as the right ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from random import Random

from autoscale.trace import Draw, Item
from default_model.corpus.domains import DOMAINS
from default_model.evaluation import prompt_ids
from default_model.vocabulary import load_tokenizer

MAX_NEW_TOKENS = 32
"""Stories are cut: a few long requests would make the load of a small trace a matter of chance."""


def draws(model: Path, domains: Iterable[str]) -> dict[str, Draw]:
    """domain -> what draws its next item."""
    tokenizer = load_tokenizer(model / "tokenizer.json")

    def draw_from(domain: str) -> Draw:
        def draw(rng: Random) -> Item:
            dialogue = DOMAINS[domain](rng, True)
            answer = tokenizer.encode(dialogue.turns[-1][1], add_special_tokens=False).ids
            length = min(len(answer) + 1, MAX_NEW_TOKENS)  # with the end of the turn
            return Item(domain, tuple(prompt_ids(tokenizer, dialogue.turns[:-1])), length)

        return draw

    return {domain: draw_from(domain) for domain in domains}
