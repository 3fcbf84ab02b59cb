"""One step of the operator's work: from what the API server has to what it should have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import yaml

from tests.k8s import kuberay_kubelet, kuberay_pods
from tests.k8s.api_server.client import Client
from tests.k8s.api_server.errors import ApiError, Json
from tests.k8s.api_server.patches import JSON
from tests.k8s.kuberay_kubelet import STARTED, PodFault
from tests.k8s.kuberay_pods import HEAD_GROUP, SERVICE_LABEL
from tests.k8s.kuberay_rules import cluster_config, refusal

HASH = "ray.io/hash-without-replicas-and-workers-to-delete"
NUM_GROUPS = "ray.io/num-worker-groups"
SCALED = ("replicas", "minReplicas", "maxReplicas", "scaleStrategy")
"""Of a worker group: changes that make no new cluster, and that a live cluster never gets."""

ServeBackend = Callable[[Json], Mapping[str, Json]]
"""Hands a Serve configuration to Ray; returns the status of each application by name."""


@dataclass(frozen=True)
class Faults:
    """What goes wrong; nothing by default."""

    pods: Mapping[str, PodFault] = field(default_factory=dict)
    """By worker group (`headgroup` is the head's): a function of kuberay_kubelet."""
    application: str = "RUNNING"
    """Status of every application, as `DEPLOYING` (a slow start) or `DEPLOY_FAILED`."""
    application_message: str = ""
    is_initializing_timeout: bool = False
    """The time of annotation ray.io/initializing-timeout has run out."""


class Operator:
    """`reconcile` until it is settled, and again after each change."""

    def __init__(self, client: Client, namespace: str, serve: ServeBackend | None) -> None:
        self._client = client
        self._namespace = namespace
        self._serve = serve

    def reconcile(self, faults: Faults) -> bool:
        """Whether nothing is left to do before the next event.

        Raises:
            ApiError: 404 or 409 if an object changed meanwhile.
        """
        services = self._client.select("RayService", self._namespace)
        self._collect_garbage(services)
        return all([self._reconcile_service(service, faults) for service in services])

    def _reconcile_service(self, service: Json, faults: Faults) -> bool:
        if text := refusal(service):
            invalid = _condition("Ready", "False", "ValidationFailed", text)
            self._set_status(service, {**_status(service), "conditions": [invalid]})
            return True
        active = _active_name(service)
        clusters = self._clusters_of(service)
        goal = self._goal(service, active, clusters)
        applications = self._applications(service, faults)
        is_running = _all_running(applications)
        self._reconcile_cluster(goal, faults, is_running)
        for cluster in clusters:
            name = cluster["metadata"]["name"]
            if name == active != goal["metadata"]["name"] and not is_running:
                self._reconcile_cluster(cluster, Faults(), is_running=True)
            elif name != goal["metadata"]["name"]:
                self._delete("RayCluster", name)
        if is_running:
            self._expose(service, goal)
        self._report(service, goal, applications, faults)
        return is_running or self._serve is None

    def _goal(self, service: Json, active: str | None, clusters: list[Json]) -> Json:
        """The cluster that the service should have; made if there is none."""
        config = cluster_config(service)
        wanted = config_hash(config)
        for cluster in clusters:
            if cluster["metadata"]["annotations"][HASH] == wanted:
                return cluster
        current = next((c for c in clusters if c["metadata"]["name"] == active), None)
        strategy = service["spec"].get("upgradeStrategy") or {}
        if current and strategy.get("type") == "None":
            return current
        for cluster in clusters:
            known = int(cluster["metadata"]["annotations"][NUM_GROUPS])
            if config_hash(config, known) == cluster["metadata"]["annotations"][HASH]:
                return self._with_new_groups(cluster, config)
        return self._client.create(_cluster(service, wanted))

    def _with_new_groups(self, cluster: Json, config: Json) -> Json:
        """Worker groups at the end of the list are added to a live cluster."""
        groups = cluster["spec"].get("workerGroupSpecs") or []
        added = config["workerGroupSpecs"][len(groups) :]
        spec = {**cluster["spec"], "workerGroupSpecs": [*groups, *added]}
        metadata = {**cluster["metadata"], "annotations": _annotations(config)}
        return self._client.replace({**cluster, "metadata": metadata, "spec": spec})

    def _applications(self, service: Json, faults: Faults) -> Mapping[str, Json]:
        """The status of each application; none before the head runs."""
        if HEAD_GROUP in faults.pods:
            return {}
        config = yaml.safe_load(service["spec"].get("serveConfigV2") or "{}")
        if self._serve:
            return self._serve(config)
        status = faults.application
        if faults.pods and status == "RUNNING":
            status = "DEPLOYING"
        health = {"RUNNING": "HEALTHY", "DEPLOY_FAILED": "DEPLOY_FAILED"}.get(status, "UPDATING")
        return {
            application["name"]: {
                "status": status,
                "message": faults.application_message,
                "serveDeploymentStatuses": {
                    deployment["name"]: {"status": health}
                    for deployment in application.get("deployments") or ()
                },
            }
            for application in config.get("applications") or ()
        }

    def _reconcile_cluster(self, cluster: Json, faults: Faults, is_running: bool) -> None:
        name = cluster["metadata"]["name"]
        wanted = {pod["metadata"]["name"]: pod for pod in kuberay_pods.pods(cluster)}
        found = self._client.select("Pod", self._namespace, f"ray.io/cluster={name}")
        present = {pod["metadata"]["name"]: pod for pod in found}
        for surplus in present.keys() - wanted.keys():
            self._delete("Pod", surplus)
        try:
            for missing in [n for n in wanted if n not in present]:
                present[missing] = self._client.create(wanted[missing])
        except ApiError as error:
            if error.code in (404, 409):
                raise
            self._report_refused_pod(cluster, error)
            return
        pods = [present[n] for n in wanted]
        for pod in pods:
            self._run_pod(pod, faults, is_running)
        self._report_cluster(cluster, len(pods) - 1, faults, is_running)

    def _run_pod(self, pod: Json, faults: Faults, is_running: bool) -> None:
        """The kubelet's part. A worker is ready once Serve's proxy runs on it."""
        group = pod["metadata"]["labels"]["ray.io/group"]
        if fault := faults.pods.get(group):
            status = fault(pod)
        else:
            status = kuberay_kubelet.running(pod, is_running or group == HEAD_GROUP)
        self._set_status(pod, status)

    def _expose(self, service: Json, cluster: Json) -> None:
        for make in (kuberay_pods.serve_service, kuberay_pods.head_service):
            self._client.apply(make(service, cluster), force=True)

    def _report(
        self, service: Json, goal: Json, applications: Mapping[str, Json], faults: Faults
    ) -> None:
        """The status of the service after this step."""
        name = goal["metadata"]["name"]
        described = {"rayClusterName": name, "applicationStatuses": dict(applications)}
        before = _status(service)
        status = {k: v for k, v in before.items() if k != "pendingServiceStatus"}
        if _all_running(applications) or name == _active_name(service):
            status["activeServiceStatus"] = described
            workers = self._client.select(
                "Pod", self._namespace, f"ray.io/cluster={name},ray.io/serve=true"
            )
            status["numServeEndpoints"] = len(workers)
            status["serviceStatus"] = "Running"
        else:
            status["pendingServiceStatus"] = described
        status["conditions"] = _conditions(status, faults)
        self._set_status(service, status)

    def _report_cluster(
        self, cluster: Json, num_workers: int, faults: Faults, is_running: bool
    ) -> None:
        groups = cluster["spec"].get("workerGroupSpecs") or ()
        is_provisioned = not faults.pods and is_running
        provisioned = _condition(
            "RayClusterProvisioned",
            str(is_provisioned),
            "AllPodRunningAndReadyFirstTime" if is_provisioned else "RayClusterPodsProvisioning",
        )
        status = {
            "observedGeneration": cluster["metadata"]["generation"],
            "desiredWorkerReplicas": num_workers,
            "readyWorkerReplicas": num_workers if is_provisioned else 0,
            "minWorkerReplicas": sum(group.get("minReplicas") or 0 for group in groups),
            "maxWorkerReplicas": sum(group.get("maxReplicas") or 0 for group in groups),
            "conditions": [provisioned],
            **({"state": "ready"} if is_provisioned else {}),
        }
        self._set_status(cluster, status)

    def _report_refused_pod(self, cluster: Json, error: ApiError) -> None:
        """A pod that the API server does not take, in the cluster's status and as an Event."""
        reason, name = "FailedCreateWorkerPod", cluster["metadata"]["name"]
        failure = _condition("ReplicaFailure", "True", reason, error.message)
        status = {"conditions": [failure], "reason": error.message, "state": "failed"}
        self._set_status(cluster, status)
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{name}-refused-pod", "namespace": self._namespace},
            "involvedObject": {"kind": "RayCluster", "name": name, "namespace": self._namespace},
            "type": "Warning",
            "reason": "FailedToCreateWorkerPod",
            "message": error.message,
            "firstTimestamp": STARTED,
            "lastTimestamp": STARTED,
            "source": {"component": "kuberay-operator"},
        }
        self._client.apply(event, force=True)

    def _set_status(self, obj: Json, status: Json) -> None:
        if obj["kind"] == "RayService":
            status = {**status, "observedGeneration": obj["metadata"]["generation"]}
        if _status(obj) == status:
            return
        patch = [{"op": "add", "path": "/status", "value": status}]
        name = obj["metadata"]["name"]
        self._client.patch(obj["kind"], name, self._namespace, patch, JSON, "status")

    def _clusters_of(self, service: Json) -> list[Json]:
        labels = f"{SERVICE_LABEL}={service['metadata']['name']}"
        return self._client.select("RayCluster", self._namespace, labels)

    def _collect_garbage(self, services: list[Json]) -> None:
        """What a server without garbage collector leaves of deleted services and clusters."""
        self._delete_orphans("RayCluster", services)
        self._delete_orphans("Service", services)
        self._delete_orphans("Pod", self._client.select("RayCluster", self._namespace))

    def _delete_orphans(self, kind: str, owners: list[Json]) -> None:
        uids = {owner["metadata"]["uid"] for owner in owners}
        for obj in self._client.select(kind, self._namespace):
            references = obj["metadata"].get("ownerReferences")
            if references and references[0]["uid"] not in uids:
                self._delete(kind, obj["metadata"]["name"])

    def _delete(self, kind: str, name: str) -> None:
        if self._client.find(kind, name, self._namespace):
            self._client.delete(kind, name, self._namespace, gracePeriodSeconds="0")


