"""The dashboards for Grafana: the same on Kubernetes and over a laptop's Prometheus."""

from __future__ import annotations

from cluster.deploy.manifests import board_experts, board_faults, board_overview
from cluster.deploy.manifests.grafana import Board, Variable
from cluster.deploy.manifests.promql import Queries

TAG = "shoal"
WRITTEN_BY = "Written by tools/generate_k8s.py from cluster/deploy: change that, then run it."
VARIABLES = (
    Variable("job", "label_values(ray_shoal_placement_epoch, job)"),
    Variable("cluster", 'label_values(ray_shoal_placement_epoch{job=~"$job"}, ray_io_cluster)'),
)
"""Scrape job, NAMESPACE/NAME under our PodMonitor; Ray cluster, of which an upgrade has two."""
QUERIES = Queries('job=~"$job",ray_io_cluster=~"$cluster"', "$__rate_interval")
_PAGES = {"overview": board_overview, "experts": board_experts, "faults": board_faults}

BOARDS = {
    name: Board(
        f"{TAG}-{name}",
        page.TITLE,
        f"{page.DESCRIPTION} {WRITTEN_BY}",
        VARIABLES,
        page.rows(QUERIES),
    )
    for name, page in _PAGES.items()
}
