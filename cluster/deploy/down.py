"""Take a deployment away: what carries its labels, the data only when asked."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.deploy.api import Cluster, Ref
from cluster.deploy.api_errors import ClusterError, Forbidden
from cluster.deploy.follow import ORIGIN_LABEL
from cluster.deploy.manifest import Manifest

KINDS = {
    "RayService": "ray.io/v1",
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "GRPCRoute": "gateway.networking.k8s.io/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "StatefulSet": "apps/v1",
    "Service": "v1",
    "PodDisruptionBudget": "policy/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "ConfigMap": "v1",
    "RoleBinding": "rbac.authorization.k8s.io/v1",
    "Role": "rbac.authorization.k8s.io/v1",
    "ServiceAccount": "v1",
}
"""Namespaced kinds that a deployment is made of, in the order in which they go."""
DATA_KINDS = {"PersistentVolumeClaim": "v1", "Secret": "v1"}
"""Kept unless asked otherwise: the checkpoint took hours to load, and clients know the keys."""
PERIOD_S = 1.0


def ours(
    cluster: Cluster, namespace: str, name: str, *, with_data: bool = False
) -> tuple[list[Manifest], list[str]]:
    """Objects with the labels of a deployment, and the kinds that may not be listed."""
    labels = f"app.kubernetes.io/managed-by=shoal,app.kubernetes.io/instance={name}"
    found: list[Manifest] = []
    hidden: list[str] = []
    for kind, api_version in (KINDS | (DATA_KINDS if with_data else {})).items():
        try:
            found += cluster.select(api_version, kind, namespace, labels)
        except Forbidden:
            hidden.append(kind)
    return found, hidden


def obsolete(found: list[Manifest], wanted: list[Manifest]) -> list[Manifest]:
    """Objects of a deployment that its configuration no longer asks for. What something else owns,
    such as a Service that the operator made, is left to its owner."""
    named = {(each["kind"], each["metadata"]["name"]) for each in wanted}
    return [
        each
        for each in found
        if (each["kind"], each["metadata"]["name"]) not in named
        and not each["metadata"].get("ownerReferences")
    ]


def remove(
    cluster: Cluster,
    objects: list[Manifest],
    on_deleted: Callable[[Ref], None] = lambda ref: None,
) -> None:
    """Ask for the deletion of each. Raises Unreachable, Refused."""
    for manifest in objects:
        ref = Ref.of(manifest)
        if cluster.delete(ref):
            on_deleted(ref)


def await_gone(
    cluster: Cluster,
    namespace: str,
    name: str,
    timeout_s: float,
    *,
    show: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when RayService, RayClusters and their pods are gone: pods may take their whole grace
    period. Raises ClusterError when the time is up, with what is left and why."""
    deadline = clock() + timeout_s
    clusters: set[str] = set()
    while left := _left(cluster, namespace, name, clusters):
        if clock() >= deadline:
            raise ClusterError(
                f"still there after {timeout_s:.0f} s: {'; '.join(left)}; "
                "the KubeRay operator must run for its finalizers to be removed"
            )
        show(f"waiting for {len(left)} to go: {left[0]}")
        sleep(PERIOD_S)


def _left(cluster: Cluster, namespace: str, name: str, clusters: set[str]) -> list[str]:
    """What is still there. `clusters` gathers RayClusters: their pods outlive them."""
    service = cluster.get(Ref("ray.io/v1", "RayService", name, namespace))
    live = cluster.select("ray.io/v1", "RayCluster", namespace, f"{ORIGIN_LABEL}={name}")
    clusters.update(each["metadata"]["name"] for each in live)
    pods = cluster.select("v1", "Pod", namespace, "ray.io/is-ray-node=yes")
    mine = [pod for pod in pods if pod["metadata"]["labels"].get("ray.io/cluster") in clusters]
    return [_described(each) for each in [*([service] if service else []), *live, *mine]]


def _described(manifest: Manifest) -> str:
    kind = manifest.get("kind", "")
    finalizers = manifest["metadata"].get("finalizers") or []
    held = f" (held by {', '.join(finalizers)})" if finalizers else ""
    return f"{kind}/{manifest['metadata']['name']}{held}"
