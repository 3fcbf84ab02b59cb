"""Who may open connections to the pods, and where the pods may connect to.

8265 and 10001 run anybody's code: only KubeRay's operator gets at the first, nobody at the second.
"""

from __future__ import annotations

from typing import Any

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest
from cluster.deploy.manifests.names import (
    DASHBOARD_PORT,
    GRPC_PORT,
    METRICS_PORTS,
    SERVE_PORT,
    labels,
    manifest,
    selector,
)

NAMESPACE_LABEL = "kubernetes.io/metadata.name"
DNS_PORT = 53
API_SERVER_PORTS = (443, 6443)


def policies(config: DeployConfig) -> list[Manifest]:
    """One for all pods of the deployment, one more for the head."""
    return [
        _policy(config, config.name, labels(config), _ingress(config), _egress(config)),
        _policy(
            config,
            f"{config.name}-head",
            labels(config, "head"),
            [_from_operator(config)],
            _egress_of_head(config),
        ),
    ]


def _policy(
    config: DeployConfig,
    name: str,
    pods: dict[str, str],
    ingress: list[dict[str, Any]],
    egress: list[dict[str, Any]],
) -> Manifest:
    spec = {
        "podSelector": selector(pods),
        "policyTypes": ["Ingress", "Egress"],
        "ingress": ingress,
        "egress": egress,
    }
    return manifest("networking.k8s.io/v1", "NetworkPolicy", config, name, spec=spec)


def _ingress(config: DeployConfig) -> list[dict[str, Any]]:
    callers = [config.gateway.namespace, *config.network_policy.client_namespaces]
    return [
        {"from": [_each_other(config)]},
        {
            "from": [{"podSelector": {}}, *map(_namespace, callers)],
            "ports": _tcp(SERVE_PORT, GRPC_PORT),
        },
        {
            "from": [_namespace(config.monitoring.namespace)],
            "ports": _tcp(*METRICS_PORTS.values()),
        },
    ]


def _egress(config: DeployConfig) -> list[dict[str, Any]]:
    dns = [{"protocol": protocol, "port": DNS_PORT} for protocol in ("UDP", "TCP")]
    return [{"to": [_each_other(config)]}, {"ports": dns}]


def _egress_of_head(config: DeployConfig) -> list[dict[str, Any]]:
    """To the API server for Ray's autoscaler, to Prometheus and Grafana for Ray's dashboard."""
    monitoring = config.monitoring
    asked = monitoring.prometheus_url or monitoring.grafana_url
    pages = [{"to": [_namespace(monitoring.namespace)]}] if asked else []
    return [{"ports": _tcp(*API_SERVER_PORTS)}, *pages]


def _from_operator(config: DeployConfig) -> dict[str, Any]:
    """It asks the dashboard for Serve's state and the head's proxy for its health."""
    operator = _namespace(config.network_policy.operator_namespace)
    return {"from": [operator], "ports": _tcp(DASHBOARD_PORT, SERVE_PORT)}


def _each_other(config: DeployConfig) -> dict[str, Any]:
    """All ports: Ray's workers and our channels take random ones."""
    return {"podSelector": selector(labels(config))}


def _namespace(name: str) -> dict[str, Any]:
    return {"namespaceSelector": selector({NAMESPACE_LABEL: name})}


def _tcp(*ports: int) -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": port} for port in ports]
