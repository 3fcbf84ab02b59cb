"""What a client of the expert workers counts.

A hop takes some 200 us and a histogram of four parts 1.4 us, so that what is known of an answer is
put aside (0.1 us) and sorted, many at a time, when somebody asks (0.4 us each).
"""

import threading
from collections import deque
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experts.channel.frame import Frame
from experts.hop import Fault
from experts.metrics import HOP_BOUNDS_S, Histogram

MAX_UNSORTED = 65_536
"""Answers between two looks; of more the oldest are left out of the histograms."""


class HopHistograms(NamedTuple):
    """In seconds, of answers that can be used: in the worker's queue, while it was computed, the
    rest there and back, all of it."""

    queue: Histogram
    compute: Histogram
    wire: Histogram
    total: Histogram


class HopCounters:
    """Since the start of a client, whose thread alone counts; any thread may read."""

    def __init__(self) -> None:
        self.answers = 0
        self.late_answers = 0
        self.connects = 0
        self.faults = dict.fromkeys(Fault, 0)
        self._histograms = tuple(Histogram(HOP_BOUNDS_S) for _ in range(4))
        self._unsorted: deque[tuple[int, int, float]] = deque(maxlen=MAX_UNSORTED)
        self._lock = threading.Lock()

    def count_answer(self, reply: Frame, took_s: float) -> None:
        """Of one that can be used."""
        self.answers += 1
        self._unsorted.append((reply.queue_us, reply.compute_us, took_s))

    def histograms(self) -> HopHistograms:
        """As of now, each of the same answers."""
        with self._lock:
            self._sort()
            return HopHistograms(*(histogram.copy() for histogram in self._histograms))

    def _sort(self) -> None:
        if num := len(self._unsorted):
            taken = [self._unsorted.popleft() for _ in range(num)]
            flat = np.fromiter(chain.from_iterable(taken), np.float64, 3 * num)
            queue_us, compute_us, total = flat.reshape(num, 3).T
            queue, compute = queue_us * 1e-6, compute_us * 1e-6
            wire = np.maximum(0.0, total - queue - compute)
            parts = (queue, compute, wire, total)
            for histogram, values in zip(self._histograms, parts, strict=True):
                _observe_all(histogram, values)


def _observe_all(histogram: Histogram, values: NDArray[np.float64]) -> None:
    """Each of the values [N]."""
    places = np.searchsorted(histogram.bounds, values)
    counts = np.bincount(places, minlength=len(histogram.counts))
    for place, count in enumerate(counts.tolist()):
        histogram.counts[place] += count
    histogram.total += float(values.sum())
