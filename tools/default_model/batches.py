"""Batches of packed dialogues, each a pure function of (seed, step): a resumed run sees the same.

Every domain gives the same number of tokens. The model is graded on what the assistant says only.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from default_model.corpus.base import Dialogue
from default_model.corpus.domains import DOMAINS
from default_model.settings import BOS_ID, EOS_ID, PAD_ID, Recipe

USER_ID, ASSISTANT_ID = 3, 4
IGNORED = -100
POOL = 48
"""Dialogues that wait for a row with room; more of them leave less padding."""


@dataclass(frozen=True, slots=True)
class Batch:
    """ids, targets [B, T] int64 (targets IGNORED where not graded), domains [B, T] int64,
    mask [B, 1, T, T] bool: a token sees its own dialogue up to itself."""

    ids: Tensor
    targets: Tensor
    domains: Tensor
    mask: Tensor

    def to(self, device: str) -> Batch:
        """The same batch on a device."""
        moved = (t.to(device) for t in (self.ids, self.targets, self.domains, self.mask))
        return Batch(*moved)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One dialogue: ids, and for each whether the assistant said it."""

    ids: list[int]
    graded: list[bool]
    domain: int


def encode(tokenizer: Tokenizer, dialogue: Dialogue, domain: int = 0) -> Encoded:
    """`<bos> (<User> text <Assistant> text <eos>)*`, as the chat template writes it."""
    ids, graded = [BOS_ID], [False]
    for role, text in dialogue.turns:
        body = tokenizer.encode(text, add_special_tokens=False).ids
        is_answer = role == "assistant"
        ids += [ASSISTANT_ID if is_answer else USER_ID, *body, *([EOS_ID] if is_answer else [])]
        graded += [False, *([is_answer] * len(body)), *([True] if is_answer else [])]
    return Encoded(ids, graded, domain)


class Batches:
    """The training text as batches."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self._tokenizer = tokenizer
        self._recipe = recipe

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        rng = Random(f"batch {self._recipe.seed} {step}")
        source = _Source(self._tokenizer, rng, self._recipe.length + 1)
        rows = [source.row() for _ in range(self._recipe.rows)]
        return collate(rows, self._recipe.length)


class _Source:
    """Dialogues of one batch: the domain with the fewest tokens so far is drawn next."""

    def __init__(self, tokenizer: Tokenizer, rng: Random, room: int) -> None:
        self._tokenizer, self._rng, self._room = tokenizer, rng, room
        self._num_tokens = [rng.random() for _ in DOMAINS]
        self._pool: list[Encoded] = []

    def row(self) -> list[Encoded]:
        """Dialogues that fit into one row together."""
        row, room = [], self._room
        while True:
            while len(self._pool) < POOL:
                self._pool.append(self._draw())
            fitting = [i for i, dialogue in enumerate(self._pool) if len(dialogue.ids) <= room]
            if not fitting:
                return row
            row.append(self._pool.pop(fitting[0]))
            room -= len(row[-1].ids)

    def _draw(self) -> Encoded:
        domain = self._num_tokens.index(min(self._num_tokens))
        dialogue = list(DOMAINS.values())[domain](self._rng, False)
        encoded = encode(self._tokenizer, dialogue, domain)
        self._num_tokens[domain] += len(encoded.ids)
        return encoded if len(encoded.ids) <= self._room else self._draw()


def collate(rows: list[list[Encoded]], length: int) -> Batch:
    """Rows of dialogues, together at most length + 1 tokens each, into tensors."""
    size = (len(rows), length + 1)
    ids = torch.full(size, PAD_ID)
    owner = torch.zeros(size, dtype=torch.int64)  # 0 is padding
    graded = torch.zeros(size, dtype=torch.bool)
    domains = torch.zeros(size, dtype=torch.int64)
    for r, row in enumerate(rows):
        start = 0
        for number, dialogue in enumerate(row, start=1):
            span = slice(start, start + len(dialogue.ids))
            ids[r, span] = torch.tensor(dialogue.ids)
            graded[r, span] = torch.tensor(dialogue.graded)
            owner[r, span], domains[r, span] = number, dialogue.domain
            start = span.stop
    targets = torch.where(graded, ids, IGNORED)[:, 1:]
    owner = owner[:, :-1]
    mask = (owner[:, :, None] == owner[:, None, :]).tril().unsqueeze(1)
    return Batch(ids[:, :-1].contiguous(), targets, domains[:, 1:], mask)
