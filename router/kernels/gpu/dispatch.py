"""A dispatch plan on a GPU: rows and pairs of every worker, side by side, without asking the host.

place.py says who computes a pair. Here each row and pair gets its place behind those of earlier
workers and rows: a running count over the rows of a worker. The host learns nothing; whoever sends
copies row_starts and pair_starts to it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from router.kernels.gpu.place import Placement, count_bits, place_rows, place_rows_torch


class DispatchPlan(NamedTuple):
    """Device tensors of fixed sizes; P = T * k places for pairs, N = T * min(k, W) for rows.

    Rows and pairs lie worker after worker, then by row, then by expert: the first row_starts[W]
    (pair_starts[W]) places are used, the others are padding. A row is there once a worker.
    """

    workers: Tensor  # [T, k] int32: who computes the pair, -1: nobody holds its expert
    row_index: Tensor  # [N] int32: rows to send, -1 padding
    row_starts: Tensor  # [W + 1] int32
    answer_index: Tensor  # [T, W] int32: place of the row in row_index, -1: it does not go there
    pair_starts: Tensor  # [W + 1] int32
    pair_index: Tensor  # [P] int32: row * k + place in topk_ids, -1 padding
    row_ids: Tensor  # [P] int32: row of the pair among those of its worker, -1 padding
    expert_ids: Tensor  # [P] int32, -1 padding
    weights: Tensor  # [P] float32, 0 padding


_PARTS: Final = ["row_index", "row_starts", "pair_starts", "pair_index", "row_ids", "expert_ids"]
"""Parts of larger tensors begin anywhere. They are written place by place, so alignment gains
nothing, and would cost a compilation when it first changes."""


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=_PARTS)
def _group_kernel(
    topk_ids, topk_weights, taken, counts, row_index, row_starts, answer_index,
    pair_starts, pair_index, row_ids, expert_ids, weights, num_rows, num_workers,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, WORKERS: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one worker, behind what workers and rows before them have."""
    me, start = tl.program_id(0), tl.program_id(1) * BLOCK
    worker, cell = tl.arange(0, WORKERS), tl.arange(0, BLOCK)
    others = tl.load(counts + worker, worker < me, other=0)
    row_start = tl.sum(others)
    pair_start = tl.sum(tl.load(counts + num_workers + worker, worker < me, other=0))
    rows_before, pairs_before = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    mine = taken + me * num_rows
    for earlier in range(0, start, BLOCK):
        bits = tl.load(mine + earlier + cell)
        rows_before += (bits > 0).to(tl.int32)
        pairs_before += count_bits(bits)
    row = start + cell
    bits = tl.load(mine + row, row < num_rows, other=0)
    is_sent = bits > 0
    row_end = tl.cumsum(is_sent.to(tl.int32), axis=0) + tl.sum(rows_before)
    place = row_start + row_end - 1
    tl.store(row_index + place, row, is_sent)
    tl.store(answer_index + row * num_workers + me, tl.where(is_sent, place, -1), row < num_rows)
    num_pairs = count_bits(bits)
    at = pair_start + tl.sum(pairs_before) + tl.cumsum(num_pairs, axis=0) - num_pairs
    for j in range(TOP_K):
        is_mine = ((bits >> j) & 1) > 0
        pair = row * TOP_K + j
        tl.store(pair_index + at, pair, is_mine)
        tl.store(row_ids + at, row_end - 1, is_mine)
        tl.store(expert_ids + at, tl.load(topk_ids + pair, is_mine), is_mine)
        tl.store(weights + at, tl.load(topk_weights + pair, is_mine), is_mine)
        at += is_mine.to(tl.int32)
    if start == 0:
        tl.store(row_starts + me, row_start)
        tl.store(pair_starts + me, pair_start)
        if me == num_workers - 1:
            tl.store(row_starts + num_workers, row_start + tl.load(counts + me))
            tl.store(pair_starts + num_workers, pair_start + tl.load(counts + num_workers + me))


def plan_dispatch(
    topk_ids: Tensor, topk_weights: Tensor, holders: Tensor, load: Tensor, num_workers: int
) -> DispatchPlan:
    """topk_ids [T, k] int32, topk_weights [T, k] float32, holders [E, R] int32 -> a plan.

    holders: worker indices of each expert, -1 pads; load [W] int32: rows outstanding at each. An
    id outside 0..E-1 (a padding row has -1) is nobody's.
    """
    _check(topk_ids, topk_weights, load, num_workers)
    placed = place_rows(topk_ids, holders, load)
    num_rows, top_k = topk_ids.shape
    num_pairs, num_places = num_rows * top_k, num_rows * min(top_k, num_workers)
    device = topk_ids.device
    padded = torch.full((num_places + 3 * num_pairs,), -1, dtype=torch.int32, device=device)
    row_index, pair_index, row_ids, expert_ids = padded.split([num_places, *[num_pairs] * 3])
    ends = torch.empty(2, num_workers + 1, dtype=torch.int32, device=device)
    plan = DispatchPlan(
        workers=placed.workers,
        row_index=row_index,
        row_starts=ends[0],
        answer_index=torch.empty(num_rows, num_workers, dtype=torch.int32, device=device),
        pair_starts=ends[1],
        pair_index=pair_index,
        row_ids=row_ids,
        expert_ids=expert_ids,
        weights=torch.zeros(num_pairs, dtype=torch.float32, device=device),
    )
    if num_rows:
        _group(plan, placed, topk_ids, topk_weights)
    else:
        ends.zero_()
    return plan


