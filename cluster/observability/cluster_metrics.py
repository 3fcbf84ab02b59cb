"""The newest samples of every live worker, for /metrics and /status of an ingress."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.observability.exposition import Exposition
from cluster.observability.rates import ClusterRates, Samples
from experts.messages import MetricsReply
from experts.metrics import Sample

logger = logging.getLogger(__name__)

SHARED_S = 0.5
"""So long an answer of the directory serves all who ask. Members report once a second."""
NOTED_EVERY_S = 10.0
"""At least."""
GONE = ""
"""Stands for the workers that are gone, where one has an id."""


class ClusterMetrics:
    """Asks the directory for whoever reads. Any thread."""

    def __init__(
        self,
        worker_id: str,
        own: Callable[[], Sequence[Sample]],
        ask: Callable[[], MetricsReply],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """own: the samples of this worker. `ask` blocks and raises OSError."""
        self._worker_id = worker_id
        self._own = own
        self._ask = ask
        self._clock = clock
        self._lock = threading.Lock()
        self._asked_s = -math.inf
        self._workers: Samples = {}
        self._gone: Sequence[Sample] = ()
        self._exposition = Exposition()
        self._text: bytes | None = None
        self.rates = ClusterRates(clock)
        self.thread = ThreadPoolExecutor(1, "cluster-metrics")
        """For readers that must not block: a directory that hangs holds up no other work."""

    def read(self) -> Samples:
        """Of all workers; while the directory is away, this one's. Blocks for seconds at most."""
        with self._lock:
            return self._read()

    def read_ever(self) -> Samples:
        """The same with the counters of workers that are gone, so that sums of counters never
        shrink while the directory lives."""
        with self._lock:
            return {**self._read(), GONE: self._gone}

    def text(self) -> bytes:
        """The same for Prometheus."""
        with self._lock:
            workers = self._read()
            if self._text is None:
                self._text = self._exposition.text(workers.items())
            return self._text

    def tick(self) -> None:
        """To be called about once a second, so that rates are known to the first who asks too.
        Returns at once."""
        if self._clock() - self._asked_s >= NOTED_EVERY_S:
            self.thread.submit(self.read)

    def close(self) -> None:
        """End the thread, after what it is at."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _read(self) -> Samples:
        if self._clock() - self._asked_s >= SHARED_S:
            others = self._ask_all()
            self._asked_s = self._clock()
            self._workers = {**others, self._worker_id: self._own()}
            self._text = None
            self.rates.note(self._workers)
        return self._workers

    def _ask_all(self) -> Samples:
        try:
            reply = self._ask()
        except OSError as error:
            logger.info("metrics of the workers: %s", error)
            return {}
        self._gone = reply.gone
        return {worker.worker_id: worker.samples for worker in reply.workers}


def value_of(samples: Sequence[Sample], name: str) -> float | None:
    """Of the first series of that name; None without one."""
    return next((sample.value for sample in samples if sample.name == name), None)


def sum_of(workers: Samples, name: str) -> float:
    """Over all workers and labels."""
    return sum(s.value for samples in workers.values() for s in samples if s.name == name)


def by_label(workers: Samples, name: str, label: str) -> dict[str, float]:
    """Label value -> sum over the workers."""
    found: dict[str, float] = {}
    for samples in workers.values():
        for sample in samples:
            if sample.name == name:
                key = dict(sample.labels).get(label, "")
                found[key] = found.get(key, 0.0) + sample.value
    return found
