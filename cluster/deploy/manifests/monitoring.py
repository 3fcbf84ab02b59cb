"""For the Prometheus operator and Grafana: whom to scrape, when to call somebody, what to show.

The same for a Prometheus that is run by hand beside a Ray without Kubernetes.
"""

from __future__ import annotations

from typing import Any

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest, dump_one
from cluster.deploy.manifests.alerting import Scope
from cluster.deploy.manifests.alerts import rule_groups
from cluster.deploy.manifests.boards import BOARDS, TAG
from cluster.deploy.manifests.grafana import Board, dump
from cluster.deploy.manifests.names import METRICS_PORTS, labels, manifest, selector
from cluster.deploy.sections import AlertLimits

API_VERSION = "monitoring.coreos.com/v1"
TARGET_LABELS = {"ray_io_cluster": "ray_io_cluster", "pod_tier": "app_kubernetes_io_component"}
"""Label of every series -> the pod's label that it is. None is a label of a metric of ours."""
RAY_JOB = "ray"
"""Of the targets in the file that Ray writes."""
DISCOVERY_FILE = "/tmp/ray/prom_metrics_service_discovery.json"  # noqa: S108 - Ray's place


def objects(config: DeployConfig) -> list[Manifest]:
    """Ray's agents serve our metrics beside Ray's own."""
    spec = {
        "selector": selector(labels(config)),
        "podMetricsEndpoints": [
            {"port": port, "relabelings": _relabelings()} for port in METRICS_PORTS
        ],
    }
    job = f"{config.namespace}/{config.name}"
    scope = Scope(job, f'job="{job}",pod_tier="head"')
    rules = rule_groups(config.name, scope, config.monitoring.alerts)
    return [
        *(_dashboard(config, name, board) for name, board in BOARDS.items()),
        _selected(config, manifest(API_VERSION, "PodMonitor", config, config.name, spec=spec)),
        _selected(config, manifest(API_VERSION, "PrometheusRule", config, config.name, spec=rules)),
    ]


def by_hand() -> dict[str, str]:
    """File -> text: settings and rules of a Prometheus on the machine of Ray's head."""
    scope = Scope(RAY_JOB, f'job="{RAY_JOB}"')
    scrape = {
        "job_name": RAY_JOB,
        "file_sd_configs": [{"files": [DISCOVERY_FILE], "refresh_interval": "10s"}],
    }
    settings = {
        "global": {"scrape_interval": "10s", "evaluation_interval": "10s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [scrape],
    }
    rules = rule_groups("shoal", scope, AlertLimits())
    return {"prometheus.yml": dump_one(settings), "alerts.yml": dump_one(rules)}


def _dashboard(config: DeployConfig, name: str, board: Board) -> Manifest:
    """Grafana's sidecar loads it wherever it lies."""
    data = {f"{board.uid}.json": dump(board, TAG)}
    object_ = manifest("v1", "ConfigMap", config, f"{config.name}-{name}", data=data)
    object_["metadata"]["labels"] |= config.monitoring.dashboard_labels
    return object_


def _selected(config: DeployConfig, object_: Manifest) -> Manifest:
    """With the labels by which Prometheus finds it."""
    object_["metadata"]["labels"] |= config.monitoring.labels
    return object_


def _relabelings() -> list[dict[str, Any]]:
    """Which Ray cluster and which tier a series is of."""
    return [
        {"sourceLabels": [f"__meta_kubernetes_pod_label_{label}"], "targetLabel": target}
        for target, label in TARGET_LABELS.items()
    ]
