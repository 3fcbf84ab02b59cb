"""A schedule becomes tensors, a forward pass and sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attention.messages import TokenLogprob
from attention.model import Batch, Chunk, Decoder
from attention.request import Request
from attention.sampler import Sampled, SampleRow, token_logprob
from attention.scheduler import Schedule, ScheduledRequest

LOGPROB_ROWS = 64
"""Prompt rows whose logits exist at the same time: 33 MB for a vocabulary of 129,280."""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What a step computed for one item of its schedule."""

    sampled: Sampled | None
    """None while the prompt is not finished, and for max_tokens 0."""
    prompt_logprobs: tuple[tuple[int, TokenLogprob], ...] = ()
    """(place in the prompt, logprob) of the tokens that follow the item's, if asked for."""
    renormalised: bool = False
    """The step went without some experts."""


def slots_of(request: Request, start: int, stop: int, block_size: int) -> NDArray[np.int64]:
    """Cache rows of positions start..stop-1: block * block_size + offset."""
    positions = np.arange(start, stop)
    blocks = np.frombuffer(request.block_ids, np.int32)[positions // block_size]
    return blocks.astype(np.int64) * block_size + positions % block_size


def build_batch(
    absorbed: Sequence[ScheduledRequest], naive: Sequence[ScheduledRequest], block_size: int
) -> Batch:
    """The tensors of a step: the tokens of the absorbed items, then those of the naive ones."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    chunks: list[Chunk] = []
    for item in absorbed:
        request, first = item.request, item.request.num_computed_tokens
        if item.num_tokens == 1:  # plain integers: a decode step is made of these
            token_ids.append(request.token_ids[first])
            positions.append(first)
            block, offset = divmod(first, block_size)
            slots.append(request.block_ids[block] * block_size + offset)
        else:
            stop = first + item.num_tokens
            token_ids += request.token_ids[first:stop]
            positions += range(first, stop)
            slots += slots_of(request, first, stop, block_size).tolist()
    num_absorbed = len(token_ids)
    for item in naive:
        request, first = item.request, item.request.num_computed_tokens
        stop, place = first + item.num_tokens, len(token_ids)
        context = slots_of(request, 0, stop, block_size)
        token_ids += request.token_ids[first:stop]
        positions += range(first, stop)
        slots += context[first:].tolist()
        chunks.append(Chunk(place, len(token_ids), torch.from_numpy(context)))
    all_positions = np.array(positions, np.int32)
    seq_ids = np.repeat(
        np.arange(len(absorbed), dtype=np.int32), [item.num_tokens for item in absorbed]
    )
    return Batch(
        token_ids=torch.tensor(token_ids),
        positions=torch.from_numpy(all_positions),
        slots=torch.tensor(slots),
        num_absorbed=num_absorbed,
        seq_ids=torch.from_numpy(seq_ids),
        context_lens=torch.from_numpy(all_positions[:num_absorbed] + np.int32(1)),
        block_tables=torch.from_numpy(block_tables([item.request for item in absorbed])),
        chunks=tuple(chunks),
    )


def block_tables(requests: Sequence[Request]) -> NDArray[np.int32]:
    """[S, most blocks of any] int32, zeros behind a request's own blocks."""
    width = max((len(request.block_ids) for request in requests), default=1)
    tables = np.zeros((len(requests), width), np.int32)
    for row, request in zip(tables, requests, strict=True):
        row[: len(request.block_ids)] = np.frombuffer(request.block_ids, np.int32)
    return tables


class ModelRunner:
    """Runs schedules on a model."""

    def __init__(self, model: Decoder, block_size: int, eos_token_ids: frozenset[int]):
        self._model = model
        self._block_size = block_size
        self._eos = eos_token_ids

    def run(self, schedule: Schedule, wait_until_s: float | None = None) -> list[ItemResult]:
        """Compute a step; results in the order of the schedule's items. See Decoder.forward
        for wait_until_s and what it raises."""
        absorbed = [item for item in schedule.items if not self._is_naive(item)]
        naive = [item for item in schedule.items if self._is_naive(item)]
        batch = build_batch(absorbed, naive, self._block_size)
        num_renormalised = self._model.num_renormalised
        hidden = self._model.forward(batch, wait_until_s)
        renormalised = self._model.num_renormalised != num_renormalised
        first_rows, place = {}, 0
        for item in (*absorbed, *naive):
            first_rows[item.request.request_id] = place
            place += item.num_tokens
        sampled = self._sample(schedule.items, first_rows, hidden)
        return [
            ItemResult(
                sampled.get(item.request.request_id),
                self._prompt_logprobs(item, first_rows[item.request.request_id], hidden),
                renormalised,
            )
            for item in schedule.items
        ]

    def _is_naive(self, item: ScheduledRequest) -> bool:
        if item.num_tokens == 1:
            return False
        context_len = item.request.num_computed_tokens + item.num_tokens
        return self._model.prefers_naive(item.num_tokens, context_len)

    def _sample(
        self, items: Sequence[ScheduledRequest], first_rows: dict[str, int], hidden: Tensor
    ) -> dict[str, Sampled]:
        sampling = [i for i in items if i.samples and i.request.submit.params.max_tokens != 0]
        if not sampling:
            return {}
        places = [first_rows[item.request.request_id] + item.num_tokens - 1 for item in sampling]
        rows = [self._sample_row(item.request) for item in sampling]
        choices = self._model.sample(hidden, places, rows)
        return {i.request.request_id: c for i, c in zip(sampling, choices, strict=True)}

    def _sample_row(self, request: Request) -> SampleRow:
        params = request.submit.params
        end_ids: tuple[int, ...] = ()
        if request.num_output_tokens < params.min_tokens:
            end_ids = params.stop_token_ids
            if not params.ignore_eos:
                end_ids = (*end_ids, *self._eos)
        return SampleRow(params, request.num_output_tokens, request.counts, end_ids)

    def _prompt_logprobs(
        self, item: ScheduledRequest, first_row: int, hidden: Tensor
    ) -> tuple[tuple[int, TokenLogprob], ...]:
        """Logprobs of the prompt tokens that follow the item's tokens."""
        request, num_top = item.request, item.request.submit.params.prompt_logprobs
        if num_top is None or not request.wants_prompt_logprobs:
            return ()
        found = []
        start = request.num_computed_tokens
        stop = min(start + item.num_tokens, request.num_prompt_tokens - 1)
        for begin in range(start, stop, LOGPROB_ROWS):
            end = min(begin + LOGPROB_ROWS, stop)
            rows = hidden[first_row + begin - start : first_row + end - start]
            for place, logits in enumerate(self._model.logits(rows).cpu().numpy(), begin + 1):
                found.append((place, token_logprob(logits, request.token_ids[place], num_top)))
        return tuple(found)
