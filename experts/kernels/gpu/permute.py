"""The pairs (row, expert) of a batch in the order of their experts, in blocks of one expert each.

A grouped product computes `block_rows` rows at a time with one expert's weights, so the pairs of an
expert are padded to whole blocks. Where each expert begins depends on values, so positions come
from counts on the device and sizes from shapes only: the blocks that are not needed stay unused.

    order          0 3 5 . | 1 . . . | 2 4 . . | . . . .    '.' = P: no pair; block_rows 4
    block_experts  0         2         7         -1         -1: unused

Two kernels: every program counts the experts of its 256 pairs; then every program adds up all the
counts (from the L2 cache) and writes its pairs, and its share of the padding. The sort is stable:
the order of an expert's pairs is that of the batch.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK: Final = 256
"""Pairs of a program: 128 programs for 32k pairs, each reads 128 x 512 counts."""
_STEP: Final = 16  # blocks or rows of counts looked at together: 8k numbers, 32 a thread
_PAIR_STEP: Final = 32  # pairs compared with a chunk's together: 8k too


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


@triton.jit
def _expert_of(expert_ids, pairs, num_pairs, limit, num_experts):
    """Expert of each pair, num_experts if it is dropped, num_experts + 1 behind the last pair."""
    expert = tl.load(expert_ids + pairs, pairs < num_pairs, other=-1)
    if limit is not None:
        expert = tl.where(pairs < tl.load(limit), expert, -1)
    expert = tl.where((expert < 0) | (expert >= num_experts), num_experts, expert)
    return tl.where(pairs < num_pairs, expert, num_experts + 1)


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def _count_kernel(
    expert_ids, counts, num_pairs, limit, num_experts, CHUNK: tl.constexpr, EXPERTS: tl.constexpr
):
    """counts [chunks, EXPERTS]: pairs of each expert in each chunk."""
    chunk = tl.program_id(0)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = _expert_of(expert_ids, pairs, num_pairs, limit, num_experts)
    histogram = tl.histogram(expert, EXPERTS)
    tl.store(counts + chunk * EXPERTS + tl.arange(0, EXPERTS), histogram)


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_chunks", "num_blocks"])
def _place_kernel(
    expert_ids, counts, order, block_experts, num_pairs, limit, num_experts, num_chunks, num_blocks,
    CHUNK: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, STEP: tl.constexpr,
    PAIR_STEP: tl.constexpr,
):  # fmt: skip
    """Positions of a chunk's pairs; then a step of blocks with their padding."""
    chunk = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    steps = tl.arange(0, STEP)
    totals, before = tl.zeros((EXPERTS,), tl.int32), tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, num_chunks, STEP):
        rows = first + steps
        tile = tl.load(
            counts + rows[:, None] * EXPERTS + experts[None, :],
            (rows < num_chunks)[:, None],
            other=0,
        )
        totals += tl.sum(tile, axis=0)
        before += tl.sum(tl.where((rows < chunk)[:, None], tile, 0), axis=0)
    totals = tl.where(experts <= num_experts, totals, 0)
    blocks = tl.cdiv(totals, BLOCK_ROWS)
    ends = tl.cumsum(blocks, axis=0)
    starts = (ends - blocks) * BLOCK_ROWS

    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = _expert_of(expert_ids, pairs, num_pairs, limit, num_experts)
    position = tl.gather(starts + before, expert, axis=0)
    for first in range(0, CHUNK, PAIR_STEP):  # pairs of the same expert before each in its chunk
        others = chunk * CHUNK + first + tl.arange(0, PAIR_STEP)
        other = _expert_of(expert_ids, others, num_pairs, limit, num_experts)
        same = (other[None, :] == expert[:, None]) & (others[None, :] < pairs[:, None])
        position += tl.sum(same.to(tl.int32), axis=1)
    tl.store(order + position, pairs, pairs < num_pairs)

    block = chunk * STEP + steps
    owner = tl.sum((ends[None, :] <= block[:, None]).to(tl.int32), axis=1)
    is_block = block < num_blocks
    tl.store(block_experts + block, tl.where(owner <= num_experts, owner, -1), is_block)
    mine = experts[None, :] == owner[:, None]
    stop = tl.sum(tl.where(mine, (starts + totals)[None, :], 0), axis=1)
    at = block[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    padding = (at >= stop[:, None]) & is_block[:, None]
    tl.store(order + at, tl.broadcast_to(num_pairs, at.shape), padding)


def sort_pairs(
    expert_ids: Tensor, num_experts: int, block_rows: int, num_pairs: Tensor | None = None
) -> SortedPairs:
    """expert_ids [P] int32; ids outside of 0..num_experts-1 are dropped, and pairs from num_pairs
    (one int32 on the device) on. block_rows: a power of two."""
    _check(expert_ids, num_pairs)
    size, device = expert_ids.shape[0], expert_ids.device
    num_blocks = max_blocks(size, num_experts, block_rows)
    order = torch.empty(num_blocks * block_rows, dtype=torch.int32, device=device)
    block_experts = torch.empty(num_blocks, dtype=torch.int32, device=device)
    if size:
        num_chunks = triton.cdiv(size, _CHUNK)
        bins = triton.next_power_of_2(num_experts + 2)
        counts = torch.empty(num_chunks, bins, dtype=torch.int32, device=device)
        _count_kernel[(num_chunks,)](
            expert_ids, counts, size, num_pairs, num_experts, _CHUNK, bins, num_warps=4
        )
        _place_kernel[(max(num_chunks, triton.cdiv(num_blocks, _STEP)),)](
            expert_ids, counts, order, block_experts,
            size, num_pairs, num_experts, num_chunks, num_blocks,
            _CHUNK, bins, block_rows, _STEP, _PAIR_STEP, num_warps=8,
        )  # fmt: skip
    return SortedPairs(order, block_experts)


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
