"""Which waiting micro-batches go together."""

from __future__ import annotations

from typing import Any

import torch

from experts.channel.frame import Frame, Kind
from router.batcher import Batcher, MicroBatch

NOBODY: Any = None


def batch(layer: int, num_rows: int) -> MicroBatch:
    rows = torch.zeros(num_rows, 2)
    return MicroBatch(Frame(Kind.ROUTE_BATCH, layer=layer, rows=rows), rows, NOBODY)


def filled(*batches: MicroBatch, max_rows: int = 10, max_waiting: int = 10) -> Batcher:
    batcher = Batcher(max_rows, max_waiting)
    for item in batches:
        assert batcher.put(item)
    return batcher


def test_the_oldest_layer_goes_first_and_takes_all_of_its_kind() -> None:
    a, b, c, d = batch(3, 1), batch(5, 1), batch(3, 2), batch(5, 4)
    batcher = filled(a, b, c, d)
    assert batcher.take() == [a, c]
    assert batcher.take() == [b, d]


def test_rows_are_bounded() -> None:
    a, b, c = batch(1, 6), batch(1, 5), batch(1, 4)
    batcher = filled(a, b, c)
    assert batcher.take() == [a, c]
    assert batcher.take() == [b]


def test_one_that_is_too_large_goes_alone() -> None:
    a, b = batch(1, 99), batch(1, 1)
    batcher = filled(a, b)
    assert batcher.take() == [a]
    assert batcher.take() == [b]


def test_too_many_are_refused() -> None:
    batcher = filled(batch(1, 1), batch(1, 1), max_waiting=2)
    assert not batcher.put(batch(1, 1))
    assert len(batcher) == 2


def test_closing_returns_what_waits_and_ends_the_lanes() -> None:
    a = batch(1, 1)
    batcher = filled(a)
    assert batcher.close() == [a]
    assert batcher.take() == []
    assert not batcher.put(batch(1, 1))
