"""A bound on how many sequences are open, counted before a request is rendered or tokenised."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from cluster.errors import ServerOverloaded

_SMOOTHING = 0.1
"""Weight of the newest interval between two ends in their moving average."""
MAX_RETRY_AFTER_S = 60


class Admission:
    """Counts open sequences; refuses what goes past the limit and says when to come back."""

    def __init__(self, max_open: int, clock: Callable[[], float]) -> None:
        self._max_open = max_open
        self._clock = clock
        self._num_open = 0
        self._last_end: float | None = None
        self._interval_s = 0.0

    @property
    def num_open(self) -> int:
        """Sequences admitted and not yet over."""
        return self._num_open

    def enter(self, count: int) -> None:
        """Admit `count` sequences together. Raises ServerOverloaded."""
        if self._num_open + count > self._max_open:
            raise ServerOverloaded(
                f"The server has {self._num_open} open sequences and takes at most"
                f" {self._max_open}; try again later.",
                retry_after_s=self._retry_after_s(count),
            )
        self._num_open += count

    def leave(self, count: int) -> None:
        """`count` admitted sequences are over."""
        now = self._clock()
        if self._last_end is not None and count:
            interval_s = (now - self._last_end) / count
            self._interval_s += _SMOOTHING * (interval_s - self._interval_s)
        self._last_end = now
        self._num_open -= count

    def _retry_after_s(self, count: int) -> int:
        """Seconds until `count` sequences have ended at the present rate, spread by up to half.

        The spread keeps refused clients from coming back all at once.
        """
        missing = self._num_open + count - self._max_open
        expected_s = missing * self._interval_s * random.uniform(1.0, 1.5)  # noqa: S311
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(expected_s)))
