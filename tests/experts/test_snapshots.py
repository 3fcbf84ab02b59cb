"""The board of the newest snapshot."""

from __future__ import annotations

import threading

from experts.messages import Snapshot
from experts.snapshots import SnapshotBoard


def snapshot(version: int) -> Snapshot:
    return Snapshot(version=version, epoch=0, ready=True, stage="")


def test_the_last_one_published_counts_even_with_a_lower_version() -> None:
    board = SnapshotBoard()
    board.publish(snapshot(7))
    board.publish(snapshot(2))
    assert board.current == (2, snapshot(2))


def test_before_the_first_nothing_is_ready() -> None:
    generation, first = SnapshotBoard().current
    assert generation == 0
    assert not first.ready


def test_waiting_ends_with_the_next_one() -> None:
    board = SnapshotBoard()
    thread = threading.Thread(target=board.publish, args=(snapshot(1),))
    thread.start()
    assert board.wait_newer(0, 10.0)
    thread.join()
    assert board.generation == 1


def test_waiting_ends_with_its_time() -> None:
    assert not SnapshotBoard().wait_newer(0, 0.001)


def test_what_came_before_the_wait_counts() -> None:
    board = SnapshotBoard()
    board.publish(snapshot(1))
    assert board.wait_newer(0, 0.0)
