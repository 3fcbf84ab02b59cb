"""Samples of many workers as Prometheus' text: what GET /metrics answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from cluster.observability.catalog import METRIC_OF, METRICS
from experts.metrics import Sample

CONTENT_TYPE = CONTENT_TYPE_LATEST


def expose(workers: Iterable[tuple[str, Sequence[Sample]]]) -> bytes:
    """The text. workers: (worker id, its samples), each id once.

    Every sample gets the label worker_id; one that the catalogue does not know is left out.
    """
    return generate_latest(_Newest(workers))


class _Newest(Collector):
    """What prometheus_client asks for its families."""

    def __init__(self, workers: Iterable[tuple[str, Sequence[Sample]]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Family]:
        """In the order of the catalogue, without families that nobody has."""
        families = {
            metric.name: Family(metric.name.removesuffix("_total"), metric.help, metric.kind)
            for metric in METRICS
        }
        for worker_id, samples in self._workers:
            for name, labels, value in samples:
                if name in METRIC_OF:
                    labels_ = {**dict(labels), "worker_id": worker_id}
                    families[METRIC_OF[name].name].add_sample(name, labels_, value)
        return (family for family in families.values() if family.samples)
