"""DeployConfig -> manifests, a pure function: the same configuration gives the same objects."""

from __future__ import annotations

from collections.abc import Callable

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest, in_order
from cluster.deploy.manifests import (
    access,
    disruption,
    gateway,
    monitoring,
    network,
    rayservice,
    redis,
    storage,
)
from cluster.deploy.sizing import Sizing, size

PARTS: dict[str, Callable[[DeployConfig, Sizing], list[Manifest]]] = {
    "namespace": lambda config, _: access.namespace(config),
    "priorities": lambda config, _: disruption.priorities(config),
    "accounts": lambda config, _: access.accounts(config),
    "deployer": lambda config, _: access.deployer(config),
    "storage": storage.claims,
    "budgets": lambda config, _: disruption.budgets(config),
    "rayservice": rayservice.rayservice,
}
"""What every deployment has, by concern."""

COMPONENTS: dict[str, Callable[[DeployConfig], list[Manifest]]] = {
    "networkpolicy": network.policies,
    "gcs-redis": redis.objects,
    "monitoring": monitoring.objects,
    "gateway": gateway.routes,
}
"""What it may have besides. gcs-redis also changes the RayService."""


def render(config: DeployConfig) -> list[Manifest]:
    """Every object of a deployment in the order in which they are made. Raises ConfigError."""
    sizing = size(config)
    manifests = [m for part in PARTS.values() for m in part(config, sizing)]
    for name in enabled_components(config):
        manifests += COMPONENTS[name](config)
    return in_order(manifests)


def enabled_components(config: DeployConfig) -> list[str]:
    """Names of COMPONENTS."""
    switches = {
        "networkpolicy": config.network_policy.enabled,
        "gcs-redis": config.gcs_redis.enabled,
        "monitoring": config.monitoring.enabled,
        "gateway": config.gateway.enabled,
    }
    return [name for name, enabled in switches.items() if enabled]
