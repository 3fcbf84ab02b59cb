"""Take a deployment away: what carries its labels, the data only when asked."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.deploy.api import FIELD_MANAGER, Cluster, Ref
from cluster.deploy.api_errors import ClusterError, Forbidden
from cluster.deploy.apply import INSTANCE, MANAGED_BY
from cluster.deploy.follow import ORIGIN_LABEL
from cluster.deploy.manifest import Manifest, identity

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
"""Namespaced kinds that a deployment is made of."""
PERIOD_S = 1.0


def ours(
    cluster: Cluster, namespace: str, name: str, *, with_claims: bool = False
) -> tuple[list[Manifest], list[str]]:
    """Objects that `shoal k8s apply` made for a deployment, and the kinds that may not be listed.
    Secrets are not among them, and claims only when asked: the checkpoint took hours to load."""
    labels = f"{MANAGED_BY}={FIELD_MANAGER},{INSTANCE}={name}"
    kinds = KINDS | ({"PersistentVolumeClaim": "v1"} if with_claims else {})
    found: list[Manifest] = []
    hidden: list[str] = []
    for kind, api_version in kinds.items():
        try:
            found += cluster.select(api_version, kind, namespace, labels)
        except Forbidden:
            hidden.append(kind)
    return found, hidden


def obsolete(found: list[Manifest], wanted: list[Manifest]) -> list[Manifest]:
    """Objects of a deployment that its configuration no longer asks for."""
    named = {identity(each) for each in wanted}
    return [each for each in found if identity(each) not in named]


def live_clusters(cluster: Cluster, service: Ref) -> list[Manifest]:
    """RayClusters of a RayService; they are there until their own clean-up is done."""
    label = f"{ORIGIN_LABEL}={service.name}"
    return cluster.select("ray.io/v1", "RayCluster", service.namespace, label)


def take_down(
    cluster: Cluster,
    service: Ref,
    refs: list[Ref],
    timeout_s: float,
    *,
    show: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Delete the RayService, wait until its RayClusters and their pods are gone, then delete the
    rest: until then KubeRay needs Redis, its Secret and the rights. Pods may take their whole grace
    period. Raises ClusterError when the time is up, Unreachable, Refused."""
    deadline = clock() + timeout_s
    clusters: set[str] = set()
    _left(cluster, service, clusters)  # pods outlive their RayCluster: remember its name
    runs = [ref for ref in refs if ref.api_version == service.api_version]
    _delete(cluster, runs, warn)
    while left := _left(cluster, service, clusters):
        if clock() >= deadline:
            raise ClusterError(
                f"still there after {timeout_s:.0f} s: {'; '.join(left)}; "
                "the KubeRay operator must run for its finalizers to be removed; "
                "then `shoal k8s down` again deletes the rest"
            )
        show(f"waiting for {len(left)} to go: {left[0]}")
        sleep(PERIOD_S)
    _delete(cluster, [ref for ref in refs if ref not in runs], warn)


def _delete(cluster: Cluster, refs: list[Ref], warn: Callable[[str], None]) -> None:
    for ref in refs:
        try:
            cluster.delete(ref)
        except Forbidden:
            warn(f"{ref}: you may not delete it; it is left in place")


def _left(cluster: Cluster, service: Ref, clusters: set[str]) -> list[str]:
    """What is still there. Adds the names of the RayClusters to `clusters`."""
    found = cluster.get(service)
    live = live_clusters(cluster, service)
    clusters.update(each["metadata"]["name"] for each in live)
    pods = cluster.select("v1", "Pod", service.namespace, "ray.io/is-ray-node=yes")
    mine = [pod for pod in pods if pod["metadata"]["labels"].get("ray.io/cluster") in clusters]
    return [_described(each) for each in [*([found] if found else []), *live, *mine]]


def _described(manifest: Manifest) -> str:
    finalizers = manifest["metadata"].get("finalizers") or []
    held = f" (held by {', '.join(finalizers)})" if finalizers else ""
    return f"{identity(manifest)}{held}"
