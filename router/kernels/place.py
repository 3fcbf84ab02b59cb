"""Choosing a replica for each (token, expert) pair and grouping the pairs by worker, on the CPU.

The choice for a token depends on the workers that it visits already and on the rows that earlier
tokens of the batch sent there, so it is a loop by nature; compiled, one token of eight experts
takes under a microsecond.
"""

from typing import Any

import numpy as np

from experts.kernels.jit import compiled


@compiled
def _lightest(holders: Any, allowed: Any, load: Any) -> Any:
    """The allowed worker of holders [R] with the least load, then the lowest index, or -1."""
    best = -1
    for w in holders:
        if w >= 0 and allowed[w] and (best < 0 or (load[w], w) < (load[best], best)):
            best = w
    return best


@compiled
def _first(holders: Any, usable: Any) -> Any:
    """The first usable worker of holders [R], or -1."""
    for w in holders:
        if w >= 0 and usable[w]:
            return w
    return -1


@compiled
def _widest(experts: Any, workers: Any, holders: Any, usable: Any, load: Any, gain: Any) -> int:
    """The usable worker that holds most of the pairs still at -1, then the one with least load."""
    gain[:] = 0
    best = -1
    for p in range(experts.shape[0]):
        if workers[p] < 0:
            for w in holders[experts[p]]:
                if w >= 0 and usable[w]:
                    gain[w] += 1
    for w in range(gain.shape[0]):
        if gain[w] and (best < 0 or (-gain[w], load[w]) < (-gain[best], load[best])):
            best = w
    return best


@compiled
def _holds(holders: Any, worker: int) -> bool:
    found = False
    for w in holders:
        found |= w == worker
    return found


@compiled
def _count_visits(workers: Any, visited: Any) -> int:
    """Distinct workers in workers [n]; visited [W] becomes their mask."""
    visited[:] = False
    count = 0
    for w in workers:
        if w >= 0 and not visited[w]:
            visited[w] = True
            count += 1
    return count


@compiled
def _place_token(
    experts: Any, holders: Any, usable: Any, load: Any, visited: Any, gain: Any, workers: Any
) -> None:
    """experts [n] of one token -> workers [n], -1 where no usable worker holds it."""
    visited[:] = False
    for p in range(experts.shape[0]):  # pairs without a choice decide where the token must go
        first = _first(holders[experts[p]], usable)
        workers[p] = -1
        if first >= 0:
            others = 0
            for w in holders[experts[p]]:
                others += w >= 0 and w != first and usable[w]
            if others == 0:
                workers[p] = first
                visited[first] = True
    for p in range(experts.shape[0]):
        if workers[p] < 0:
            workers[p] = _lightest(holders[experts[p]], visited, load)
    while True:
        widest = _widest(experts, workers, holders, usable, load, gain)
        if widest < 0:
            break
        for p in range(experts.shape[0]):
            if workers[p] < 0 and _holds(holders[experts[p]], widest):
                workers[p] = widest


@compiled
def _place_pairs(rows: Any, experts: Any, holders: Any, usable: Any, load: Any) -> Any:
    """rows [P] ascending, experts [P], holders [E, R] (-1 pads), usable [W], load [W] in rows.

    Returns workers [P] int64, -1 where no usable worker holds the expert. Per token: pairs with
    one holder first, then pairs that a worker visited already can take, then greedily the worker
    that takes most of the rest; least load among equals. Greedy can miss the smallest cover, so
    the first holder of each pair is taken instead where that visits fewer workers.
    load is updated by one a row and worker. Raises ValueError for an expert that has no row in
    holders: unchecked it would read foreign memory.
    """
    for e in experts:
        if e < 0 or e >= holders.shape[0]:
            raise ValueError("an expert id is outside the table")
    workers = np.empty(rows.shape[0], np.int64)
    visited = np.empty(usable.shape[0], np.bool_)
    gain = np.empty(usable.shape[0], np.int64)
    begin = 0
    while begin < rows.shape[0]:
        end = begin + 1
        while end < rows.shape[0] and rows[end] == rows[begin]:
            end += 1
        mine, chosen = experts[begin:end], workers[begin:end]
        _place_token(mine, holders, usable, load, visited, gain, chosen)
        num_visits = _count_visits(chosen, visited)
        if num_visits > 2:
            plain = np.empty(end - begin, np.int64)
            for p in range(end - begin):
                plain[p] = _first(holders[mine[p]], usable)
            if _count_visits(plain, visited) < num_visits:
                chosen[:] = plain
            _count_visits(chosen, visited)
        for w in range(visited.shape[0]):
            load[w] += visited[w]
        begin = end
    return workers


@compiled
def _group_pairs(rows: Any, experts: Any, weights: Any, workers: Any, num_workers: int) -> Any:
    """Sort P pairs by worker (stable), the unplaced ones (-1) last.

    Returns pair_bounds [W + 1]: worker w has pairs [bounds[w], bounds[w + 1]) of the sorted order;
    row_bounds [W + 1] the same for its distinct rows; and in sorted order pair_index [P] int64,
    row_ids [P] int32 (place of the pair's row among the worker's rows), expert_ids [P] int32,
    pair_weights [P] float32, row_index [row_bounds[W]] int64 (rows to send, ascending per worker).
    """
    num_pairs = rows.shape[0]
    pair_bounds = np.zeros(num_workers + 1, np.int64)
    row_bounds = np.zeros(num_workers + 1, np.int64)
    last_row = np.full(num_workers, -1, np.int64)
    for p in range(num_pairs):
        w = workers[p]
        if w >= 0:
            pair_bounds[w + 1] += 1
            if last_row[w] != rows[p]:
                last_row[w] = rows[p]
                row_bounds[w + 1] += 1
    for w in range(num_workers):
        pair_bounds[w + 1] += pair_bounds[w]
        row_bounds[w + 1] += row_bounds[w]
    pair_index = np.empty(num_pairs, np.int64)
    row_ids = np.empty(num_pairs, np.int32)
    expert_ids = np.empty(num_pairs, np.int32)
    pair_weights = np.empty(num_pairs, np.float32)
    row_index = np.empty(row_bounds[num_workers], np.int64)
    next_pair = pair_bounds.copy()
    next_row = row_bounds.copy()
    last_row[:] = -1
    for p in range(num_pairs):
        w = workers[p]
        if w >= 0 and last_row[w] != rows[p]:
            last_row[w] = rows[p]
            row_index[next_row[w]] = rows[p]
            next_row[w] += 1
        at = next_pair[w]  # w = -1 is the last cell: behind all workers' pairs
        next_pair[w] += 1
        pair_index[at] = p
        row_ids[at] = next_row[w] - 1 - row_bounds[w]
        expert_ids[at] = experts[p]
        pair_weights[at] = weights[p]
    return pair_bounds, row_bounds, pair_index, row_ids, expert_ids, pair_weights, row_index


@compiled
def plan(rows: Any, experts: Any, weights: Any, holders: Any, usable: Any, load: Any) -> Any:
    """_place_pairs, then _group_pairs: one call from Python, which costs more than the work."""
    workers = _place_pairs(rows, experts, holders, usable, load.copy())
    return _group_pairs(rows, experts, weights, workers, usable.shape[0])
