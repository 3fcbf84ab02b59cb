"""Rows by expert over a sliding window."""

from __future__ import annotations

import numpy as np
import pytest

from experts.load import (
    RECENT_S,
    WINDOW_S,
    LoadBoard,
    LoadCounter,
    layer_balance,
    pack,
    unpack,
)
from experts.messages import LoadReport


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


def test_recent_is_the_newest_complete_slices() -> None:
    """A window of 60 s has slices of 1 s; 5 of them are recent, not the one under way."""
    clock = Clock()
    counter = LoadCounter([3, 7], num_experts=2, clock=clock)
    assert counter.recent_s == 5.0
    clock.now_s = 20.5
    counter.add(7, ids(0, 1, 1))
    for now_s, recent in ((20.9, [0, 0]), (21.0, [1, 2]), (25.9, [1, 2]), (26.0, [0, 0])):
        clock.now_s = now_s
        report = counter.report()
        assert unpack(report.rows, 2, 2).tolist() == [[0, 0], [1, 2]]
        assert unpack(report.recent_rows, 2, 2).tolist() == [[0, 0], recent], now_s
    clock.now_s = 80.0
    assert counter.report().rows == bytes(2 * 2 * 8)


@pytest.mark.parametrize(
    ("window_s", "recent_s"), [(60.0, 5.0), (1.0, 59 / 60), (10.0, 5.0), (3600.0, 60.0)]
)
def test_recent_is_about_five_seconds_of_any_window(window_s: float, recent_s: float) -> None:
    assert LoadCounter([0], 1, window_s).recent_s == pytest.approx(recent_s)


def report(
    rows: list[list[int]], recent: list[list[int]], window_s: float = 60.0, recent_s: float = 5.0
) -> LoadReport:
    return LoadReport(
        window_s=window_s,
        rows=pack(np.array(rows)),
        recent_s=recent_s,
        recent_rows=pack(np.array(recent)),
    )


def test_board_adds_up_the_newest_report_of_each_live_worker() -> None:
    board = LoadBoard(num_layers=2, num_experts=3)
    board.put("a", report([[9, 9, 9], [9, 9, 9]], [[9, 9, 9], [9, 9, 9]]))
    board.put("a", report([[1, 2, 3], [0, 0, 4]], [[0, 0, 1], [0, 0, 1]]))
    board.put("b", report([[10, 0, 0], [0, 20, 0]], [[0, 0, 2], [3, 0, 0]], 30.0, 4.0))
    board.put("gone", report([[7, 7, 7], [7, 7, 7]], [[7, 7, 7], [7, 7, 7]], 600.0, 50.0))
    workers = ["a", "b", "silent"]

    load = board.total(workers)
    assert load.rows.tolist() == [[11, 2, 3], [0, 20, 4]]
    by_worker = {worker: rows.tolist() for worker, rows in load.rows_by_worker.items()}
    assert by_worker == {"a": [6, 4], "b": [10, 20], "silent": [0, 0]}
    assert load.window_s == 60.0

    recent = board.recent(workers)
    assert recent.rows.tolist() == [[0, 0, 3], [3, 0, 1]]
    by_worker = {worker: rows.tolist() for worker, rows in recent.rows_by_worker.items()}
    assert by_worker == {"a": [1, 1], "b": [2, 3], "silent": [0, 0]}
    assert recent.window_s == 5.0


def test_board_forgets_who_is_dropped() -> None:
    board = LoadBoard(1, 2)
    board.put("a", report([[1, 2]], [[1, 2]], 10.0, 2.0))
    board.drop("a")
    board.drop("never there")
    for load in (board.total(["a"]), board.recent(["a"])):
        assert load.rows.tolist() == [[0, 0]]
    assert (board.total([]).window_s, board.recent([]).window_s) == (WINDOW_S, RECENT_S)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[1, 2]], "16 bytes of rows, not those of 2 x 2"),
        ([[1, 2], [3, 4], [5, 6]], "48 bytes of rows"),
        ([[1, 2], [3, -1]], "not in 0..2"),
        ([[1, 2], [3, 1 << 40]], "not in 0..2"),
    ],
)
def test_board_refuses_other_rows(rows: list[list[int]], words: str) -> None:
    board, good = LoadBoard(2, 2), [[0, 0], [0, 0]]
    for message in (report(rows, good), report(good, rows)):
        with pytest.raises(ValueError, match=words):
            board.put("a", message)
        assert board.total(["a"]).rows.tolist() == good
    board.put("a", report([[1, 2], [3, (1 << 40) - 1]], good))


def test_balance_is_mean_over_max_of_workers_and_of_experts() -> None:
    rows = [[30, 10, 0, 0], [5, 5, 5, 5], [0, 0, 0, 0]]
    by_worker = [[30, 20, 0], [10, 0, 0]]
    uneven, idle_worker, idle = layer_balance(rows, by_worker)
    assert (uneven.workers, uneven.experts) == (20 / 30, 10 / 30)
    assert (idle_worker.workers, idle_worker.experts) == (0.5, 1.0)
    assert (idle.workers, idle.experts) == (1.0, 1.0)


def test_balance_without_workers_is_even() -> None:
    assert [balance.workers for balance in layer_balance([[0], [0]], [])] == [1.0, 1.0]
