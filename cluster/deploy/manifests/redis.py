"""A Redis that keeps the state of Ray's head, so that workers live on while it restarts."""

from __future__ import annotations

from typing import Any

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest
from cluster.deploy.manifests.names import (
    MANAGED_BY_US,
    REDIS_KEY,
    labels,
    manifest,
    priority_class,
    redis,
    selector,
    worker_account,
)

PORT = 6379
USER_ID = 999
"""Of the official image."""
PASSWORD_VARIABLES = ("REDIS_PASSWORD", "REDISCLI_AUTH")
RESOURCES = {"cpu": "500m", "memory": "1Gi"}


def objects(config: DeployConfig) -> list[Manifest]:
    """One Redis with a disk of its own: it is down for seconds when its node is drained."""
    name = redis(config)
    ports = [{"name": "redis", "port": PORT, "targetPort": PORT}]
    spec = {"selector": labels(config, "redis"), "ports": ports}
    return [
        manifest("v1", "Service", config, name, spec=spec),
        manifest("apps/v1", "StatefulSet", config, name, spec=_stateful_set(config)),
    ]


def gcs_options(config: DeployConfig) -> dict[str, Any]:
    """For rayClusterConfig. The password goes here only: KubeRay refuses it in two places."""
    password = {"valueFrom": {"secretKeyRef": _password(config)}}
    return {"redisAddress": f"{redis(config)}:{PORT}", "redisPassword": password}


def _password(config: DeployConfig) -> dict[str, str]:
    return {"name": redis(config), "key": REDIS_KEY}


def _stateful_set(config: DeployConfig) -> dict[str, Any]:
    pod_labels = labels(config, "redis")
    return {
        "replicas": 1,
        "serviceName": redis(config),
        "selector": selector(pod_labels),
        "template": {"metadata": {"labels": pod_labels}, "spec": _pod(config)},
        "volumeClaimTemplates": [_claim(config)],
    }


def _pod(config: DeployConfig) -> dict[str, Any]:
    return {
        "serviceAccountName": worker_account(config),
        "automountServiceAccountToken": False,
        "priorityClassName": priority_class(config, "control"),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(config)],
    }


def _container(config: DeployConfig) -> dict[str, Any]:
    alive = {"exec": {"command": ["redis-cli", "ping"]}, "periodSeconds": 5, "timeoutSeconds": 3}
    reference = {"secretKeyRef": _password(config)}
    return {
        "name": "redis",
        "image": config.gcs_redis.image,
        "args": ["--appendonly", "yes", "--requirepass", "$(REDIS_PASSWORD)"],
        "env": [{"name": name, "valueFrom": reference} for name in PASSWORD_VARIABLES],
        "ports": [{"name": "redis", "containerPort": PORT}],
        "readinessProbe": alive,
        "livenessProbe": alive | {"initialDelaySeconds": 30, "failureThreshold": 6},
        "resources": {"requests": RESOURCES, "limits": RESOURCES},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }


def _claim(config: DeployConfig) -> dict[str, Any]:
    wanted = config.gcs_redis
    spec: dict[str, Any] = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": f"{wanted.size_gib}Gi"}},
    }
    if wanted.storage_class is not None:
        spec["storageClassName"] = wanted.storage_class
    # By these `shoal k8s down --delete-data` finds the claim, which outlives the StatefulSet.
    found_by = labels(config, "redis") | MANAGED_BY_US
    return {"metadata": {"name": "data", "labels": found_by}, "spec": spec}
