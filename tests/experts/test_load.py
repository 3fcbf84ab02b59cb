"""Rows by expert over a sliding window."""

from __future__ import annotations

import numpy as np
import pytest

from experts.load import WINDOW_S, LoadBoard, LoadCounter, layer_balance


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def ids(*experts: int) -> np.ndarray:
    return np.array(experts, np.int32)


def test_rows_are_counted_by_layer_and_expert() -> None:
    counter = LoadCounter([3, 7], num_experts=4, clock=Clock())
    counter.add(3, ids(0, 2, 2))
    counter.add(7, ids(1))
    counter.add(3, ids(2))
    assert counter.totals() == {3: [1, 0, 3, 0], 7: [0, 1, 0, 0]}


def test_what_is_older_than_the_window_no_longer_counts() -> None:
    clock = Clock()
    counter = LoadCounter([0], num_experts=2, window_s=10.0, clock=clock)
    counter.add(0, ids(0))
    clock.now_s = 6.0
    counter.add(0, ids(1))
    assert counter.totals() == {0: [1, 1]}
    clock.now_s = 10.0
    assert counter.totals() == {0: [0, 1]}
    clock.now_s = 100.0
    assert counter.totals() == {0: [0, 0]}


def test_nothing_counted_yet() -> None:
    assert LoadCounter([5], num_experts=2).totals() == {5: [0, 0]}


def test_board_adds_up_the_newest_report_of_each_live_worker() -> None:
    board = LoadBoard(num_layers=2, num_experts=3)
    board.put("a", 60.0, [[9, 9, 9], [9, 9, 9]])
    board.put("a", 60.0, [[1, 2, 3], [0, 0, 4]])
    board.put("b", 30.0, [[10, 0, 0], [0, 20, 0]])
    board.put("gone", 600.0, [[7, 7, 7], [7, 7, 7]])
    load = board.total(["a", "b", "silent"])
    assert load.rows.tolist() == [[11, 2, 3], [0, 20, 4]]
    by_worker = {worker: rows.tolist() for worker, rows in load.rows_by_worker.items()}
    assert by_worker == {"a": [6, 4], "b": [10, 20], "silent": [0, 0]}
    assert load.window_s == 60.0


def test_board_forgets_who_is_dropped() -> None:
    board = LoadBoard(1, 2)
    board.put("a", 10.0, [[1, 2]])
    board.drop("a")
    board.drop("never there")
    assert board.total(["a"]).rows.tolist() == [[0, 0]]
    assert board.total([]).window_s == WINDOW_S


@pytest.mark.parametrize("rows", [[], [[1, 2]], [[1, 2], [3]], [[1, 2], [3, 4], [5, 6]]])
def test_board_refuses_another_shape(rows: list[list[int]]) -> None:
    board = LoadBoard(2, 2)
    with pytest.raises(ValueError, match=r"not \(2, 2\)"):
        board.put("a", 60.0, rows)
    assert board.total(["a"]).rows.tolist() == [[0, 0], [0, 0]]


def test_balance_is_mean_over_max_of_workers_and_of_experts() -> None:
    rows = [[30, 10, 0, 0], [5, 5, 5, 5], [0, 0, 0, 0]]
    by_worker = [[30, 20, 0], [10, 0, 0]]
    uneven, idle_worker, idle = layer_balance(rows, by_worker)
    assert (uneven.workers, uneven.experts) == (20 / 30, 10 / 30)
    assert (idle_worker.workers, idle_worker.experts) == (0.5, 1.0)
    assert (idle.workers, idle.experts) == (1.0, 1.0)


def test_balance_without_workers_is_even() -> None:
    assert [balance.workers for balance in layer_balance([[0], [0]], [])] == [1.0, 1.0]
