"""Lines that several boards draw."""

from __future__ import annotations

from cluster.deploy.manifests.grafana import Line
from cluster.deploy.manifests.promql import Queries, Value, or_zero

SHARES = (0.5, 0.9, 0.99)


def percentiles(
    q: Queries, name: str, *, shares: tuple[float, ...] = SHARES, of: str = "", **labels: Value
) -> tuple[Line, ...]:
    """Of what a histogram observed: "p50", "p90", ..; `of` comes before."""
    return tuple(
        Line(q.quantile(share, name, **labels), f"{of} p{share * 100:g}".strip())
        for share in shares
    )


def counted(q: Queries, name: str, legend: str) -> Line:
    """Events in the window of a counter without labels; 0 before the first."""
    return Line(or_zero(q.increase(name)), legend)


def counted_by(q: Queries, name: str, label: str) -> Line:
    """Events in the window of a counter, by those values of a label that had any."""
    none = f'label_replace(vector(0), "{label}", "none", "", "")'
    return Line(f"{q.increase(name, label)} > 0 or on() {none}", f"{{{{{label}}}}}")
