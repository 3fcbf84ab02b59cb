"""What goes first when nodes are scarce, and how many pods may be evicted at a time."""

from __future__ import annotations

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest
from cluster.deploy.manifests.names import TIERS, labels, manifest, priority_class, selector

CONTROL_PRIORITY, SERVING_PRIORITY = 100_000, 90_000


def priorities(config: DeployConfig) -> list[Manifest]:
    """The head before the workers: without it none of them can start."""
    if not config.admin_objects:
        return []
    return [
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": name, "labels": labels(config)},
            "value": value,
            "description": description,
        }
        for name, value, description in (
            (priority_class(config, "control"), CONTROL_PRIORITY, "Ray head and its Redis"),
            (priority_class(config, "serving"), SERVING_PRIORITY, "Shoal's workers"),
        )
    ]


def budgets(config: DeployConfig) -> list[Manifest]:
    """One pod of a tier at a time. Losing the head stops scaling and healing, so its node cannot be
    drained until somebody deletes its budget."""
    return [_budget(config, "head", 0), *(_budget(config, tier, 1) for tier in TIERS)]


def _budget(config: DeployConfig, component: str, max_unavailable: int) -> Manifest:
    return manifest(
        "policy/v1",
        "PodDisruptionBudget",
        config,
        f"{config.name}-{component}",
        spec={
            "maxUnavailable": max_unavailable,
            # Pods that are not ready serve nobody: without this they block drains for ever.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": selector(labels(config, component)),
        },
    )