def _group(plan: DispatchPlan, placed: Placement, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """Fill the plan, whose padding is there already."""
    num_rows, top_k = topk_ids.shape
    num_workers = placed.taken.shape[0]
    block = 1024  # rows a program: 4096 rows re-read 3 blocks at most. Not measured on a GPU.
    _group_kernel[(num_workers, triton.cdiv(num_rows, block))](
        topk_ids, topk_weights, placed.taken, placed.counts, plan.row_index, plan.row_starts,
        plan.answer_index, plan.pair_starts, plan.pair_index, plan.row_ids, plan.expert_ids,
        plan.weights, num_rows, num_workers,
        TOP_K=top_k, BLOCK=block, WORKERS=triton.next_power_of_2(num_workers), num_warps=8,
    )  # fmt: skip


def plan_dispatch_torch(
    topk_ids: Tensor, topk_weights: Tensor, holders: Tensor, load: Tensor, num_workers: int
) -> DispatchPlan:
    """Plain-torch twin of `plan_dispatch`."""
    _check(topk_ids, topk_weights, load, num_workers)
    workers = place_rows_torch(topk_ids, holders, load).workers
    return _group_torch(topk_ids, topk_weights, workers, num_workers)


def _group_torch(
    topk_ids: Tensor, topk_weights: Tensor, workers: Tensor, num_workers: int
) -> DispatchPlan:
    """Rows and pairs by worker: places are running counts over [W, T] and [W, T, k]."""
    num_rows, top_k = workers.shape
    everyone = torch.arange(num_workers, device=workers.device)
    taken = everyone.view(-1, 1, 1) == workers  # [W, T, k]
    sent = taken.any(2)  # [W, T]
    row_places, row_starts = _places_torch(sent)
    pair_places, pair_starts = _places_torch(taken)
    row_ids = row_places.unsqueeze(2) - row_starts[:-1].view(-1, 1, 1)  # [W, T, 1]
    num_places = num_rows * min(top_k, num_workers)
    rows = torch.arange(num_rows, device=workers.device, dtype=torch.int32)
    pairs = torch.arange(num_rows * top_k, device=workers.device, dtype=torch.int32)

    def spread(values: Tensor) -> Tensor:
        return _scatter_torch(values.expand_as(taken), taken, pair_places, num_rows * top_k)

    return DispatchPlan(
        workers=workers,
        row_index=_scatter_torch(rows.expand_as(sent), sent, row_places, num_places),
        row_starts=row_starts,
        answer_index=torch.where(sent, row_places, -1).T.contiguous(),
        pair_starts=pair_starts,
        pair_index=spread(pairs.view(num_rows, top_k)),
        row_ids=spread(row_ids),
        expert_ids=spread(topk_ids),
        weights=spread(topk_weights),
    )


def _places_torch(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """chosen [W, ...] bool -> place of each among the chosen, int32, and where a worker's begin."""
    ends = chosen.flatten().int().cumsum(0, dtype=torch.int32)
    counts = chosen.flatten(1).sum(1).cumsum(0).int()
    return ends.view_as(chosen) - 1, torch.nn.functional.pad(counts, (1, 0))


def _scatter_torch(values: Tensor, chosen: Tensor, places: Tensor, size: int) -> Tensor:
    """The chosen values at their places of [size], padded with -1 (float: 0)."""
    fill = 0 if values.is_floating_point() else -1
    out = torch.full((size + 1,), fill, dtype=values.dtype, device=values.device)
    index = torch.where(chosen, places, size)  # what is not chosen goes to a cell of its own
    return out.scatter_(0, index.flatten().long(), values.flatten())[:size]


def _check(topk_ids: Tensor, topk_weights: Tensor, load: Tensor, num_workers: int) -> None:
    if topk_weights.shape != topk_ids.shape or topk_weights.dtype != torch.float32:
        raise ValueError("topk_weights must be float32 in the shape of topk_ids")
    if not topk_weights.is_contiguous():
        raise ValueError("topk_weights must be contiguous")
    if load.shape != (num_workers,):
        raise ValueError(f"load {tuple(load.shape)} is not of {num_workers} workers")
