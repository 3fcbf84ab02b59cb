"""Replica choice and grouping: every pair once, every row once a worker, few workers a token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.dispatch import Pairs, Plan, plan_pairs

Holders = list[list[int]]


def pairs_of(experts_by_row: list[list[int]]) -> Pairs:
    rows = [row for row, experts in enumerate(experts_by_row) for _ in experts]
    experts = list(itertools.chain(*experts_by_row))
    weights = np.arange(1, len(experts) + 1, dtype=np.float32)
    return Pairs(np.array(rows, np.int64), np.array(experts, np.int64), weights)


def table_of(holders: Holders) -> np.ndarray:
    width = max(map(len, holders)) or 1
    return np.array([ids + [-1] * (width - len(ids)) for ids in holders], np.int32)


def plan(
    experts_by_row: list[list[int]],
    holders: Holders,
    usable: list[bool] | None = None,
    load: list[int] | None = None,
) -> Plan:
    num_workers = max(itertools.chain(*holders, [0])) + 1
    return plan_pairs(
        pairs_of(experts_by_row),
        table_of(holders),
        np.array(usable or [True] * num_workers),
        np.array(load or [0] * num_workers, np.int64),
    )


def workers_of(result: Plan, num_pairs: int) -> list[int]:
    """Worker of each pair, -1 for those unplaced."""
    workers = [-1] * num_pairs
    for share in result.shares:
        for p in share.pair_index:
            workers[p] = share.worker
    return workers


def test_a_row_goes_once_to_each_worker_with_all_its_experts_there() -> None:
    result = plan([[0, 1, 2], [1, 3]], [[0], [1], [0], [1]])
    first, second = result.shares
    assert (first.worker, second.worker) == (0, 1)
    assert first.row_index.tolist() == [0]
    assert first.row_ids.tolist() == [0, 0]
    assert first.expert_ids.tolist() == [0, 2]
    assert first.weights.tolist() == [1, 3]
    assert first.pair_index.tolist() == [0, 2]
    assert second.row_index.tolist() == [0, 1]
    assert second.row_ids.tolist() == [0, 1, 1]
    assert second.expert_ids.tolist() == [1, 1, 3]
    assert second.weights.tolist() == [2, 4, 5]
    assert result.unplaced.size == 0


def test_a_replica_at_a_worker_that_must_be_visited_wins_over_an_idle_one() -> None:
    result = plan([[0, 1]], [[0], [1, 0]], load=[1000, 0])
    assert workers_of(result, 2) == [0, 0]


def test_the_worker_that_takes_most_of_the_rest_is_visited() -> None:
    result = plan([[0, 1, 2]], [[0, 3], [1, 3], [2, 3]])
    assert workers_of(result, 3) == [3, 3, 3]


def test_the_least_loaded_of_equal_replicas_is_taken() -> None:
    result = plan([[0]], [[0, 1, 2]], load=[5, 3, 4])
    assert workers_of(result, 1) == [1]


def test_rows_of_one_batch_spread_over_equal_replicas() -> None:
    result = plan([[0]] * 6, [[0, 1, 2]])
    assert [len(share.row_index) for share in result.shares] == [2, 2, 2]


def test_where_greedy_is_wide_the_first_holders_are_taken() -> None:
    """Greedy takes worker 2 for four of six pairs and then needs both others as well."""
    holders = [[0], [0, 2], [0, 2], [1, 2], [1, 2], [1]]
    holders[0], holders[5] = [0, 3], [1, 4]
    assert set(workers_of(plan([[0, 1, 2, 3, 4, 5]], holders), 6)) == {0, 1}


def test_workers_in_quarantine_are_not_used() -> None:
    result = plan([[0, 1]], [[0, 1], [0]], usable=[False, True])
    assert workers_of(result, 2) == [1, -1]
    assert result.unplaced.tolist() == [1]


def test_an_expert_without_holder_is_unplaced() -> None:
    result = plan([[0, 1]], [[0], []])
    assert workers_of(result, 2) == [0, -1]


def test_no_pairs() -> None:
    result = plan([], [[0]])
    assert result.shares == []
    assert result.unplaced.size == 0


@pytest.mark.parametrize("expert", [-1, 2])
def test_an_expert_outside_the_table_is_refused(expert: int) -> None:
    with pytest.raises(ValueError, match="outside the table"):
        plan([[expert]], [[0], [0]])


def test_the_load_passed_in_is_not_changed() -> None:
    load = np.zeros(1, np.int64)
    plan_pairs(pairs_of([[0]]), table_of([[0]]), np.array([True]), load)
    assert load.tolist() == [0]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], Holders, list[bool], list[int]]:
    num_workers = draw(st.integers(1, 6))
    num_experts = draw(st.integers(1, 12))
    workers = st.integers(0, num_workers - 1)
    holders = draw(
        st.lists(
            st.lists(workers, unique=True, max_size=4), min_size=num_experts, max_size=num_experts
        )
    )
    experts = st.lists(st.integers(0, num_experts - 1), unique=True, min_size=1, max_size=6)
    rows = draw(st.lists(experts.map(sorted), max_size=8))
    usable = draw(st.lists(st.booleans(), min_size=num_workers, max_size=num_workers))
    load = draw(st.lists(st.integers(0, 9), min_size=num_workers, max_size=num_workers))
    return rows, holders, usable, load


@settings(max_examples=150)
@given(cases())
def test_properties(case: tuple[list[list[int]], Holders, list[bool], list[int]]) -> None:
    experts_by_row, holders, usable, load = case
    pairs = pairs_of(experts_by_row)
    result = plan_pairs(pairs, table_of(holders), np.array(usable), np.array(load, np.int64))
    placed = [p for share in result.shares for p in share.pair_index.tolist()]
    assert sorted([*placed, *result.unplaced.tolist()]) == list(range(len(pairs.rows)))
    for share in result.shares:
        assert usable[share.worker]
        assert share.row_index.tolist() == sorted(set(share.row_index.tolist()))
        for at, p in enumerate(share.pair_index.tolist()):
            assert share.worker in holders[pairs.experts[p]]
            assert share.row_index[share.row_ids[at]] == pairs.rows[p]
            assert share.expert_ids[at] == pairs.experts[p]
            assert share.weights[at] == pairs.weights[p]
    for p in result.unplaced.tolist():
        assert not any(usable[w] for w in holders[pairs.experts[p]])
    check_cover(experts_by_row, holders, usable, result)


def check_cover(
    experts_by_row: list[list[int]], holders: Holders, usable: list[bool], result: Plan
) -> None:
    """No token visits more workers than it would at the first usable holder of each expert."""
    workers = iter(workers_of(result, sum(map(len, experts_by_row))))
    for experts in experts_by_row:
        visited = {next(workers) for _ in experts} - {-1}
        first = [[w for w in holders[e] if usable[w]][:1] for e in experts]
        assert len(visited) <= len(set(itertools.chain(*first)))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_whole_groups_bound_the_workers_of_a_group_limited_token(data: st.DataObject) -> None:
    """8 groups of 4, a token uses experts of 3 groups; each group lies whole on 1-3 workers."""
    groups = [
        data.draw(st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=3))
        for _ in range(8)
    ]
    holders = [groups[expert // 4] for expert in range(32)]
    chosen = data.draw(st.lists(st.integers(0, 7), unique=True, min_size=3, max_size=3))
    allowed = [e for e in range(32) if e // 4 in chosen]
    experts = sorted(data.draw(st.lists(st.sampled_from(allowed), unique=True, min_size=6)))
    workers = workers_of(plan([experts], holders), len(experts))
    assert len(set(workers)) <= 3
