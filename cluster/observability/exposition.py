"""Samples of many workers as Prometheus' text: what GET /metrics answers.

prometheus_client writes each series once; from then on only its value is new. To have it write
everything each time costs 3 ms a worker, during which no token of the process goes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from cluster.observability.catalog import METRIC_OF, METRICS, Metric
from experts.metrics import Labels, Sample

CONTENT_TYPE = CONTENT_TYPE_LATEST

Series = tuple[str, Labels]


@dataclass(slots=True)
class _Line:
    """How a sample is written, and was."""

    family: str
    series: str
    """name{label="value",..}"""
    value: float
    text: str


class Exposition:
    """Remembers how the series of live workers are written. One thread at a time."""

    def __init__(self) -> None:
        self._heads = {metric: _text(_family(metric)) for metric in METRICS}
        self._written: dict[str, dict[Series, _Line]] = {}

    def text(self, workers: Iterable[tuple[str, Sequence[Sample]]]) -> bytes:
        """The text. workers: (worker id, its samples), each id once.

        Every sample gets the label worker_id; one that the catalogue does not know is left out.
        Families come in the order of the catalogue, without those that nobody has.
        """
        lines: dict[str, list[str]] = {metric.name: [self._heads[metric]] for metric in METRICS}
        written_before, self._written = self._written, {}
        for worker_id, samples in workers:
            written = self._written[worker_id] = written_before.get(worker_id, {})
            for name, labels, value in samples:
                if (line := written.get((name, labels))) is None:
                    if name not in METRIC_OF:
                        continue
                    line = written[name, labels] = self._write(worker_id, name, labels)
                if line.value != value:
                    number = floatToGoString(value)  # type: ignore[no-untyped-call]
                    line.value, line.text = value, f"{line.series} {number}\n"
                lines[line.family].append(line.text)
        return "".join(line for ours in lines.values() if len(ours) > 1 for line in ours).encode()

    def _write(self, worker_id: str, name: str, labels: Labels) -> _Line:
        metric = METRIC_OF[name]
        family = _family(metric)
        family.add_sample(name, {**dict(labels), "worker_id": worker_id}, 0.0)
        text = _text(family).removeprefix(self._heads[metric])
        return _Line(metric.name, text.removesuffix(" 0.0\n"), 0.0, text)


class _One(Collector):
    """What prometheus_client asks for its families."""

    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> Iterator[Family]:
        yield self._family


def _family(metric: Metric) -> Family:
    return Family(metric.name.removesuffix("_total"), metric.help, metric.kind)


def _text(family: Family) -> str:
    return generate_latest(_One(family)).decode()
