"""Which worker computes which (row, expert) pair, decided on a GPU without asking the host.

The rule of router/kernels/place.py, for all rows at once: pairs with one holder decide where a row
must go; a pair that a worker visited so far holds goes to the least loaded of those; the rest goes
to the worker that holds most of it, again and again. Ties go to the lower load, then to the lower
worker index. Greedy can miss the smallest cover: the same with ties to the higher load (the host
does not try that) and the first holders of all pairs are taken instead where they visit fewer.

On the host row after row adds to the load that the next one sees. Here no row can see the others,
so each sees load + noise(row, worker), evenly spread over [0, T): rows that tie part over the
workers, and a worker that is T rows behind gets them all. One row sees the loads as they are.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_NOISE_PRIME: Final = tl.constexpr(8191)
_NOISE_FACTOR: Final = tl.constexpr(2741)
"""Squares modulo a prime, times a number so that the small ones spread too; all far below 2^31."""
_NEVER: Final = tl.constexpr(2**31 - 1)
"""The cost of a worker that may not be chosen."""
MAX_TOP_K: Final = 31
"""The pairs of a row that a worker takes are the bits of an int32."""


class Placement(NamedTuple):
    """Who computes what, in the three forms that grouping needs."""

    workers: Tensor  # [T, k] int32, -1: nobody holds the expert
    taken: Tensor  # [W, T] int32: the pairs of a row that a worker takes, pair j as bit j
    counts: Tensor  # [2, W] int32: rows and pairs of each worker


@triton.jit
def _cover(chosen, left, worker, cost):
    """chosen [PAIRS] with a worker for the pairs still at -1, left [PAIRS, WORKERS] their holders:
    the worker that holds most of them, then the cheapest one, again and again."""
    gain = tl.sum(left, axis=0)  # [WORKERS]
    while tl.max(gain, axis=0) > 0:
        widest = tl.argmin(tl.where(gain == tl.max(gain, axis=0), cost, _NEVER), axis=0)
        takes = tl.sum(tl.where(worker[None, :] == widest, left, 0), axis=1) > 0
        chosen = tl.where(takes, widest, chosen)
        left = tl.where(takes[:, None], 0, left)
        gain = tl.sum(left, axis=0)
    return chosen


@triton.jit
def _bits(chosen, pair, worker):
    """The pairs that each worker gets: [WORKERS], pair j as bit j."""
    return tl.sum(tl.where(chosen[:, None] == worker[None, :], 1 << pair[:, None], 0), axis=0)


@triton.jit
def _num_used(bits):
    return tl.sum((bits != 0).to(tl.int32), axis=0)


@triton.jit
def count_bits(x):
    """How many of the lower 31 bits are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


