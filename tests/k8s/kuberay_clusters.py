"""Which RayCluster a RayService should have, and when it is a new one: pure functions."""

from __future__ import annotations

import hashlib
import json

from tests.k8s import kuberay_pods
from tests.k8s.api_server.errors import Json
from tests.k8s.kuberay_pods import SERVICE_LABEL
from tests.k8s.kuberay_rules import cluster_config

HASH = "ray.io/hash-without-replicas-and-workers-to-delete"
NUM_GROUPS = "ray.io/num-worker-groups"
SCALED = ("replicas", "minReplicas", "maxReplicas", "scaleStrategy")
"""Of a worker group: changes that make no new cluster, and that a live cluster never gets."""


def matching(service: Json, clusters: list[Json]) -> Json | None:
    """The cluster that is as the service wants it."""
    wanted = config_hash(cluster_config(service))
    return next((c for c in clusters if c["metadata"]["annotations"][HASH] == wanted), None)


def extended(service: Json, clusters: list[Json]) -> Json | None:
    """A live cluster with the worker groups that the service has more at the end of its list."""
    config = cluster_config(service)
    for cluster in clusters:
        annotations = cluster["metadata"]["annotations"]
        if config_hash(config, int(annotations[NUM_GROUPS])) == annotations[HASH]:
            groups = cluster["spec"].get("workerGroupSpecs") or []
            groups = groups + config["workerGroupSpecs"][len(groups) :]
            spec = {**cluster["spec"], "workerGroupSpecs": groups}
            metadata = {**cluster["metadata"], "annotations": _annotations(config)}
            return {**cluster, "metadata": metadata, "spec": spec}
    return None


def new(service: Json) -> Json:
    config = cluster_config(service)
    name = service["metadata"]["name"]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": f"{name}-{config_hash(config)[:5]}",
            "namespace": service["metadata"]["namespace"],
            "labels": {SERVICE_LABEL: name, "ray.io/originated-from-crd": "RayService"},
            "annotations": _annotations(config),
            "ownerReferences": kuberay_pods.owned_by(service),
        },
        "spec": config,
    }


def config_hash(config: Json, num_groups: int | None = None) -> str:
    """Of what makes a new cluster when it changes, with the first `num_groups` worker groups."""
    groups = (config.get("workerGroupSpecs") or [])[:num_groups]
    kept = [{k: v for k, v in group.items() if k not in SCALED} for group in groups]
    rest = {k: v for k, v in config.items() if k not in ("workerGroupSpecs", "suspend")}
    text = json.dumps({**rest, "workerGroupSpecs": kept}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _annotations(config: Json) -> dict[str, str]:
    num_groups = len(config.get("workerGroupSpecs") or ())
    return {HASH: config_hash(config), NUM_GROUPS: str(num_groups)}
