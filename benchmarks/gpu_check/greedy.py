"""Greedy decoding of some sequences of one length, straight on a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attention.device_model import DeviceDecoder
from attention.model import Batch, Chunk
from gpu_check.attention_data import BLOCK_SIZE

PREFILL_ROWS = 8192
"""Of a forward pass."""


def random_prompts(count: int, length: int, vocab_size: int) -> Tensor:
    """[B, L] int64 on the host."""
    generator = torch.Generator().manual_seed(60)
    return torch.randint(0, vocab_size, (count, length), generator=generator)


class Sequences:
    """B sequences whose blocks of the cache lie one after the other."""

    def __init__(self, prompts: Tensor, num_tokens: int) -> None:
        """num_tokens: the longest they will be."""
        self.prompts = prompts
        self._blocks = -(-num_tokens // BLOCK_SIZE)
        self._count, self._length = prompts.shape
        tables = torch.arange(self._count * self._blocks, dtype=torch.int32)
        self._tables = tables.view(self._count, self._blocks)

    def prefill(self, decoder: DeviceDecoder) -> Tensor:
        """Compute all prompts; returns the first new token of each sequence, [B]."""
        each = max(1, PREFILL_ROWS // self._length)
        parts = range(0, self._count, each)
        return torch.cat([self._prefill(decoder, range(self._count)[i : i + each]) for i in parts])

    def _prefill(self, decoder: DeviceDecoder, members: range) -> Tensor:
        length, count = self._length, len(members)
        positions = torch.arange(length)
        slots = torch.stack([self._slots(member, positions) for member in members])
        nothing = torch.empty(0, dtype=torch.int32)
        batch = Batch(
            token_ids=self.prompts[members.start : members.stop].flatten(),
            positions=positions.int().repeat(count),
            slots=slots.flatten(),
            num_absorbed=0,
            seq_ids=nothing,
            context_lens=nothing,
            block_tables=torch.zeros(0, 1, dtype=torch.int32),
            chunks=tuple(Chunk(i * length, (i + 1) * length, row) for i, row in enumerate(slots)),
        )
        last = torch.arange(1, count + 1) * length - 1
        hidden = decoder.forward(batch)
        return decoder.logits(hidden[last.to(hidden.device)]).argmax(dim=1).cpu()

    def decode(self, decoder: DeviceDecoder, tokens: Tensor, num_steps: int) -> Iterator[Tensor]:
        """After `prefill`: the logits [B, V] of each step, whose best are the next step's tokens.
        A step waits for the device, as one of the engine does."""
        for step in range(num_steps):
            logits = decoder.logits(decoder.forward(self._step(tokens, self._length + step)))
            tokens = logits.argmax(dim=1).cpu()
            yield logits

    def _step(self, tokens: Tensor, position: int) -> Batch:
        place, count = torch.tensor([position]), len(tokens)
        return Batch(
            token_ids=tokens,
            positions=place.int().repeat(count),
            slots=torch.cat([self._slots(member, place) for member in range(count)]),
            num_absorbed=count,
            seq_ids=torch.arange(count, dtype=torch.int32),
            context_lens=place.int().repeat(count) + 1,
            block_tables=self._tables[:count],
            chunks=(),
        )

    def mixed(self, num_decodes: int, position: int, num_new: int) -> Batch:
        """A token at `position` of each of the first sequences beside the last one's first tokens.
        The tables are as wide as the engine makes them."""
        decodes = self._step(self.prompts[:num_decodes, 0], position)
        positions = torch.arange(num_new)
        slots = self._slots(self._count - 1, positions)
        return replace(
            decodes,
            token_ids=torch.cat([decodes.token_ids, self.prompts[-1, :num_new]]),
            positions=torch.cat([decodes.positions, positions.int()]),
            slots=torch.cat([decodes.slots, slots]),
            block_tables=decodes.block_tables[:, : position // BLOCK_SIZE + 1].contiguous(),
            chunks=(Chunk(num_decodes, num_decodes + num_new, slots),),
        )

    def _slots(self, member: int, positions: Tensor) -> Tensor:
        blocks = self._tables[member, positions // BLOCK_SIZE].long()
        return blocks * BLOCK_SIZE + positions % BLOCK_SIZE