def config_hash(config: Json, num_groups: int | None = None) -> str:
    """Of what makes a new cluster when it changes, of the first `num_groups` worker groups."""
    groups = (config.get("workerGroupSpecs") or [])[:num_groups]
    kept = [{k: v for k, v in group.items() if k not in SCALED} for group in groups]
    rest = {k: v for k, v in config.items() if k not in ("workerGroupSpecs", "suspend")}
    text = json.dumps({**rest, "workerGroupSpecs": kept}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _cluster(service: Json, digest: str) -> Json:
    config = cluster_config(service)
    name = service["metadata"]["name"]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {
            "name": f"{name}-{digest[:5]}",
            "namespace": service["metadata"]["namespace"],
            "labels": {SERVICE_LABEL: name, "ray.io/originated-from-crd": "RayService"},
            "annotations": _annotations(config),
            "ownerReferences": kuberay_pods.owned_by(service),
        },
        "spec": config,
    }


def _annotations(config: Json) -> dict[str, str]:
    num_groups = len(config.get("workerGroupSpecs") or ())
    return {HASH: config_hash(config), NUM_GROUPS: str(num_groups)}


def _status(obj: Json) -> Json:
    status: Json = obj.get("status") or {}
    return status


def _active_name(service: Json) -> str | None:
    active = _status(service).get("activeServiceStatus") or {}
    name: str | None = active.get("rayClusterName")
    return name


def _all_running(applications: Mapping[str, Json]) -> bool:
    return bool(applications) and all(a["status"] == "RUNNING" for a in applications.values())


def _conditions(status: Json, faults: Faults) -> list[Json]:
    has_active = "activeServiceStatus" in status
    has_pending = "pendingServiceStatus" in status
    if has_active:
        ready = _condition("Ready", "True", "NonZeroServeEndpoints")
    elif faults.is_initializing_timeout:
        text = "not ready within the time of ray.io/initializing-timeout"
        ready = _condition("Ready", "False", "InitializingTimeout", text)
    else:
        ready = _condition("Ready", "False", "Initializing")
    if has_active and has_pending:
        upgrade = _condition("UpgradeInProgress", "True", "BothActivePendingClustersExist")
    else:
        reason = "NoPendingCluster" if has_active else "NoActiveCluster"
        upgrade = _condition("UpgradeInProgress", "False", reason)
    return [ready, upgrade]


def _condition(kind: str, status: str, reason: str, message: str = "") -> Json:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": STARTED,
    }
