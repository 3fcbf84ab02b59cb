"""Queries in PromQL over the metrics of the catalogue, the same for boards and for alerts.

A query that does not fit its metric (a rate of a gauge, a label that it lacks) is no query here.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.observability.catalog import BY_NAME, Kind, Metric

PREFIX = "ray_"
"""Ray's agents put it before the names of all metrics that they serve."""
OF_SERVE = ("deployment", "application")
OF_RAY = {
    metric.name: metric
    for metric in (
        Metric("serve_autoscaling_target_replicas", "gauge", "Wanted replicas.", (), OF_SERVE),
        Metric("serve_deployment_replica_healthy", "gauge", "1 if healthy.", (), OF_SERVE),
        Metric("serve_deployment_status", "gauge", "2: replicas died or hang.", (), OF_SERVE),
        Metric("node_mem_used", "gauge", "Bytes.", ()),
        Metric("node_mem_total", "gauge", "Bytes.", ()),
    )
}
"""What boards and alerts ask of Ray itself."""
ADDED = ("worker_id", "instance", "le")
"""Labels that exports, Prometheus and histograms add to those of a metric."""


@dataclass(frozen=True)
class NoneOf:
    """Any value of a label but these."""

    values: tuple[str, ...]


Value = str | tuple[str, ...] | NoneOf
"""Of a label: it, any of several patterns, or none of several."""
EXPERT_WORKERS = ("experts-.*",)
"""Their worker ids."""


@dataclass(frozen=True)
class Queries:
    """Over the series that `matchers` choose (`job="ray"`); rates are means over `window`."""

    matchers: str
    window: str

    def rate(self, name: str, *by: str, **labels: Value) -> str:
        """Of a counter, a second, added up over all labels but `by`."""
        return self._over_window("rate", name, by, labels)

    def increase(self, name: str, *by: str, **labels: Value) -> str:
        """Of a counter in the window, added up over all labels but `by`."""
        return self._over_window("increase", name, by, labels)

    def sum(self, name: str, *by: str, **labels: Value) -> str:
        """Of a gauge."""
        return self._of_gauge("sum", name, by, labels)

    def mean(self, name: str, *by: str, **labels: Value) -> str:
        """Of a gauge."""
        return self._of_gauge("avg", name, by, labels)

    def min(self, name: str, *by: str, **labels: Value) -> str:
        """Of a gauge."""
        return self._of_gauge("min", name, by, labels)

    def max(self, name: str, *by: str, **labels: Value) -> str:
        """Of a gauge."""
        return self._of_gauge("max", name, by, labels)

    def peak(self, name: str, **labels: Value) -> str:
        """Of a gauge, the highest value in the window."""
        series = self._series(name, "gauge", "", (), labels)
        return _aggregate("max", (), f"max_over_time({series}[{self.window}])")

    def count(self, name: str, **labels: Value) -> str:
        """How many values a second a histogram observed."""
        return self._rate_of(name, "_count", (), labels)

    def average(self, name: str, **labels: Value) -> str:
        """Of the values that a histogram observed."""
        return f"{self._rate_of(name, '_sum', (), labels)} / {self.count(name, **labels)}"

    def quantile(self, share: float, name: str, **labels: Value) -> str:
        """Of the values that a histogram observed."""
        return f"histogram_quantile({share}, {self._rate_of(name, '_bucket', ('le',), labels)})"

    def _over_window(
        self, function: str, name: str, by: tuple[str, ...], labels: dict[str, Value]
    ) -> str:
        series = self._series(name, "counter", "", by, labels)
        return _aggregate("sum", by, f"{function}({series}[{self.window}])")

    def _of_gauge(
        self, aggregation: str, name: str, by: tuple[str, ...], labels: dict[str, Value]
    ) -> str:
        return _aggregate(aggregation, by, self._series(name, "gauge", "", by, labels))

    def _rate_of(
        self, name: str, suffix: str, by: tuple[str, ...], labels: dict[str, Value]
    ) -> str:
        series = self._series(name, "histogram", suffix, by, labels)
        return _aggregate("sum", by, f"rate({series}[{self.window}])")

    def _series(
        self, name: str, kind: Kind, suffix: str, by: tuple[str, ...], labels: dict[str, Value]
    ) -> str:
        metric = BY_NAME.get(name) or OF_RAY[name]
        if metric.kind != kind or not {*by, *labels} <= {*metric.labels, *ADDED}:
            raise ValueError(f"{name} is a {metric.kind} with the labels {metric.labels}")
        chosen = ",".join([self.matchers, *(_matcher(*item) for item in labels.items())])
        return f"{PREFIX}{name}{suffix}{{{chosen}}}"


def _matcher(label: str, value: Value) -> str:
    if isinstance(value, str):
        return f'{label}="{value}"'
    if isinstance(value, NoneOf):
        return f'{label}!~"{"|".join(value.values)}"'
    return f'{label}=~"{"|".join(value)}"'


def _aggregate(aggregation: str, by: tuple[str, ...], query: str) -> str:
    grouped = f" by ({', '.join(by)}) " if by else ""
    return f"{aggregation}{grouped}({query})"


def or_zero(query: str) -> str:
    """0 where nothing was counted yet: a counter has no series before its first event."""
    return f"{query} or on() vector(0)"
