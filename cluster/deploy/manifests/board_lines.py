"""What several boards draw, and alerts look at."""

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


def replicas(q: Queries, **labels: Value) -> tuple[str, str]:
    """Wanted and healthy ones by deployment, as Serve counts. Wanted: by load, by command or as
    configured. A deployment that never had a healthy one has no such series."""
    names = ("serve_autoscaling_target_replicas", "serve_deployment_replica_healthy")
    wanted, healthy = (q.sum(name, "deployment", application="shoal", **labels) for name in names)
    return wanted, healthy


def missing(q: Queries) -> str:
    """Replicas wanted and not healthy, by deployment."""
    wanted, healthy = replicas(q)
    return f"{wanted} - ({healthy} or {wanted} * 0)"
