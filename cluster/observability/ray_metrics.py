"""A worker's samples in Ray's own metrics: each node's agent serves them as `ray_<name>`.

Counters go by what they grew. Histograms go as gauges `_bucket`, `_sum` and `_count`, which
Prometheus reads like any histogram's: of a histogram of Ray 2.60 the agent observes every value
once more, one by one, by the middle of its bucket, so that its sum is wrong and 10,000 hops a
second cost it a core. And a gauge goes some seconds after its worker.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from ray import serve
from ray.util.metrics import Counter, Gauge

from cluster.observability.catalog import METRIC_OF
from experts.metrics import Labels, Sample

logger = logging.getLogger(__name__)

EXPORT_EVERY_S = 5.0
"""Ray's agents get what is new every 10 s."""
REQUESTS = "shoal_worker_requests_total"
"""Counted for Serve too: these requests do not come through it, and Ray's stock panels find the
deployment of a worker by Serve's counter of requests."""


class RayExport:
    """A thread that tells Ray, until `close`."""

    def __init__(self, worker_id: str, samples: Callable[[], Iterable[Sample]]) -> None:
        self._worker_id = worker_id
        self._samples = samples
        self._instruments: dict[str, Gauge | _Counter] = {}
        self._told: dict[tuple[str, Labels], float] = {}
        self._requests: serve.metrics.Counter | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join()

    def export(self) -> None:
        """Tell Ray once."""
        for sample in self._samples():
            if sample.name in METRIC_OF:
                self._tell(sample)

    def _run(self) -> None:
        failure = ""
        while not self._closing.wait(EXPORT_EVERY_S):
            try:
                self.export()
                failure = ""
            except Exception as error:  # metrics must not end a worker
                if str(error) != failure:
                    logger.exception("metrics are not told to Ray")
                failure = str(error)

    def _tell(self, sample: Sample) -> None:
        name, labels, value = sample
        instrument = self._instruments.get(name) or self._open(sample)
        tags = {**dict(labels), "worker_id": self._worker_id}
        if isinstance(instrument, Gauge):
            instrument.set(value, tags)
            return
        growth = value - self._told.get((name, labels), 0.0)
        if growth or (name, labels) not in self._told:
            instrument.add(growth, tags)
            self._told[name, labels] = value
            if name == REQUESTS and growth:
                self._count_for_serve(growth)

    def _open(self, sample: Sample) -> Gauge | _Counter:
        metric = METRIC_OF[sample.name]
        keys = (*(key for key, _ in sample.labels), "worker_id")
        kind = _Counter if metric.kind == "counter" else Gauge
        instrument = self._instruments[sample.name] = kind(sample.name, metric.help, keys)
        return instrument

    def _count_for_serve(self, number: float) -> None:
        if self._requests is None:
            self._requests = serve.metrics.Counter(
                "serve_deployment_request_counter",
                description="The number of queries that have been processed in this replica.",
                tag_keys=("route",),
            )
        self._requests.inc(number, {"route": ""})


class _Counter(Counter):  # type: ignore[misc]  # Ray's classes have no types
    """Takes 0 too: a counter should be there before its first event."""

    def add(self, value: float, tags: dict[str, str]) -> None:
        self._record(value, tags)
