"""The stand-in does what KubeRay does: what the deploy commands are tested against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.k8s import kuberay_kubelet
from tests.k8s.api_server.client import Client
from tests.k8s.api_server.errors import Json
from tests.k8s.kuberay import KubeRay
from tests.k8s.kuberay_samples import container, ray_service, worker_group
from tests.k8s.kuberay_status import Faults

pytestmark = pytest.mark.k8s
Start = Callable[..., KubeRay]


class Namespace:
    """What a test looks at; `wait` reads the RayService's events until one fits."""

    def __init__(self, client: Client, name: str) -> None:
        self.client = client
        self.name = name

    def wait(self, fits: Callable[[Json], object], kind: str = "RayService") -> Any:
        listing = self.client.listing(kind, self.name)
        found = [obj for obj in listing["items"] if fits(obj)]
        if found:
            return found[0]
        since = listing["metadata"]["resourceVersion"]
        for event in self.client.watch(kind, self.name, since, timeout_s=30):
            if fits(event["object"]):
                return event["object"]
        pytest.fail(f"no such {kind}; there are {self.client.select(kind, self.name)}")

    def wait_gone(self, kind: str) -> None:
        while (listing := self.client.listing(kind, self.name))["items"]:
            since = listing["metadata"]["resourceVersion"]
            watch = self.client.watch(kind, self.name, since, timeout_s=30)
            assert any(event["type"] == "DELETED" for event in watch), listing["items"]

    def ready(self) -> Any:
        return self.wait(lambda service: condition(service, "Ready").get("status") == "True")

    def refused(self) -> Json:
        """The Ready condition once it has a message."""
        return condition(self.wait(lambda s: bool(condition(s, "Ready").get("message"))), "Ready")

    def pods(self, labels: str = "") -> list[Json]:
        return self.client.select("Pod", self.name, labels)


def condition(obj: Json, kind: str) -> Json:
    conditions = (obj.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind), {})


def cluster_name(service: Json, which: str = "activeServiceStatus") -> str | None:
    return (service["status"].get(which) or {}).get("rayClusterName")


def pending_applications(service: Json) -> Json:
    pending = (service.get("status") or {}).get("pendingServiceStatus") or {}
    return dict(pending.get("applicationStatuses") or {})


@pytest.fixture
def place(admin: Client, namespace: str) -> Namespace:
    return Namespace(admin, namespace)


class TestDeployment:
    def test_becomes_ready(self, place: Namespace, kuberay: Start) -> None:
        kuberay()
        place.client.apply(ray_service(place.name))
        service = place.ready()
        assert service["status"]["numServeEndpoints"] == 3
        assert service["status"]["observedGeneration"] == service["metadata"]["generation"]
        assert condition(service, "UpgradeInProgress")["status"] == "False"

    def test_pods_are_as_kuberay_makes_them(self, place: Namespace, kuberay: Start) -> None:
        kuberay()
        place.client.apply(ray_service(place.name))
        place.ready()
        head, *workers = place.pods("ray.io/serve=false") + place.pods("ray.io/group=experts")
        assert [c["name"] for c in head["spec"]["containers"]] == ["ray-head", "autoscaler"]
        assert len(workers) == 2
        spec = workers[0]["spec"]
        assert spec["restartPolicy"] == "Never"
        assert spec["initContainers"][0]["name"] == "wait-gcs-ready"
        assert "8000/-/healthz" in str(spec["containers"][0]["readinessProbe"])
        assert {"name": "shared-mem", "mountPath": "/dev/shm"} in spec["containers"][0][
            "volumeMounts"
        ]

    def test_the_service_has_the_ports_of_both(self, place: Namespace, kuberay: Start) -> None:
        kuberay()
        grpc = {"name": "serve-grpc", "port": 9000, "appProtocol": "kubernetes.io/h2c"}
        own = {"spec": {"ports": [grpc]}}
        place.client.apply(ray_service(place.name, serveService=own))
        place.ready()
        found = place.client.get("Service", "shoal-serve-svc", place.name)["spec"]
        ports = {port["name"]: (port["port"], port.get("appProtocol")) for port in found["ports"]}
        assert ports == {"serve": (8000, None), "serve-grpc": (9000, "kubernetes.io/h2c")}
        assert found["selector"]["ray.io/serve"] == "true"

    def test_deleting_it_leaves_nothing(self, place: Namespace, kuberay: Start) -> None:
        kuberay()
        place.client.apply(ray_service(place.name))
        place.ready()
        place.client.delete("RayService", "shoal", place.name)
        for kind in ("RayCluster", "Pod", "Service"):
            place.wait_gone(kind)


