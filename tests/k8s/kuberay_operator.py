"""One step of the operator's work: from what the API server has to what it should have."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.k8s import kuberay_clusters, kuberay_kubelet, kuberay_pods, kuberay_status
from tests.k8s.api_server.client import Client
from tests.k8s.api_server.errors import ApiError, Json
from tests.k8s.api_server.patches import JSON
from tests.k8s.kuberay_pods import HEAD_GROUP, SERVICE_LABEL
from tests.k8s.kuberay_rules import refusal
from tests.k8s.kuberay_status import Faults, active_name, all_running, status_of

ServeBackend = Callable[[Json], Mapping[str, Json]]
"""Hands a Serve configuration to Ray; returns the status of each application by name."""


class Operator:
    """`reconcile` until it is settled, and again after each change."""

    def __init__(self, client: Client, namespace: str, serve: ServeBackend | None) -> None:
        self._client = client
        self._namespace = namespace
        self._serve = serve
        self._submitted: dict[str, Json] = {}
        """What Ray was given last, by RayCluster."""

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
            self._set_status(service, kuberay_status.refused(service, text))
            return True
        clusters = self._clusters_of(service)
        goal = self._goal(service, clusters)
        applications = self._applications(service, goal, faults)
        is_running = all_running(applications)
        self._reconcile_cluster(goal, faults, is_running)
        self._reconcile_others(service, goal, clusters, is_running)
        if is_running:
            for make in (kuberay_pods.serve_service, kuberay_pods.head_service):
                self._client.apply(make(service, goal), force=True)
        name = goal["metadata"]["name"]
        status = kuberay_status.service_status(
            service, name, applications, self._num_endpoints(name), faults
        )
        self._set_status(service, status)
        return is_running or self._serve is None

    def _goal(self, service: Json, clusters: list[Json]) -> Json:
        """The cluster that the service should have; made if there is none."""
        if found := kuberay_clusters.matching(service, clusters):
            return found
        active = next((c for c in clusters if c["metadata"]["name"] == active_name(service)), None)
        strategy = service["spec"].get("upgradeStrategy") or {}
        if active and strategy.get("type") == "None":
            return active
        if larger := kuberay_clusters.extended(service, clusters):
            return self._client.replace(larger)
        return self._client.create(kuberay_clusters.new(service))

    def _reconcile_others(
        self, service: Json, goal: Json, clusters: list[Json], is_running: bool
    ) -> None:
        """The cluster that serves stays until the new one runs; what is neither goes."""
        for cluster in clusters:
            name = cluster["metadata"]["name"]
            if name == goal["metadata"]["name"]:
                continue
            if name == active_name(service) and not is_running:
                self._reconcile_cluster(cluster, Faults(), is_running=True)
            else:
                self._delete("RayCluster", name)

    def _applications(self, service: Json, goal: Json, faults: Faults) -> Mapping[str, Json]:
        """As KubeRay does it: read what became of the last configuration, then submit a new one. So
        the first status of a changed service is the old one."""
        name, config = goal["metadata"]["name"], kuberay_status.serve_config(service)
        last = self._submitted.get(name)
        applications = {} if last is None else self._read(last, faults)
        if config != last:
            self._submitted[name] = config
            self._read(config, faults)
        return applications

    def _read(self, config: Json, faults: Faults) -> Mapping[str, Json]:
        """A real Ray takes the configuration as well, if it is a new one."""
        if self._serve:
            return self._serve(config)
        return kuberay_status.pretended_applications(config, faults)

    def _reconcile_cluster(self, cluster: Json, faults: Faults, is_running: bool) -> None:
        name = cluster["metadata"]["name"]
        wanted = {pod["metadata"]["name"]: pod for pod in kuberay_pods.pods(cluster)}
        present: dict[str, Json] = {}
        for pod in self._client.select("Pod", self._namespace, f"ray.io/cluster={name}"):
            pod_name = pod["metadata"]["name"]
            if pod_name in wanted and status_of(pod).get("phase") != "Failed":
                present[pod_name] = pod
            else:
                self._delete("Pod", pod_name)
        try:
            for missing in [n for n in wanted if n not in present]:
                present[missing] = self._client.create(wanted[missing])
        except ApiError as error:
            if error.code in (404, 409):
                raise
            self._set_status(cluster, kuberay_status.failed_cluster_status(error.message))
            event = kuberay_status.refused_pod_event(cluster, error.message)
            self._client.apply(event, force=True)
            return
        for pod_name in wanted:
            self._run_pod(present[pod_name], faults, is_running)
        is_provisioned = is_running and not faults.pods
        status = kuberay_status.cluster_status(cluster, len(wanted) - 1, is_provisioned)
        self._set_status(cluster, status)

    def _run_pod(self, pod: Json, faults: Faults, is_running: bool) -> None:
        """The kubelet's part. A worker is ready once Serve's proxy runs on it."""
        group = _group_of(pod)
        if fault := faults.pods.get(group):
            status = fault(pod)
        else:
            status = kuberay_kubelet.running(pod, is_running or group == HEAD_GROUP)
        self._set_status(pod, status)

    def _num_endpoints(self, cluster_name: str) -> int:
        labels = f"ray.io/cluster={cluster_name},ray.io/serve=true"
        return len(self._client.select("Pod", self._namespace, labels))

    def _clusters_of(self, service: Json) -> list[Json]:
        labels = f"{SERVICE_LABEL}={service['metadata']['name']}"
        return self._client.select("RayCluster", self._namespace, labels)

    def _set_status(self, obj: Json, status: Json) -> None:
        if obj["kind"] == "RayService":
            status = {**status, "observedGeneration": obj["metadata"]["generation"]}
        if status_of(obj) == status:
            return
        patch = [{"op": "add", "path": "/status", "value": status}]
        name = obj["metadata"]["name"]
        self._client.patch(obj["kind"], name, self._namespace, patch, JSON, "status")

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


def _group_of(pod: Json) -> str:
    group: str = pod["metadata"]["labels"]["ray.io/group"]
    return group
