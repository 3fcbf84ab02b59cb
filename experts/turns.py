"""One computation at a time, and those who wait for their turn are computed together.

Each caller brings a job and gets it back done. Who finds nobody computing takes the oldest waiting
job and all others of its kind, its own or not; the others sleep until their job is done. So
batches grow exactly while the computing thread is the bottleneck, and a lone caller pays one lock.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Work = TypeVar("Work")


@dataclass(slots=True, eq=False)
class Job(Generic[Work]):
    """Work of `num_rows` rows that may be computed together with work of the same kind."""

    kind: Hashable
    num_rows: int
    work: Work
    done: bool = False
    error: Exception | None = None


class Turns(Generic[Work]):
    """`compute` gets the works of one batch: at least one, of one kind, at most `max_rows` rows
    together unless it is a single one."""

    def __init__(self, compute: Callable[[list[Work]], None], max_rows: int) -> None:
        self._compute = compute
        self._max_rows = max_rows
        self._changed = threading.Condition()
        self._waiting: list[Job[Work]] = []
        self._busy = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def run(self, kind: Hashable, num_rows: int, work: Work) -> None:
        """Return when the work has been computed; raises what its computation raised."""
        job = Job(kind, num_rows, work)
        with self._changed:
            self._waiting.append(job)
        while batch := self._await_turn(job):
            error: Exception | None = RuntimeError("interrupted while computing")
            try:
                self._compute([member.work for member in batch])
                error = None
            except Exception as caught:
                error = caught
            finally:  # an interrupt, too, must leave the turn to others
                self._end_turn(batch, error)
        if job.error is not None:
            raise job.error

    def _end_turn(self, batch: list[Job[Work]], error: Exception | None) -> None:
        with self._changed:
            for member in batch:
                member.done, member.error = True, error
            self._busy = False
            self._changed.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is computed or waits; False when the time runs out first."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and not self._waiting, timeout_s)

    def exclusive(self, action: Callable[[], None]) -> None:
        """Run an action while nothing is being computed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)
            action()

    def _await_turn(self, job: Job[Work]) -> list[Job[Work]]:
        """The next batch, for this thread to compute; empty once the job is done."""
        with self._changed:
            self._changed.wait_for(lambda: job.done or not self._busy)
            if job.done:
                return []
            self._busy = True
            batch: list[Job[Work]] = []
            num_rows = 0
            for other in self._waiting:
                fits = not batch or (
                    other.kind == batch[0].kind and num_rows + other.num_rows <= self._max_rows
                )
                if fits:
                    batch.append(other)
                    num_rows += other.num_rows
            self._waiting = [other for other in self._waiting if other not in batch]
            return batch
