"""The samples of a member, for whoever asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from threading import Lock

from experts.messages import MAX_SAMPLES
from experts.metrics import Sample


class MemberSamples:
    """The samples of a member for any thread: MAX_SAMPLES at most, so that they can be told."""

    def __init__(self, source: Callable[[], Iterator[Sample]]) -> None:
        """One thread at a time calls `source`."""
        self._source = source
        self._lock = Lock()

    def __call__(self) -> list[Sample]:
        with self._lock:
            return list(islice(self._source(), MAX_SAMPLES))
