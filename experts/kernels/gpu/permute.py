"""The pairs (row, expert) of a batch in the order of their experts, in blocks of one expert each.

A grouped product computes `block_rows` rows at a time with one expert's weights, so the pairs of an
expert are padded to whole blocks. Where each expert begins depends on values, so positions come
from counts on the device and sizes from shapes only: the blocks that are not needed stay unused.

    order          0 3 5 . | 1 . . . | 2 4 . . | . . . .    '.' = P: no pair; block_rows 4
    block_experts  0         2         7         -1         -1: unused

Two kernels: every program counts the experts of its 512 pairs; then every program adds up all the
counts (from the L2 cache) and writes its pairs, and its share of the padding. Up to 512 pairs one
program does both. The sort is stable: the order of a expert's pairs is that of the batch.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """order [B * block_rows] int32: index of a pair, P = padding. block_experts [B] int32: expert
    of each block; E: pairs that were dropped (their results are zero); -1: an unused block, behind
    all others."""

    order: Tensor
    block_experts: Tensor

    @property
    def num_blocks(self) -> int:
        return self.block_experts.shape[0]

    @property
    def block_rows(self) -> int:
        return self.order.shape[0] // max(1, self.num_blocks)


def max_blocks(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """Blocks that suffice however the pairs spread over the experts (and the dropped ones)."""
    padding = min(num_pairs, num_experts + 1) * (block_rows - 1)
    return (num_pairs + padding) // block_rows


def sort_pairs_torch(
    expert_ids: Tensor, num_experts: int, block_rows: int, num_pairs: Tensor | None = None
) -> SortedPairs:
    """Plain-torch twin of the kernels: oracle and fall-back. Same arguments as `sort_pairs`."""
    _check(expert_ids, num_pairs)
    size, device = expert_ids.shape[0], expert_ids.device
    num_blocks = max_blocks(size, num_experts, block_rows)
    dropped = (expert_ids < 0) | (expert_ids >= num_experts)
    if num_pairs is not None:
        dropped |= torch.arange(size, device=device) >= num_pairs
    experts = torch.where(dropped, num_experts, expert_ids).long()
    counts = torch.bincount(experts, minlength=num_experts + 1)
    block_counts = (counts + block_rows - 1) // block_rows
    shift = block_counts.cumsum(0).sub(block_counts) * block_rows - (counts.cumsum(0) - counts)
    by_expert = experts.argsort(stable=True)
    order = torch.full((num_blocks * block_rows,), size, dtype=torch.int32, device=device)
    positions = torch.arange(size, device=device) + shift[experts[by_expert]]
    order[positions] = by_expert.int()
    block_experts = torch.full((num_blocks,), -1, dtype=torch.int32, device=device)
    used = torch.arange(num_experts + 1, device=device).repeat_interleave(block_counts)
    block_experts[: used.shape[0]] = used.int()
    return SortedPairs(order, block_experts)


def _check(expert_ids: Tensor, num_pairs: Tensor | None) -> None:
    if expert_ids.ndim != 1 or expert_ids.dtype != torch.int32 or not expert_ids.is_contiguous():
        raise ValueError(f"expert_ids must be [P] int32, got {expert_ids.dtype}")
    if num_pairs is not None and (num_pairs.numel() != 1 or num_pairs.dtype != torch.int32):
        raise ValueError(f"num_pairs must be one int32, got {num_pairs.dtype}")