class TestUpgrade:
    def test_the_old_cluster_serves_until_the_new_one_runs(
        self, place: Namespace, kuberay: Start
    ) -> None:
        operator = kuberay()
        service = ray_service(place.name)
        place.client.apply(service)
        old = cluster_name(place.ready())
        operator.set_faults(application="DEPLOYING")
        container(worker_group(service))["image"] = "shoal:2"
        place.client.apply(service)
        both = place.wait(lambda s: condition(s, "UpgradeInProgress")["status"] == "True")
        assert cluster_name(both) == old != cluster_name(both, "pendingServiceStatus")
        operator.set_faults(application="RUNNING")
        done = place.wait(lambda s: condition(s, "UpgradeInProgress")["status"] == "False")
        assert cluster_name(done) == cluster_name(both, "pendingServiceStatus")

    def test_type_none_changes_no_cluster(self, place: Namespace, kuberay: Start) -> None:
        kuberay()
        service = ray_service(place.name, upgradeStrategy={"type": "None"})
        place.client.apply(service)
        old = cluster_name(place.ready())
        container(worker_group(service))["image"] = "shoal:2"
        place.client.apply(service)
        seen = place.wait(lambda s: s["status"]["observedGeneration"] == 2)
        assert cluster_name(seen) == old

    def test_a_group_at_the_end_joins_the_running_cluster(
        self, place: Namespace, kuberay: Start
    ) -> None:
        kuberay()
        service = ray_service(place.name)
        place.client.apply(service)
        name = cluster_name(place.ready())
        groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        groups.append({**groups[0], "groupName": "ingress"})
        place.client.apply(service)
        place.wait(lambda pod: pod["metadata"]["name"] == f"{name}-ingress-worker-0", "Pod")

    def test_bounds_count_on_the_cluster_only(self, place: Namespace, kuberay: Start) -> None:
        """KubeRay passes a live service's minReplicas on to nobody."""
        kuberay()
        service = ray_service(place.name)
        place.client.apply(service)
        name = cluster_name(place.ready())
        worker_group(service, 1)["minReplicas"] = 3
        place.client.apply(service)
        place.wait(lambda s: s["status"]["observedGeneration"] == 2)
        assert len(place.pods("ray.io/group=experts")) == 2
        groups = place.client.get("RayCluster", name or "", place.name)["spec"]["workerGroupSpecs"]
        groups[1]["minReplicas"] = 3
        body = {"spec": {"workerGroupSpecs": groups}}
        place.client.patch("RayCluster", name or "", place.name, body)
        place.wait(lambda pod: pod["metadata"]["name"].endswith("experts-worker-2"), "Pod")


def without_serve_ports(service: Json) -> None:
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    container(head).pop("ports")


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda s: worker_group(s).update(minReplicas=9), "greater than maxReplicas"),
            (
                lambda s: (
                    s["spec"]["rayClusterConfig"].pop("autoscalerOptions"),
                    worker_group(s).update(idleTimeoutSeconds=600),
                ),
                "autoscaler v2 is not enabled",
            ),
            (
                lambda s: s["spec"]["rayClusterConfig"].update(
                    authOptions={"mode": "token"}, rayVersion="2.50.0"
                ),
                "needs Ray 2.52",
            ),
            (
                lambda s: worker_group(s).update(
                    resources={"GPU": "8"}, rayStartParams={"num-gpus": "8"}
                ),
                "both rayStartParams and resources",
            ),
            (
                lambda s: s["spec"].update(
                    upgradeStrategy={"type": "NewClusterWithIncrementalUpgrade"}
                ),
                "needs clusterUpgradeOptions",
            ),
            (without_serve_ports, "no port named 'serve'"),
            (lambda s: s["metadata"].update(name="a" * 48), "more than 47 characters"),
        ],
        ids=["bounds", "idle", "token", "resources", "incremental", "ports", "name"],
    )
    def test_rules(
        self, place: Namespace, kuberay: Start, change: Callable[[Json], Any], says: str
    ) -> None:
        kuberay()
        service = ray_service(place.name)
        change(service)
        place.client.apply(service)
        refused = place.refused()
        assert refused["reason"] == "ValidationFailed"
        assert says in refused["message"]

    def test_a_pod_that_the_server_refuses(self, place: Namespace, kuberay: Start) -> None:
        kuberay()
        service = ray_service(place.name)
        container(worker_group(service))["ports"][0]["name"] = "a-very-long-port-name"
        place.client.apply(service)
        cluster = place.wait(lambda c: bool(condition(c, "ReplicaFailure")), "RayCluster")
        assert "no more than 15 characters" in condition(cluster, "ReplicaFailure")["message"]
        event = place.wait(lambda e: e["reason"] == "FailedToCreateWorkerPod", "Event")
        assert "no more than 15 characters" in event["message"]


