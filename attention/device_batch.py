"""A step's batch on a device: fresh tensors, or static ones that recorded segments read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attention.model import Batch, Chunk
from experts.staging import Staging, layout, views

_PADDING = (0, 0, -1, 0, 0)
"""Of `_rows`: a padding row attends to nothing and is not cached."""
NO_TOKENS = Batch(
    token_ids=torch.empty(0, dtype=torch.int64),
    positions=torch.empty(0, dtype=torch.int32),
    slots=torch.empty(0, dtype=torch.int64),
    num_absorbed=0,
    seq_ids=torch.empty(0, dtype=torch.int32),
    context_lens=torch.empty(0, dtype=torch.int32),
    block_tables=torch.empty(0, 0, dtype=torch.int32),
    chunks=(),
)
"""Loaded, it leaves padding only."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkGroup:
    """Neighbouring naive chunks that attend in one call: queries start..stop-1 of the batch."""

    start: int
    stop: int
    slots: Tensor  # [S] int64: the contexts of all chunks, one after the other
    cu_q: Tensor  # [B + 1] int32: chunk b has queries start + cu_q[b] .. start + cu_q[b + 1] - 1
    cu_k: Tensor  # [B + 1] int32: and rows cu_k[b] .. cu_k[b + 1] - 1 of slots
    max_q: int


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBatch:
    """See Batch; rows of padding have context_len 0 and slot -1."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int64
    seq_ids: Tensor  # [num_absorbed] int32
    context_lens: Tensor  # [num_absorbed] int32
    block_tables: Tensor  # [S, max_blocks] int32
    groups: tuple[ChunkGroup, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_absorbed(self) -> int:
        return self.seq_ids.shape[0]

    def first(self, num_rows: int) -> DeviceBatch:
        """Views of the first rows; for absorbed tokens only."""
        return DeviceBatch(
            self.token_ids[:num_rows],
            self.positions[:num_rows],
            self.slots[:num_rows],
            self.seq_ids[:num_rows],
            self.context_lens[:num_rows],
            self.block_tables[:num_rows],
        )


def upload(batch: Batch, max_expanded: int, staging: Staging) -> DeviceBatch:
    """All of a batch by one copy. max_expanded: context tokens of a group, unless a single chunk
    has more."""
    groups = list(grouped(batch.chunks, max_expanded))
    tensors = [*_rows(batch), batch.block_tables]
    for group in groups:
        tensors += [torch.cat([chunk.slots for chunk in group]), *_bounds(group)]
    arrived = iter(staging.to_device(*tensors))
    rows = [next(arrived) for _ in range(6)]
    on_device = tuple(_group(group, arrived) for group in groups)
    return DeviceBatch(rows[0], rows[1], rows[2], rows[3], rows[4], rows[5], on_device)


def _group(chunks: list[Chunk], arrived: Iterator[Tensor]) -> ChunkGroup:
    return ChunkGroup(
        start=chunks[0].start,
        stop=chunks[-1].stop,
        slots=next(arrived),
        cu_q=next(arrived),
        cu_k=next(arrived),
        max_q=max(chunk.stop - chunk.start for chunk in chunks),
    )


def grouped(chunks: tuple[Chunk, ...], max_expanded: int) -> Iterator[list[Chunk]]:
    """Neighbours whose contexts together have at most max_expanded tokens."""
    group: list[Chunk] = []
    size = 0
    for chunk in chunks:
        if group and size + len(chunk.slots) > max_expanded:
            yield group
            group, size = [], 0
        group.append(chunk)
        size += len(chunk.slots)
    if group:
        yield group


def _bounds(group: list[Chunk]) -> tuple[Tensor, Tensor]:
    """cu_q, cu_k"""
    num_queries = torch.tensor([0] + [chunk.stop - chunk.start for chunk in group])
    num_keys = torch.tensor([0] + [len(chunk.slots) for chunk in group])
    return num_queries.cumsum(0).int(), num_keys.cumsum(0).int()


def _rows(batch: Batch) -> tuple[Tensor, ...]:
    """What has an entry a token."""
    return batch.token_ids, batch.positions, batch.slots, batch.seq_ids, batch.context_lens


class StaticBatch:
    """A batch of absorbed tokens at addresses that never change, for up to `capacity` of them."""

    def __init__(self, capacity: int, table_width: int, device: torch.device) -> None:
        dtypes = (torch.int64, torch.int32, torch.int64, torch.int32, torch.int32)
        like = [torch.empty(capacity, dtype=dtype, device="meta") for dtype in dtypes]
        starts, num_bytes = layout(like)
        self._packed = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        tables = torch.zeros(capacity, table_width, dtype=torch.int32, device=device)
        rows = views(self._packed, like, starts)
        self.batch = DeviceBatch(rows[0], rows[1], rows[2], rows[3], rows[4], tables)

    def load(self, batch: Batch, staging: Staging) -> None:
        """Put a batch of at most `capacity` tokens in, all absorbed, and padding behind them."""
        missing = self.batch.num_tokens - len(batch.token_ids)
        padded = [
            pad(values, (0, missing), value=fill)
            for values, fill in zip(_rows(batch), _PADDING, strict=True)
        ]
        starts, num_bytes = layout(padded)
        packed = torch.empty(num_bytes, dtype=torch.uint8)
        for place, values in zip(views(packed, padded, starts), padded, strict=True):
            place.copy_(values)
        packed, tables = staging.to_device(packed, batch.block_tables)
        self._packed.copy_(packed)
        num_sequences, width = tables.shape
        self.batch.block_tables[:num_sequences, :width].copy_(tables)