@triton.jit(do_not_specialize=["num_rows"])  # one compilation for every batch
def _place_kernel(
    topk_ids, holders, load, workers, taken, counts, num_rows, num_experts, num_workers,
    TOP_K: tl.constexpr, NUM_HOLDERS: tl.constexpr, PAIRS: tl.constexpr, WORKERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    pair, worker = tl.arange(0, PAIRS), tl.arange(0, WORKERS)
    is_pair, is_worker = pair < TOP_K, worker < num_workers
    expert = tl.load(topk_ids + row * TOP_K + pair, is_pair, other=-1)
    known = (expert >= 0) & (expert < num_experts)
    first = tl.full((PAIRS,), -1, tl.int32)
    holds = tl.zeros((PAIRS, WORKERS), tl.int32)
    for r in range(NUM_HOLDERS):
        holder = tl.load(holders + expert * NUM_HOLDERS + r, known, other=-1)
        first = tl.where(first < 0, holder, first)
        holds |= (holder[:, None] == worker[None, :]).to(tl.int32)
    noise = (row * num_workers + worker) % _NOISE_PRIME
    noise = noise * noise % _NOISE_PRIME * _NOISE_FACTOR % _NOISE_PRIME
    noise = noise * num_rows // _NOISE_PRIME
    cost = tl.load(load + worker, is_worker, other=0) + noise  # [WORKERS]

    single = tl.sum(holds, axis=1) == 1
    chosen = tl.where(single, first, -1)  # [PAIRS]
    visited = tl.max(tl.where(single[:, None], holds, 0), axis=0)
    near = (holds * visited[None, :]) > 0
    nearest = tl.argmin(tl.where(near, cost[None, :], _NEVER), axis=1)
    is_near = tl.max(near.to(tl.int32), axis=1) > 0
    chosen = tl.where((chosen < 0) & is_near, nearest, chosen)
    left = tl.where((chosen < 0)[:, None], holds, 0)
    other = _cover(chosen, left, worker, -cost)
    chosen = _cover(chosen, left, worker, cost)

    bits = _bits(chosen, pair, worker)  # [WORKERS]
    other_bits, first_bits = _bits(other, pair, worker), _bits(first, pair, worker)
    if _num_used(other_bits) < _num_used(bits):
        chosen, bits = other, other_bits
    if _num_used(first_bits) < _num_used(bits):
        chosen, bits = first, first_bits
    tl.store(workers + row * TOP_K + pair, chosen, is_pair)
    tl.store(taken + worker * num_rows + row, bits, is_worker)
    # Whole numbers: the sum is the same in every order.
    tl.atomic_add(counts + worker, 1, is_worker & (bits > 0), sem="relaxed")
    tl.atomic_add(counts + num_workers + worker, count_bits(bits), is_worker & (bits > 0),
                  sem="relaxed")  # fmt: skip


def place_rows(topk_ids: Tensor, holders: Tensor, load: Tensor) -> Placement:
    """topk_ids [T, k] int32, holders [E, R] int32 (-1 pads), load [W] int32 -> a placement.

    An id outside 0..E-1 (a padding row has -1) is nobody's.
    """
    check_tables(topk_ids, holders, load)
    num_rows, top_k = topk_ids.shape
    num_workers = load.shape[0]
    device = topk_ids.device
    placement = Placement(
        torch.empty(num_rows, top_k, dtype=torch.int32, device=device),
        torch.empty(num_workers, num_rows, dtype=torch.int32, device=device),
        torch.zeros(2, num_workers, dtype=torch.int32, device=device),
    )
    if num_rows:
        # A warp a row: 8 pairs x 16 workers are 4 cells a lane. Not measured on a GPU.
        _place_kernel[(num_rows,)](
            topk_ids, holders, load, *placement, num_rows, len(holders), num_workers,
            TOP_K=top_k, NUM_HOLDERS=holders.shape[1], PAIRS=triton.next_power_of_2(top_k),
            WORKERS=triton.next_power_of_2(num_workers), num_warps=1,
        )  # fmt: skip
    return placement


def place_rows_torch(topk_ids: Tensor, holders: Tensor, load: Tensor) -> Placement:
    """Plain-torch twin of `place_rows`."""
    check_tables(topk_ids, holders, load)
    known = (topk_ids >= 0) & (topk_ids < len(holders))  # [T, k]
    table = holders[topk_ids.clamp(0, len(holders) - 1)]  # [T, k, R]
    workers = _choose_torch(table.masked_fill(~known.unsqueeze(2), -1), load).int()
    everyone = torch.arange(len(load), device=load.device).view(-1, 1, 1)
    takes = everyone == workers  # [W, T, k]
    bits = 1 << torch.arange(workers.shape[1], device=load.device)
    taken = torch.where(takes, bits, 0).sum(2)
    counts = torch.stack([takes.any(2).sum(1), takes.sum((1, 2))])
    return Placement(workers, taken.int(), counts.int())


def _choose_torch(table: Tensor, load: Tensor) -> Tensor:
    """table [T, k, R]: the holders of each pair -> workers [T, k] int64."""
    everyone = torch.arange(len(load), device=table.device)
    holds = (table.unsqueeze(3) == everyone).any(2)  # [T, k, W]
    costs = _costs_torch(load, table.shape[0]).unsqueeze(1)  # [T, 1, W]
    single = holds.sum(2) == 1
    first = _first_torch(table)
    workers = torch.where(single, first, -1)
    visited = (holds & single.unsqueeze(2)).any(1, keepdim=True)  # [T, 1, W]
    near = holds & visited
    workers = torch.where((workers < 0) & near.any(2), _cheapest_torch(near, costs), workers)
    covers = [_cover_torch(workers, holds, costs), _cover_torch(workers, holds, -costs), first]
    workers = covers[0]
    for cover in covers[1:]:
        fewer = _num_visits_torch(cover, everyone) < _num_visits_torch(workers, everyone)
        workers = torch.where(fewer.unsqueeze(1), cover, workers)
    return workers


def _cover_torch(workers: Tensor, holds: Tensor, costs: Tensor) -> Tensor:
    """workers [T, k] with a holder for each pair at -1, where holds [T, k, W] has one."""
    for _ in range(workers.shape[1]):
        left = holds & (workers < 0).unsqueeze(2)
        gain = left.sum(1, keepdim=True)  # [T, 1, W]
        widest = _cheapest_torch(gain == gain.amax(2, keepdim=True), costs)  # [T, 1]
        takes = left.gather(2, widest.expand_as(workers).unsqueeze(2)).squeeze(2)  # [T, k]
        workers = torch.where(takes, widest, workers)
    return workers


def _costs_torch(load: Tensor, num_rows: int) -> Tensor:
    """[T, W] int32: load [W] as each row sees it."""
    prime: int = _NOISE_PRIME.value
    cells = torch.arange(num_rows * len(load), device=load.device)
    noise = cells.view(num_rows, len(load)) % prime
    factor: int = _NOISE_FACTOR.value
    noise = noise * noise % prime * factor % prime
    return load + (noise * num_rows // prime).int()


def _cheapest_torch(allowed: Tensor, costs: Tensor) -> Tensor:
    """allowed [.., W], costs [.., W] -> the allowed worker of least cost, the lowest in ties."""
    return costs.masked_fill(~allowed, _NEVER.value).argmin(-1)


def _first_torch(table: Tensor) -> Tensor:
    """table [T, k, R] -> the first entry of each that is no padding, -1 without one."""
    places = (table >= 0).int().argmax(2, keepdim=True)
    return table.gather(2, places).squeeze(2).long()


def _num_visits_torch(workers: Tensor, everyone: Tensor) -> Tensor:
    """workers [T, k] -> [T]: how many different ones, -1 aside."""
    return (workers.unsqueeze(2) == everyone).any(1).sum(1)


def check_tables(topk_ids: Tensor, holders: Tensor, load: Tensor) -> None:
    """Raises ValueError."""
    if topk_ids.ndim != 2 or not 1 <= topk_ids.shape[1] <= MAX_TOP_K:
        raise ValueError(f"topk_ids {tuple(topk_ids.shape)}: 1 to {MAX_TOP_K} experts a row")
    if holders.ndim != 2 or not holders.numel() or load.ndim != 1 or not load.numel():
        raise ValueError(
            f"holders {tuple(holders.shape)} is [E, R], load {tuple(load.shape)} is [W]"
        )
    if {topk_ids.dtype, holders.dtype, load.dtype} != {torch.int32}:
        raise ValueError("topk_ids, holders and load must be int32")
    if not all(t.is_contiguous() for t in (topk_ids, holders, load)):
        raise ValueError("topk_ids, holders and load must be contiguous")
