"""For the Prometheus operator: whom to scrape, and when to call somebody."""

from __future__ import annotations

from typing import Any

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest
from cluster.deploy.manifests.names import METRICS_PORTS, labels, manifest, selector

API_VERSION = "monitoring.coreos.com/v1"
APPLICATION = 'application="shoal"'


def monitors(config: DeployConfig) -> list[Manifest]:
    """Ray's own metrics and the counters of our scaling policies."""
    spec = {
        "selector": selector(labels(config)),
        "podMetricsEndpoints": [
            {"port": port, "relabelings": _relabelings()} for port in METRICS_PORTS
        ],
    }
    rules = {"groups": [{"name": config.name, "rules": _rules(config)}]}
    return [
        _selected(config, manifest(API_VERSION, "PodMonitor", config, config.name, spec=spec)),
        _selected(config, manifest(API_VERSION, "PrometheusRule", config, config.name, spec=rules)),
    ]


def _selected(config: DeployConfig, object_: Manifest) -> Manifest:
    """With the labels by which Prometheus finds it."""
    object_["metadata"]["labels"] |= config.monitoring.labels
    return object_


def _relabelings() -> list[dict[str, Any]]:
    """Which Ray cluster and which tier a series is of."""
    names = {"ray_io_cluster": "ray_io_cluster", "tier": "app_kubernetes_io_component"}
    return [
        {"sourceLabels": [f"__meta_kubernetes_pod_label_{label}"], "targetLabel": target}
        for target, label in names.items()
    ]


def _rules(config: DeployConfig) -> list[dict[str, Any]]:
    job = f'job="{config.namespace}/{config.name}"'
    causes = 'cause=~"error|unknown"'
    return [
        _alert(
            "ShoalHeadDown",
            f'absent(up{{{job},tier="head"}} == 1)',
            "5m",
            "critical",
            "Ray's head does not answer: nothing is scaled or replaced until it is back.",
        ),
        _alert(
            "ShoalTierEmpty",
            "sum by (deployment) "
            f"(ray_serve_deployment_replica_healthy{{{job},{APPLICATION}}}) == 0",
            "2m",
            "critical",
            "{{ $labels.deployment }} has no healthy replica: requests wait, then fail.",
        ),
        _alert(
            "ShoalScalingBlind",
            "sum by (deployment) "
            f"(increase(ray_shoal_scaling_decisions_total{{{job},{causes}}}[15m])) > 0",
            "15m",
            "warning",
            "{{ $labels.deployment }} keeps its size: its workers do not report their load.",
        ),
    ]


def _alert(name: str, expr: str, wait: str, severity: str, description: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expr,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {"description": description},
    }
