"""One computation for all who ask while another runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from cluster.observability.shared import Shared
from tests.fakes import TIMEOUT_S


class World:
    """A view that ends when the test says so; its answer is which call it was."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.began: queue.Queue[int] = queue.Queue()
        self.may_end = threading.Semaphore(0)
        self.shared = Shared(self._view, "test")

    def _view(self) -> int:
        self.num_calls += 1
        number = self.num_calls
        self.began.put(number)
        assert self.may_end.acquire(timeout=TIMEOUT_S)
        if number == 3:
            raise OSError("the third")
        return number


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.may_end.release(10)
    world.shared.close()


def test_whoever_asks_meanwhile_gets_the_next_answer(world: World) -> None:
    first = world.shared.ask()
    assert world.began.get(timeout=TIMEOUT_S) == 1
    later = [world.shared.ask() for _ in range(100)]
    world.may_end.release(2)
    assert first.result(TIMEOUT_S) == 1
    assert {future.result(TIMEOUT_S) for future in later} == {2}
    assert world.num_calls == 2


def test_a_fault_is_told_to_those_who_asked_for_it_only(world: World) -> None:
    world.may_end.release(4)
    assert [world.shared.ask().result(TIMEOUT_S) for _ in range(2)] == [1, 2]
    with pytest.raises(OSError, match="the third"):
        world.shared.ask().result(TIMEOUT_S)
    assert world.shared.ask().result(TIMEOUT_S) == 4
