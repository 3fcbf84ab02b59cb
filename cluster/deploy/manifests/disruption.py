"""What goes first when nodes are scarce, and how many pods must stay when nodes are drained."""

from __future__ import annotations

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest
from cluster.deploy.manifests.names import (
    TIERS,
    Tier,
    labels,
    manifest,
    priority_class,
    selector,
)

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
    """Of the pods that a tier has at least, all but one stay: one of one pod has no budget, so that
    its node can be drained. Losing the head stops scaling and healing, so its node cannot be
    drained until somebody deletes its budget.

    `maxUnavailable` and percentages would never let any pod go: for those the controller asks the
    pods' owner for its `scale`, and a RayCluster has none.
    """
    pods: dict[Tier, int] = {tier: getattr(config, tier).pods for tier in TIERS}
    tiers = [_budget(config, tier, pods[tier] - 1) for tier in TIERS if pods[tier] > 1]
    return [_budget(config, "head", 1), *tiers]


def _budget(config: DeployConfig, component: str, min_available: int) -> Manifest:
    return manifest(
        "policy/v1",
        "PodDisruptionBudget",
        config,
        f"{config.name}-{component}",
        spec={
            "minAvailable": min_available,
            # Pods that are not ready serve nobody: without this they block drains for ever.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": selector(labels(config, component)),
        },
    )
