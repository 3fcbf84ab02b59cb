"""Rows by expert over a sliding window."""

from __future__ import annotations

import numpy as np

from experts.load import LoadCounter


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
    counter = LoadCounter([0], num_experts=2, window_s=10.0, num_buckets=5, clock=clock)
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
