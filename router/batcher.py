"""Micro-batches that wait for a lane, and which of them go together.

While every lane is busy, micro-batches of several attention workers pile up; the next free lane
takes the oldest and all others of its layer. With a free lane nothing waits to be merged.
"""

import threading
from dataclasses import dataclass

from torch import Tensor

from experts.channel.frame import Frame
from experts.channel.outbox import Outbox


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A ROUTE_BATCH that has arrived and where to answer it."""

    frame: Frame
    rows: Tensor  # [T, d]
    outbox: Outbox

    @property
    def layer(self) -> int:
        return self.frame.layer

    @property
    def num_rows(self) -> int:
        return len(self.rows)


class Batcher:
    """The queue between the connections' threads and the lanes' threads."""

    def __init__(self, max_rows: int, max_waiting: int) -> None:
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._waiting: list[MicroBatch] = []
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, item: MicroBatch) -> bool:
        """Queue it; False when too many wait or the batcher is closed."""
        with self._changed:
            if self._closed or len(self._waiting) >= self._max_waiting:
                return False
            self._waiting.append(item)
            self._changed.notify()
            return True

    def take(self) -> list[MicroBatch]:
        """Wait for work: the oldest and, up to max_rows, those of its layer. Empty once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            taken: list[MicroBatch] = []
            left: list[MicroBatch] = []
            num_rows = 0
            for item in self._waiting:
                same = not taken or item.layer == taken[0].layer
                if same and (not taken or num_rows + item.num_rows <= self._max_rows):
                    taken.append(item)
                    num_rows += item.num_rows
                else:
                    left.append(item)
            self._waiting = left
            return taken

    def close(self) -> list[MicroBatch]:
        """Wake every lane; returns what will not be served."""
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, []
            self._changed.notify_all()
            return left
