"""The page that tells of all metrics has those of the catalogue."""

from __future__ import annotations

from cluster.observability.catalog import METRICS
from generate_metrics_table import PAGE, with_table


def test_the_page_has_every_metric_of_the_catalogue() -> None:
    page = PAGE.read_text()
    assert page == with_table(page), "run tools/generate_metrics_table.py"
    assert all(f"| `{metric.name}` | {metric.kind} |" in page for metric in METRICS)
    assert len(METRICS) > 40
