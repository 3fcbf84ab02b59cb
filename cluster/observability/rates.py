"""From counters that only grow to rates. A clock is passed in."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock
from typing import Any

from cluster.observability.catalog import METRIC_OF
from experts.metrics import Sample

WINDOW_S = 10.0
MIN_INTERVAL_S = 1.0
COUNTED = {
    "generated_tokens_per_s": "vllm_generation_tokens_total",
    "prompt_tokens_per_s": "vllm_prompt_tokens_total",
    "requests_per_s": "shoal_requests_admitted_total",
}
TIMED = {
    "ttft_s": "vllm_time_to_first_token_seconds_bucket",
    "itl_s": "vllm_inter_token_latency_seconds_bucket",
}
WATCHED = {*COUNTED.values(), *TIMED.values()}

Samples = Mapping[str, Sequence[Sample]]
"""By worker id."""
Series = tuple[str, str]
"""Name and bound of a bucket, "" of others: summed over all other labels."""


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
    """How much the series had grown at one time."""

    at_s: float
    grown: Mapping[Series, float]


class ClusterRates:
    """Of the requests of the whole cluster over the last WINDOW_S, as far as somebody called `note`
    meanwhile. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._values: Mapping[tuple[str, Series], float] = {}
        self._moments: deque[_Moment] = deque()

    def note(self, workers: Samples) -> None:
        """Remember how much the workers' counters have grown since the last time. Of one that was
        not here then, it is not known: it may have counted for days."""
        with self._lock:
            now_s, values = self._clock(), dict(_watched(workers))
            grown = defaultdict(float, self._moments[-1].grown if self._moments else {})
            for key in values.keys() & self._values.keys():
                grown[key[1]] += max(0.0, values[key] - self._values[key])
            self._values = values
            self._moments.append(_Moment(now_s, grown))
            while len(self._moments) > 1 and now_s - self._moments[1].at_s >= WINDOW_S:
                self._moments.popleft()

    def read(self) -> dict[str, Any]:
        """For /status, after the first note. Quantiles are None without a value in the window."""
        with self._lock:
            first, last = self._moments[0], self._moments[-1]
        window_s = last.at_s - first.at_s

        def grown(series: Series) -> float:
            return last.grown.get(series, 0.0) - first.grown.get(series, 0.0)

        return {
            "window_s": window_s,
            **{key: grown((name, "")) / max(window_s, 1e-3) for key, name in COUNTED.items()},
            **{key: _quantiles(METRIC_OF[name].bounds, name, grown) for key, name in TIMED.items()},
        }


def _watched(workers: Samples) -> Iterator[tuple[tuple[str, Series], float]]:
    """(worker, series) and its value, of what the rates are made of."""
    for worker_id, samples in workers.items():
        for name, labels, value in samples:
            if name in WATCHED:
                yield (worker_id, (name, dict(labels).get("le", ""))), value


def _quantiles(
    bounds: Sequence[float], name: str, grown: Callable[[Series], float]
) -> dict[str, float] | None:
    at_most = [grown((name, str(bound))) for bound in (*bounds, "+Inf")]
    if not at_most[-1]:
        return None
    counts = [more - less for less, more in pairwise((0.0, *at_most))]
    return {"p50": quantile(bounds, counts, 0.5), "p99": quantile(bounds, counts, 0.99)}


def quantile(bounds: Sequence[float], counts: Sequence[float], part: float) -> float:
    """Of values counted by upper bound and evenly spread below it; those above the last bound
    count as that. bounds: [B]; counts: [B + 1], not all zero."""
    rank = part * sum(counts)
    below = 0.0
    for (low, high), count in zip(pairwise((0.0, *bounds)), counts[:-1], strict=True):
        if count and below + count >= rank:
            return low + (high - low) * (rank - below) / count
        below += count
    return bounds[-1]
