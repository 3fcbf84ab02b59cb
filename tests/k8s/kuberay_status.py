"""What the operator writes into the status of a RayService and a RayCluster: pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from tests.k8s.api_server.errors import Json
from tests.k8s.kuberay_kubelet import STARTED, PodFault
from tests.k8s.kuberay_pods import HEAD_GROUP

HEALTH = {"RUNNING": "HEALTHY", "DEPLOY_FAILED": "DEPLOY_FAILED"}
"""Status of the deployments by that of their application; else they are UPDATING."""


@dataclass(frozen=True)
class Faults:
    """What goes wrong; nothing by default."""

    pods: Mapping[str, PodFault] = field(default_factory=dict)
    """By worker group (`headgroup` is the head's): a function of kuberay_kubelet."""
    application: str = "RUNNING"
    """Status of every application, as `DEPLOYING` (a slow start) or `DEPLOY_FAILED`."""
    application_message: str = ""
    rejected: str = ""
    """Text in serveConfigV2 with which every application fails."""
    is_initializing_timeout: bool = False
    """The time of annotation ray.io/initializing-timeout has run out."""


def status_of(obj: Json) -> Json:
    status: Json = obj.get("status") or {}
    return status


def active_name(service: Json) -> str | None:
    """Of the cluster that serves."""
    active = status_of(service).get("activeServiceStatus") or {}
    name: str | None = active.get("rayClusterName")
    return name


def all_running(applications: Mapping[str, Json]) -> bool:
    return bool(applications) and all(a["status"] == "RUNNING" for a in applications.values())


def pretended_applications(config: Json, faults: Faults) -> Mapping[str, Json]:
    """As Ray would report them; they do not run while pods are missing."""
    status = faults.application
    if faults.rejected and faults.rejected in str(config):
        status = "DEPLOY_FAILED"
    if faults.pods and status == "RUNNING":
        status = "DEPLOYING"
    if HEAD_GROUP in faults.pods:
        return {}
    return {
        application["name"]: {
            "status": status,
            "message": faults.application_message,
            "serveDeploymentStatuses": {
                deployment["name"]: {"status": HEALTH.get(status, "UPDATING")}
                for deployment in application.get("deployments") or ()
            },
        }
        for application in config.get("applications") or ()
    }


def serve_config(service: Json) -> Json:
    config: Json = yaml.safe_load(service["spec"].get("serveConfigV2") or "{}")
    return config


def refused(service: Json, text: str) -> Json:
    """Of a service that breaks a rule."""
    conditions = [condition("Ready", "False", "ValidationFailed", text)]
    return {**status_of(service), "conditions": conditions}


def service_status(
    service: Json,
    cluster_name: str,
    applications: Mapping[str, Json],
    num_endpoints: int,
    faults: Faults,
) -> Json:
    """`cluster_name`: of the newest cluster, which serves once all applications run on it."""
    described = {"rayClusterName": cluster_name, "applicationStatuses": dict(applications)}
    status = {k: v for k, v in status_of(service).items() if k != "pendingServiceStatus"}
    if all_running(applications) or cluster_name == active_name(service):
        status["activeServiceStatus"] = described
        status["numServeEndpoints"] = num_endpoints
        status["serviceStatus"] = "Running"
    else:
        status["pendingServiceStatus"] = described
    status["conditions"] = [_ready(status, faults), _upgrade(status)]
    return status


def _ready(status: Json, faults: Faults) -> Json:
    if "activeServiceStatus" in status:
        return condition("Ready", "True", "NonZeroServeEndpoints")
    if faults.is_initializing_timeout:
        text = "not ready within the time of ray.io/initializing-timeout"
        return condition("Ready", "False", "InitializingTimeout", text)
    return condition("Ready", "False", "Initializing")


def _upgrade(status: Json) -> Json:
    if "activeServiceStatus" not in status:
        return condition("UpgradeInProgress", "False", "NoActiveCluster")
    if "pendingServiceStatus" in status:
        return condition("UpgradeInProgress", "True", "BothActivePendingClustersExist")
    return condition("UpgradeInProgress", "False", "NoPendingCluster")


def cluster_status(cluster: Json, num_workers: int, is_provisioned: bool) -> Json:
    groups = cluster["spec"].get("workerGroupSpecs") or ()
    reason = "AllPodRunningAndReadyFirstTime" if is_provisioned else "RayClusterPodsProvisioning"
    return {
        "observedGeneration": cluster["metadata"]["generation"],
        "desiredWorkerReplicas": num_workers,
        "readyWorkerReplicas": num_workers if is_provisioned else 0,
        "minWorkerReplicas": sum(group.get("minReplicas") or 0 for group in groups),
        "maxWorkerReplicas": sum(group.get("maxReplicas") or 0 for group in groups),
        "conditions": [condition("RayClusterProvisioned", str(is_provisioned), reason)],
        **({"state": "ready"} if is_provisioned else {}),
    }


def failed_cluster_status(text: str) -> Json:
    """Of a cluster with a pod that the API server refuses."""
    failure = condition("ReplicaFailure", "True", "FailedCreateWorkerPod", text)
    return {"conditions": [failure], "reason": text, "state": "failed"}


def refused_pod_event(cluster: Json, text: str) -> Json:
    name, namespace = cluster["metadata"]["name"], cluster["metadata"]["namespace"]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{name}-refused-pod", "namespace": namespace},
        "involvedObject": {"kind": "RayCluster", "name": name, "namespace": namespace},
        "type": "Warning",
        "reason": "FailedToCreateWorkerPod",
        "message": text,
        "firstTimestamp": STARTED,
        "lastTimestamp": STARTED,
        "source": {"component": "kuberay-operator"},
    }


def condition(kind: str, status: str, reason: str, message: str = "") -> Json:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": STARTED,
    }
