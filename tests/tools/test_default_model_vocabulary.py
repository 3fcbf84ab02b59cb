"""The tokenizer, and the corpus that it is trained on."""

from __future__ import annotations

import hashlib
import json
from random import Random

import pytest
from tokenizers import Tokenizer

from cluster.config import default_model
from cluster.tiny_tokenizer import SPECIAL_TOKENS
from default_model.corpus.domains import DOMAINS
from default_model.settings import CONFIG, Recipe
from default_model.vocabulary import train_tokenizer

CORPUS_DIGEST = "2d668df691a07da5"
"""sha256, first 16 digits. Another one means another corpus: the model that ships was trained on
this one, and no longer answers as its card says."""


@pytest.mark.usefixtures("few_dialogues")
def test_a_seed_has_one_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(1, 512).to_str() == tokenizer.to_str()


@pytest.mark.usefixtures("few_dialogues")
def test_another_seed_has_another_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(2, 512).to_str() != tokenizer.to_str()


def test_every_id_of_the_model_is_a_token(tokenizer: Tokenizer) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(512))


def test_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert tuple(map(tokenizer.id_to_token, range(17))) == SPECIAL_TOKENS


def test_digits_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("1234567890").tokens == list("1234567890")


def test_no_other_token_has_a_digit(tokenizer: Tokenizer) -> None:
    with_digits = {token for token in tokenizer.get_vocab() if any(map(str.isdecimal, token))}
    assert with_digits == set("0123456789")


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("domain", DOMAINS)
def test_texts_come_back_whole(domain: str, held_out: bool, tokenizer: Tokenizer) -> None:
    rng = Random(3)
    for _ in range(100):
        for _, text in DOMAINS[domain](rng, held_out).turns:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids) == text


def test_any_text_comes_back_whole(tokenizer: Tokenizer) -> None:
    text = "¿Où? 東京 \t🙂\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_the_corpus_is_the_one_that_was_trained_on() -> None:
    digest = hashlib.sha256()
    samplers = list(DOMAINS.values())
    for number in range(2000):
        rng = Random(f"corpus {Recipe().seed} {number}")
        digest.update(repr(samplers[number % len(samplers)](rng, False)).encode())
    assert digest.hexdigest()[:16] == CORPUS_DIGEST


@pytest.mark.slow
def test_the_tokenizer_that_ships_is_the_one_of_the_recipe() -> None:
    made = train_tokenizer(Recipe().seed, CONFIG["vocab_size"])
    shipped = (default_model() / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(made.to_str()) == json.loads(shipped)
