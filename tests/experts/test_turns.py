"""Turns: one computation at a time, and those who wait go together."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from experts.turns import Turns


class Recorder:
    """Computes batches; the first one waits until released."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.begun = threading.Event()
        self.release = threading.Event()

    def __call__(self, works: list[str]) -> None:
        self.batches.append(works)
        if not self.begun.is_set():
            self.begun.set()
            assert self.release.wait(60)
        if "bad" in works:
            raise ValueError("bad work")


def run_while_busy(
    recorder: Recorder, turns: Turns[str], jobs: list[tuple[str, int, str]]
) -> list[BaseException | None]:
    """Start a first job, queue the others in order behind it, release; errors by job."""
    errors: list[BaseException | None] = [None] * (len(jobs) + 1)

    def start(i: int, kind: str, num_rows: int, work: str) -> threading.Thread:
        def body() -> None:
            try:
                turns.run(kind, num_rows, work)
            except ValueError as error:
                errors[i] = error

        thread = threading.Thread(target=body)
        thread.start()
        return thread

    threads = [start(0, "first", 1, "first")]
    assert recorder.begun.wait(60)
    for i, (kind, num_rows, work) in enumerate(jobs):
        threads.append(start(i + 1, kind, num_rows, work))
        wait_until(lambda i=i: turns.num_waiting == i + 1)  # type: ignore[misc]
    recorder.release.set()
    for thread in threads:
        thread.join(60)
    return errors


def wait_until(condition: Callable[[], bool]) -> None:
    patience = threading.Event()
    for _ in range(12_000):
        if condition():
            return
        patience.wait(0.005)
    raise AssertionError("did not happen")


def test_a_lone_caller_is_computed_alone() -> None:
    batches: list[list[str]] = []
    turns = Turns[str](batches.append, max_rows=10)
    turns.run("kind", 1, "a")
    turns.run("kind", 1, "b")
    assert batches == [["a"], ["b"]]


def test_those_who_wait_with_the_same_kind_go_together() -> None:
    recorder = Recorder()
    turns = Turns[str](recorder, max_rows=10)
    errors = run_while_busy(recorder, turns, [("x", 1, "a"), ("y", 1, "b"), ("x", 1, "c")])
    assert recorder.batches == [["first"], ["a", "c"], ["b"]]
    assert errors == [None] * 4


def test_a_batch_holds_at_most_max_rows() -> None:
    recorder = Recorder()
    turns = Turns[str](recorder, max_rows=5)
    run_while_busy(recorder, turns, [("x", 3, "a"), ("x", 3, "b"), ("x", 2, "c"), ("x", 9, "d")])
    assert recorder.batches == [["first"], ["a", "c"], ["b"], ["d"]]


def test_an_error_reaches_those_of_the_batch_and_nobody_else() -> None:
    recorder = Recorder()
    turns = Turns[str](recorder, max_rows=10)
    errors = run_while_busy(recorder, turns, [("x", 1, "a"), ("x", 1, "bad"), ("y", 1, "b")])
    assert [str(error) for error in errors] == ["None", "bad work", "bad work", "None"]
    turns.run("x", 1, "again")


def test_an_exclusive_action_waits_for_the_computation() -> None:
    recorder = Recorder()
    turns = Turns[str](recorder, max_rows=10)
    order: list[str] = []
    computing = threading.Thread(target=turns.run, args=("x", 1, "a"))
    computing.start()
    assert recorder.begun.wait(60)
    acting = threading.Thread(target=turns.exclusive, args=(lambda: order.append("action"),))
    acting.start()
    assert order == []
    recorder.release.set()
    acting.join(60)
    computing.join(60)
    assert order == ["action"]


def test_an_interrupt_passes_and_leaves_the_turn_to_others() -> None:
    done = []

    def compute(works: list[str]) -> None:
        if works == ["interrupt"]:
            raise KeyboardInterrupt
        done.append(works)

    turns = Turns[str](compute, max_rows=1)
    with pytest.raises(KeyboardInterrupt):
        turns.run("x", 1, "interrupt")
    turns.run("x", 1, "a")
    assert done == [["a"]]
