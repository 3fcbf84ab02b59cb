"""The RayService: the application, and the Ray cluster that it runs on."""

from __future__ import annotations

from typing import Any

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest, dump_one
from cluster.deploy.manifests import redis
from cluster.deploy.manifests.names import (
    TIER_LABEL,
    TIERS,
    Tier,
    labels,
    manifest,
    serve_service,
    serving_ports,
    token_secret,
)
from cluster.deploy.manifests.pods import CONTAINER_SECURITY, head_template, worker_template
from cluster.deploy.manifests.serve_config import serve_config
from cluster.deploy.sections import INCREMENTAL, IngressGroup, Upgrade, WorkerGroup
from cluster.deploy.sizing import OBJECT_STORE_BYTES, Sizing

RAY_VERSION = "2.60.0"
"""Of the image; pyproject.toml pins it."""
AUTOSCALER_RESOURCES = {
    "requests": {"cpu": "200m", "memory": "1Gi"},
    "limits": {"cpu": "1", "memory": "1Gi"},
}
"""KubeRay's own 512Mi are too little for autoscaler v2."""
START_PARAMS = {"object-store-memory": str(OBJECT_STORE_BYTES)}
"""All values are strings: KubeRay makes flags of them."""


def rayservice(config: DeployConfig, sizing: Sizing) -> list[Manifest]:
    """One object; KubeRay makes cluster, pods and Services of it."""
    service = manifest(
        "ray.io/v1",
        "RayService",
        config,
        config.name,
        spec={
            "serveConfigV2": dump_one(serve_config(config, sizing)),
            "serveService": _service(config),
            "excludeHeadPodFromServeSvc": True,
            "upgradeStrategy": _upgrade(config.upgrade),
            "rayClusterDeletionDelaySeconds": config.upgrade.old_cluster_kept_s,
            "rayClusterConfig": _cluster(config, sizing),
        },
    )
    timeout = {"ray.io/initializing-timeout": f"{config.times.initializing_s}s"}
    service["metadata"]["annotations"] = timeout
    return [service]


def _service(config: DeployConfig) -> dict[str, Any]:
    """KubeRay adds the selector. Gateways speak HTTP/2 to a port only if it is told here."""
    ports = [
        {"name": name, "port": port, "targetPort": port}
        for name, port in serving_ports(config).items()
    ]
    for port in ports:
        if port["name"] == "serve-grpc":
            port["appProtocol"] = "kubernetes.io/h2c"
    metadata = {"name": serve_service(config), "labels": labels(config)}
    return {"metadata": metadata, "spec": {"type": "ClusterIP", "ports": ports}}


def _upgrade(upgrade: Upgrade) -> dict[str, Any]:
    if upgrade.strategy != INCREMENTAL:
        return {"type": upgrade.strategy}
    options = {
        "gatewayClassName": upgrade.gateway_class,
        "stepSizePercent": upgrade.step_size_percent,
        "maxSurgePercent": upgrade.max_surge_percent,
        "intervalSeconds": upgrade.interval_s,
    }
    return {"type": upgrade.strategy, "clusterUpgradeOptions": options}


def _cluster(config: DeployConfig, sizing: Sizing) -> dict[str, Any]:
    memory = {
        "ingress": sizing.ingress_memory_bytes,
        "attention": sizing.attention_memory_bytes,
        "experts": sizing.experts_memory_bytes,
    }
    cluster: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",  # KubeRay takes it as v1 unless it is written
            "upscalingMode": "Default",
            "idleTimeoutSeconds": config.times.idle_pod_s,
            "imagePullPolicy": config.image_pull_policy,
            "resources": AUTOSCALER_RESOURCES,
            "securityContext": CONTAINER_SECURITY,
        },
        "authOptions": {"mode": "token", "secretName": token_secret(config)},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0", **START_PARAMS},
            "template": head_template(config),
        },
        "workerGroupSpecs": [_group(config, tier, memory[tier]) for tier in TIERS],
    }
    if config.gcs_redis.enabled:
        cluster["gcsFaultToleranceOptions"] = redis.gcs_options(config)
    return cluster


def _group(config: DeployConfig, tier: Tier, memory_bytes: int) -> dict[str, Any]:
    """Ray's autoscaler owns the number of pods between the bounds."""
    pod: IngressGroup | WorkerGroup = getattr(config, tier)
    return {
        "groupName": tier,
        "replicas": pod.pods,
        "minReplicas": pod.pods,
        "maxReplicas": pod.most_pods if isinstance(pod, WorkerGroup) else pod.pods,
        "idleTimeoutSeconds": config.times.idle_pod_s,
        "labels": {TIER_LABEL: tier},
        "rayStartParams": dict(START_PARAMS),
        "template": worker_template(config, tier, pod, memory_bytes),
    }
