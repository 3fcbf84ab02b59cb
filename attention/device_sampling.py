"""Logits on a device to token ids; the same ids as attention.sampler.

The largest raw logit decides most rows: its place is found on the device, and 8 bytes a row come to
the host instead of a vocabulary. Rows with a temperature, a mask, penalties or logprobs go to the
host's sampler whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attention.sampler import NOT_FINITE, Sampled, SampleRow, sample
from experts.staging import Staging


def greedy_ids(logits: Tensor) -> Tensor:
    """logits [R, V] float32 -> [R] int64: the largest (lowest id among equals; a nan counts as the
    largest), NOT_FINITE where it is nan or infinite."""
    best = logits.argmax(dim=1, keepdim=True)
    finite = logits.gather(1, best).isfinite()
    return torch.where(finite, best, NOT_FINITE).squeeze(1)


def sample_on_device(logits: Tensor, rows: Sequence[SampleRow], staging: Staging) -> list[Sampled]:
    """Choose a token for every row of logits [R, V] float32."""
    on_host = [index for index, row in enumerate(rows) if not needs_only_the_largest(row)]
    ids: list[int] = []
    if len(on_host) < len(rows):
        ids = staging.to_host(greedy_ids(logits)).wait().tolist()
    if not on_host:
        return [Sampled(token_id) for token_id in ids]
    if ids:
        (places,) = staging.to_device(torch.tensor(on_host))
        logits = logits.index_select(0, places)
    found = sample(staging.to_host(logits).wait().numpy(), [rows[index] for index in on_host])
    by_row = dict(zip(on_host, found, strict=True))
    return [by_row[index] if index in by_row else Sampled(ids[index]) for index in range(len(rows))]


def needs_only_the_largest(row: SampleRow) -> bool:
    return row.is_plain_greedy and row.params.logprobs is None
