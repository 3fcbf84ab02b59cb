"""What objects, labels, ports and Secret keys are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest

Tier = Literal["ingress", "attention", "experts"]
TIERS: tuple[Tier, ...] = ("ingress", "attention", "experts")
"""Order of the worker groups: KubeRay adds groups to a live cluster at the end only, so new ones
go there."""
TIER_LABEL = "shoal.io/tier"
"""Label of Ray's nodes that the deployments' label_selector asks for."""
COMPONENT_LABEL = "app.kubernetes.io/component"
MANAGED_BY_US = {"app.kubernetes.io/managed-by": "shoal"}
"""`shoal k8s apply` adds it to the objects; what Kubernetes makes of them needs it from here."""

SERVE_PORT, GRPC_PORT = 8000, 9000
GCS_PORT, DASHBOARD_PORT, CLIENT_PORT = 6379, 8265, 10001
METRICS_PORTS = {"metrics": 8080, "as-metrics": 44217, "dash-metrics": 44227}
"""Ray's, the autoscaler's and the dashboard's; the latter two on the head only."""

CLUSTER_SECRET_KEY, TOKEN_KEY, API_KEYS_KEY, REDIS_KEY = (
    "secret",
    "auth_token",
    "keys",
    "password",
)
API_KEYS_FOLDER = "/etc/shoal/api-keys"


def labels(config: DeployConfig, component: str | None = None) -> dict[str, str]:
    """Labels of an object; with `component`, of a tier's pods and what selects them."""
    common = {"app.kubernetes.io/name": "shoal", "app.kubernetes.io/instance": config.name}
    return common | ({COMPONENT_LABEL: component} if component else {})


def manifest(api_version: str, kind: str, config: DeployConfig, name: str, **body: Any) -> Manifest:
    """An object in the deployment's namespace; a component's namespace is spelled out, too, as
    Kustomize's `namespace:` does not reach it."""
    metadata = {"name": name, "namespace": config.namespace, "labels": labels(config)}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **body}


def selector(labels: Mapping[str, str]) -> dict[str, Any]:
    """A label selector."""
    return {"matchLabels": dict(labels)}


def worker_account(config: DeployConfig) -> str:
    """Service account of all pods but the head, for which KubeRay makes one."""
    return f"{config.name}-worker"


def serving_ports(config: DeployConfig) -> dict[str, int]:
    """Of the head's and the workers' containers, by the names that KubeRay makes a Service of."""
    return {"serve": SERVE_PORT} | ({"serve-grpc": GRPC_PORT} if config.serves_grpc else {})


def serve_service(config: DeployConfig) -> str:
    """Service with HTTP and gRPC."""
    return f"{config.name}-serve-svc"


def priority_class(config: DeployConfig, role: Literal["control", "serving"]) -> str:
    """Cluster-wide, so it names the namespace, too."""
    return f"{config.namespace}-{config.name}-{role}"


def cluster_secret(config: DeployConfig) -> str:
    """Secret with what the members prove to each other."""
    return f"{config.name}-cluster-secret"


def token_secret(config: DeployConfig) -> str:
    """Secret with Ray's token."""
    return f"{config.name}-ray-token"


def api_keys_secret(config: DeployConfig) -> str:
    """Secret with the keys of clients."""
    return f"{config.name}-api-keys"


def redis(config: DeployConfig) -> str:
    """StatefulSet, Service and Secret of the Redis that keeps the head's state."""
    return f"{config.name}-redis"
