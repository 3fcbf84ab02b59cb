"""Which worker computes which (row, expert) pair, planned on a GPU without asking the host.

The rule of router/kernels/place.py, for all rows at once: pairs with one holder decide where a row
must go; a pair that a worker visited so far holds goes to the least loaded of those; the rest goes
to the worker that holds most of it, again and again. If the first holders of all pairs are fewer
workers, they are taken instead. Ties go to the lower load, then to the lower worker index.

On the host row after row adds to the load that the next one sees. Here no row can see the others,
so each sees load + noise(row, worker), evenly spread over [0, T): rows that tie part over the
workers, and a worker that is T rows behind gets them all. One row sees the loads as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOISE_PRIME = 8191
"""Squares modulo a prime: spread well, and exact in int32 for T * W up to any size."""


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


def plan_dispatch(
    topk_ids: Tensor, topk_weights: Tensor, holders: Tensor, load: Tensor, num_workers: int
) -> DispatchPlan:
    """topk_ids [T, k] int32, topk_weights [T, k] float32, holders [E, R] int32 -> a plan.

    holders: worker indices of each expert, -1 pads; load [W] int32: rows outstanding at each. An
    id outside 0..E-1 (a padding row has -1) is nobody's.
    """
    return plan_dispatch_torch(topk_ids, topk_weights, holders, load, num_workers)


def plan_dispatch_torch(
    topk_ids: Tensor, topk_weights: Tensor, holders: Tensor, load: Tensor, num_workers: int
) -> DispatchPlan:
    """Plain-torch twin of `plan_dispatch`."""
    known = (topk_ids >= 0) & (topk_ids < len(holders))  # [T, k]
    table = holders[topk_ids.clamp(0, len(holders) - 1)]  # [T, k, R]
    table = table.masked_fill(~known.unsqueeze(2), -1)
    workers = _place_torch(table, load, num_workers).int()
    return _group_torch(topk_ids, topk_weights, workers, num_workers)


def _place_torch(table: Tensor, load: Tensor, num_workers: int) -> Tensor:
    """table [T, k, R]: the holders of each pair -> workers [T, k] int64."""
    everyone = torch.arange(num_workers, device=table.device)
    holds = (table.unsqueeze(3) == everyone).any(2)  # [T, k, W]
    costs = _costs_torch(load, table.shape[0]).unsqueeze(1)  # [T, 1, W]
    single = holds.sum(2) == 1
    first = _first_torch(table)
    workers = torch.where(single, first, -1)
    visited = (holds & single.unsqueeze(2)).any(1, keepdim=True)  # [T, 1, W]
    near = holds & visited
    workers = torch.where((workers < 0) & near.any(2), _cheapest_torch(near, costs), workers)
    for _ in range(table.shape[1]):
        left = holds & (workers < 0).unsqueeze(2)
        gain = left.sum(1, keepdim=True)  # [T, 1, W]
        widest = _cheapest_torch(gain == gain.amax(2, keepdim=True), costs)  # [T, 1]
        takes = left.gather(2, widest.expand_as(workers).unsqueeze(2)).squeeze(2)  # [T, k]
        workers = torch.where(takes, widest, workers)
    fewer = _num_visits_torch(first, everyone) < _num_visits_torch(workers, everyone)
    return torch.where(fewer.unsqueeze(1), first, workers)


def _costs_torch(load: Tensor, num_rows: int) -> Tensor:
    """[T, W] int32: load [W] as each row sees it."""
    noise = torch.arange(num_rows * len(load), device=load.device).view(num_rows, -1) % NOISE_PRIME
    return load + (noise * noise % NOISE_PRIME * num_rows // NOISE_PRIME).int()


def _cheapest_torch(allowed: Tensor, costs: Tensor) -> Tensor:
    """allowed [.., W], costs [.., W] -> the allowed worker of least cost, the lowest in ties."""
    return costs.masked_fill(~allowed, torch.iinfo(torch.int32).max).argmin(-1)


def _first_torch(table: Tensor) -> Tensor:
    """table [T, k, R] -> the first entry of each that is no padding, -1 without one."""
    places = (table >= 0).int().argmax(2, keepdim=True)
    return table.gather(2, places).squeeze(2).long()


def _num_visits_torch(workers: Tensor, everyone: Tensor) -> Tensor:
    """workers [T, k] -> [T]: how many different ones, -1 aside."""
    return (workers.unsqueeze(2) == everyone).any(1).sum(1)


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
