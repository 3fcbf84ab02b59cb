"""From counters that only grow to rates. A clock is passed in."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any

from cluster.observability.request_metrics import RequestMetrics
from experts.metrics import Histogram

WINDOW_S = 10.0
MIN_INTERVAL_S = 1.0


class Rate:
    """Of a counter, a second, since it was last taken at least MIN_INTERVAL_S ago: so any number
    of readers may ask. One thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._taken_s = clock()
        self._taken = 0.0
        self._rate = 0.0

    def read(self, counter: float) -> float:
        """The rate, 0 within the first interval."""
        elapsed_s = self._clock() - self._taken_s
        if elapsed_s >= MIN_INTERVAL_S:
            self._rate = max(0.0, counter - self._taken) / elapsed_s
            self._taken_s += elapsed_s
            self._taken = counter
        return self._rate


@dataclass(frozen=True)
class _Moment:
    """Counters of the requests at one time."""

    at_s: float
    num_requests: int
    prompt_tokens: int
    generated_tokens: int
    first_tokens: tuple[int, ...]
    """Counts of the histogram, as are the gaps."""
    gaps: tuple[int, ...]


class RequestRates:
    """The requests of an ingress over the last WINDOW_S, as far as somebody called `note` about
    once a second. Any thread."""

    def __init__(
        self, metrics: RequestMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._lock = Lock()
        self._moments = deque([self._now()])

    def note(self) -> _Moment:
        """Remember the counters of now, forget those that no window needs. Returns the oldest."""
        with self._lock:
            now = self._now()
            if now.at_s - self._moments[-1].at_s >= MIN_INTERVAL_S / 2:
                self._moments.append(now)
            while len(self._moments) > 1 and now.at_s - self._moments[1].at_s >= WINDOW_S:
                self._moments.popleft()
            return self._moments[0]

    def read(self) -> dict[str, Any]:
        """For /status. Quantiles are None without a value in the window."""
        first, last = self.note(), self._now()
        window_s = max(last.at_s - first.at_s, 1e-3)
        return {
            "window_s": window_s,
            "generated_tokens_per_s": (last.generated_tokens - first.generated_tokens) / window_s,
            "prompt_tokens_per_s": (last.prompt_tokens - first.prompt_tokens) / window_s,
            "requests_per_s": (last.num_requests - first.num_requests) / window_s,
            "ttft_s": _quantiles(
                self._metrics.time_to_first_token, first.first_tokens, last.first_tokens
            ),
            "itl_s": _quantiles(self._metrics.inter_token_latency, first.gaps, last.gaps),
        }

    def _now(self) -> _Moment:
        metrics = self._metrics
        return _Moment(
            self._clock(),
            metrics.num_requests,
            metrics.prompt_tokens,
            metrics.generated_tokens,
            tuple(metrics.time_to_first_token.counts),
            tuple(metrics.inter_token_latency.counts),
        )


def _quantiles(
    histogram: Histogram, before: Sequence[int], after: Sequence[int]
) -> dict[str, float] | None:
    counts = [new - old for new, old in zip(after, before, strict=True)]
    if not any(counts):
        return None
    return {
        "p50": quantile(histogram.bounds, counts, 0.5),
        "p99": quantile(histogram.bounds, counts, 0.99),
    }


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float:
    """Of values counted by upper bound and evenly spread below it; those above the last bound
    count as that. bounds: [B]; counts: [B + 1], not all zero."""
    rank = part * sum(counts)
    below = 0
    for (low, high), count in zip(pairwise((0.0, *bounds)), counts[:-1], strict=True):
        if count and below + count >= rank:
            return low + (high - low) * (rank - below) / count
        below += count
    return bounds[-1]