class TestFaults:
    def test_a_failed_pod_is_replaced_for_ever(self, place: Namespace, kuberay: Start) -> None:
        kuberay(faults=Faults(pods={"experts": kuberay_kubelet.crashing}))
        place.client.apply(ray_service(place.name))
        uids = set[str]()
        for event in place.client.watch("Pod", place.name, "0", timeout_s=30):
            pod = event["object"]
            if (pod.get("status") or {}).get("phase") == "Failed":
                uids.add(pod["metadata"]["uid"])
            if len(uids) > 4:
                break
        assert len(uids) > 4

    @pytest.mark.parametrize(
        ("fault", "says"),
        [
            (kuberay_kubelet.unschedulable, "0/5 nodes are available"),
            (kuberay_kubelet.image_missing, "ImagePullBackOff"),
            (kuberay_kubelet.crashing, "OSError: no model"),
            (kuberay_kubelet.out_of_memory, "OOMKilled"),
        ],
    )
    def test_pods(
        self, place: Namespace, kuberay: Start, fault: kuberay_kubelet.PodFault, says: str
    ) -> None:
        operator = kuberay(faults=Faults(pods={"experts": fault}))
        place.client.apply(ray_service(place.name))
        place.wait(lambda pod: says in str(pod.get("status")), "Pod")
        applications = pending_applications(place.wait(pending_applications))
        assert applications["shoal"]["status"] == "DEPLOYING"
        operator.set_faults(pods={})
        place.ready()

    def test_an_application_that_fails(self, place: Namespace, kuberay: Start) -> None:
        kuberay(faults=Faults(application="DEPLOY_FAILED", application_message="OSError: no file"))
        place.client.apply(ray_service(place.name))
        service = place.wait(pending_applications)
        assert pending_applications(service)["shoal"]["message"] == "OSError: no file"
        assert condition(service, "Ready")["status"] == "False"

    def test_the_time_to_start_runs_out(self, place: Namespace, kuberay: Start) -> None:
        kuberay(faults=Faults(application="DEPLOYING", is_initializing_timeout=True))
        place.client.apply(ray_service(place.name))
        assert place.refused()["reason"] == "InitializingTimeout"


def test_a_changed_serve_config_keeps_the_cluster(place: Namespace, kuberay: Start) -> None:
    kuberay(faults=Faults(rejected="nothing", application_message="ValueError"))
    service = ray_service(place.name)
    place.client.apply(service)
    ready = place.ready()
    config = {"applications": [{"name": "shoal", "import_path": "cluster.app:nothing"}]}
    place.client.apply(
        {**service, "spec": {**service["spec"], "serveConfigV2": yaml.safe_dump(config)}}
    )
    since = ready["metadata"]["resourceVersion"]
    told = list[str]()
    for event in place.client.watch("RayService", place.name, since, timeout_s=30):
        seen = event["object"]
        if seen["status"]["observedGeneration"] == 2:
            assert cluster_name(seen) == cluster_name(ready)
            applications = seen["status"]["activeServiceStatus"]["applicationStatuses"]
            told.append(applications["shoal"]["status"])
            if told[-1] == "DEPLOY_FAILED":
                break
    assert told == ["RUNNING", "DEPLOY_FAILED"]  # the old status first
