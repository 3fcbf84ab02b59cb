"""Batches of packed dialogues, checked from the ids alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Library

from cluster.tokenizer import Tokenizer
from default_model.batches import ASSISTANT_ID, IGNORED, USER_ID, Batch, Batches, encode
from default_model.corpus.base import Dialogue
from default_model.corpus.domains import DOMAINS
from default_model.settings import BOS_ID, EOS_ID, PAD_ID, Recipe

RECIPE = Recipe()
ONE_TURN = Dialogue.single("What is 12 + 30?", "12 + 30 = 42")
TWO_TURNS = Dialogue((*ONE_TURN.turns, ("user", "Et en français ?"), ("assistant", "Ça fait 42.")))


@pytest.fixture(scope="module")
def batches(tokenizer: Library) -> list[Batch]:
    source = Batches(tokenizer, RECIPE)
    return [source.batch(step) for step in range(6)]


def test_a_step_has_one_batch(tokenizer: Library, batches: list[Batch]) -> None:
    again = Batches(tokenizer, RECIPE).batch(3)
    for name in ("ids", "targets", "domains", "mask"):
        assert torch.equal(getattr(again, name), getattr(batches[3], name))


def test_each_step_has_another_batch(batches: list[Batch]) -> None:
    assert len({tuple(batch.ids.flatten().tolist()) for batch in batches}) == 6


def test_a_token_sees_its_own_dialogue_up_to_itself(batches: list[Batch]) -> None:
    for batch in batches:
        number = (batch.ids == BOS_ID).cumsum(dim=1)  # of the dialogue in its row
        number[batch.ids == PAD_ID] = 0
        same = number[:, :, None] == number[:, None, :]
        assert torch.equal(batch.mask[:, 0], same.tril())


def test_graded_are_the_assistants_tokens_and_ends(batches: list[Batch]) -> None:
    """What follows a token is graded while an answer is open: begun and not yet ended."""
    for batch in batches:
        begun, ended = ((batch.ids == i).cumsum(dim=1) for i in (ASSISTANT_ID, EOS_ID))
        assert torch.equal(batch.targets != IGNORED, begun > ended)


def test_graded_targets_are_the_next_tokens(batches: list[Batch]) -> None:
    for batch in batches:
        graded = batch.targets[:, :-1] != IGNORED
        assert torch.equal(batch.targets[:, :-1][graded], batch.ids[:, 1:][graded])


def test_every_dialogue_is_whole(batches: list[Batch]) -> None:
    """All that begin also end, in the row or with its last target."""
    for batch in batches:
        ends = (batch.ids == EOS_ID).sum(dim=1) + (batch.targets[:, -1] == EOS_ID)
        assert torch.equal(ends, (batch.ids == ASSISTANT_ID).sum(dim=1))
        assert torch.equal(ends, (batch.ids == USER_ID).sum(dim=1))


def test_domains_have_equal_shares_of_the_tokens(batches: list[Batch]) -> None:
    counts = torch.zeros(len(DOMAINS))
    for batch in batches:
        real = batch.ids[:, 1:] != PAD_ID  # domains are those of the next tokens
        counts += torch.bincount(batch.domains[:, :-1][real], minlength=len(DOMAINS))
    shares = counts / counts.mean()
    assert shares.min() > 0.85 and shares.max() < 1.15


def test_little_is_padding(batches: list[Batch]) -> None:
    padding = torch.stack([(batch.ids == PAD_ID).float().mean() for batch in batches])
    assert padding.mean() < 0.05


@pytest.mark.parametrize("dialogue", [ONE_TURN, TWO_TURNS], ids=["one turn", "two turns"])
def test_dialogues_are_written_as_the_chat_template_does(
    dialogue: Dialogue, tokenizer: Library, exported: tuple[object, Path]
) -> None:
    messages = [{"role": role, "content": text} for role, text in dialogue.turns]
    rendered = Tokenizer(exported[1]).apply_chat_template(
        messages, max_chars=1000, max_s=60.0, add_generation_prompt=False
    )
    assert encode(tokenizer, dialogue).ids == rendered
