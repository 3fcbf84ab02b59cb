"""`shoal k8s down`: what goes, and what stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.deploy.api import Cluster, Ref
from cluster.deploy.api_errors import ClusterError
from cluster.deploy.down import take_down
from cluster.deploy.follow import ORIGIN_LABEL
from tests.k8s.kuberay_samples import ray_service
from tests.k8s.shoal_cli import Shoal

if TYPE_CHECKING:
    from tests.k8s.api_server.client import Client
    from tests.k8s.api_server.server import SimEnv

pytestmark = pytest.mark.k8s
STORED = {"preset": "gpu-small", "network_policy": {"enabled": False}}


@pytest.fixture
def shoal(kube: SimEnv, namespace: str, tmp_path: Path) -> Shoal:
    return Shoal(kube, namespace, tmp_path)


def names(admin: Client, namespace: str, *kinds: str) -> set[str]:
    """Of what is there and stays: a real server keeps claims until a controller has seen them."""
    found = [each["metadata"] for kind in kinds for each in admin.select(kind, namespace)]
    return {each["name"] for each in found if "deletionTimestamp" not in each} - {"default"}


def wait_gone(admin: Client, namespace: str, *kinds: str) -> None:
    """The operator may have been at work when its RayService went, and tidies up after itself."""
    for kind in kinds:
        while (listing := admin.listing(kind, namespace))["items"]:
            since = listing["metadata"]["resourceVersion"]
            watch = admin.watch(kind, namespace, since, timeout_s=120)
            assert any(event["type"] == "DELETED" for event in watch), listing["items"]


def test_everything_but_data_goes(shoal: Shoal, admin: Client, kuberay: Callable[..., Any]) -> None:
    kuberay()
    shoal.write(**STORED)
    assert shoal("apply").exit_code == 0
    result = shoal("down", "--yes")
    assert result.exit_code == 0, result.text
    assert "volumes and Secrets are kept" in result.text
    wait_gone(admin, shoal.namespace, "RayService", "RayCluster", "Pod", "Service")
    assert names(admin, shoal.namespace, "ServiceAccount", "Role") == set()
    kept = names(admin, shoal.namespace, "Secret", "PersistentVolumeClaim")
    assert kept >= {"shoal-models", "shoal-ray-token", "shoal-cluster-secret"}
    assert admin.find("Namespace", shoal.namespace)
    assert admin.find("PriorityClass", f"{shoal.namespace}-shoal-control") is None


def test_data_goes_when_asked(shoal: Shoal, admin: Client, kuberay: Callable[..., Any]) -> None:
    kuberay()
    shoal.write(**STORED)
    shoal("apply")
    stranger = {"metadata": {"name": "stranger", "namespace": shoal.namespace}}
    admin.create({"apiVersion": "v1", "kind": "Secret", **stranger})
    assert shoal("down", "--yes", "--delete-data").exit_code == 0
    left = names(admin, shoal.namespace, "Secret", "PersistentVolumeClaim")
    assert left & {"shoal-models", "shoal-ray-token", "stranger"} == {"stranger"}


def test_a_question_that_is_not_answered_with_yes_deletes_nothing(
    shoal: Shoal, admin: Client
) -> None:
    shoal("apply", "--no-wait")
    result = shoal("down", input="n\n")
    assert (result.exit_code, "RayService/shoal" in result.out) == (1, True)
    assert admin.find("RayService", "shoal", shoal.namespace)


def test_nothing_there(shoal: Shoal) -> None:
    result = shoal("down", "--yes")
    assert (result.exit_code, "nothing to delete" in result.out) == (0, True)


def test_what_a_finalizer_holds_is_named_when_the_time_is_up(
    kube: SimEnv, shoal: Shoal, admin: Client
) -> None:
    metadata = {"name": "shoal", "namespace": shoal.namespace, "finalizers": ["ray.io/hold"]}
    head = {"template": {"spec": {"containers": [{"name": "ray-head", "image": "shoal:1"}]}}}
    admin.create(
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "metadata": metadata,
            "spec": {"rayClusterConfig": {"headGroupSpec": {**head, "rayStartParams": {}}}},
        }
    )
    place = {"name": "shoal-worker", "namespace": shoal.namespace}
    account: dict[str, Any] = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": place}
    admin.create(account)
    service = Ref("ray.io/v1", "RayService", "shoal", shoal.namespace)
    cluster, told, times = Cluster(kube.cluster("admin")), list[str](), iter([0.0, 1.0, 99.0])
    with pytest.raises(ClusterError, match=r"RayService/shoal \(held by .*ray\.io/hold"):
        take_down(
            cluster,
            service,
            [service, Ref.of(account)],
            30,
            show=told.append,
            clock=lambda: next(times),
            sleep=lambda seconds: None,
        )
    assert admin.find("ServiceAccount", "shoal-worker", shoal.namespace)  # in use until then
    assert told == ["waiting for 1 to go: " + told[0].removeprefix("waiting for 1 to go: ")]
    admin.patch("RayService", "shoal", shoal.namespace, {"metadata": {"finalizers": None}})


class FakeCluster:
    """A RayService with one RayCluster, which goes two looks after it; notes what is asked."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._looks_left: int | None = None

    def get(self, ref: Ref) -> dict[str, Any] | None:
        return None if "delete RayService/shoal" in self.told else thing("RayService", "shoal")

    def select(self, api_version: str, kind: str, *args: Any) -> list[dict[str, Any]]:
        if kind != "RayCluster":
            return []
        looks = sum(each == "look" for each in self.told)
        if "delete RayService/shoal" in self.told:
            self.told.append("look")
        return [] if looks >= 2 else [thing("RayCluster", "shoal-a")]

    def delete(self, ref: Ref) -> None:
        self.told.append(f"delete {ref}")


def thing(kind: str, name: str) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name}}


def test_redis_and_the_rest_go_after_the_pods() -> None:
    fake: Any = FakeCluster()
    service = Ref("ray.io/v1", "RayService", "shoal", "here")
    redis = Ref("apps/v1", "StatefulSet", "shoal-redis", "here")
    take_down(fake, service, [redis, service], 30, clock=lambda: 0, sleep=lambda seconds: None)
    assert fake.told == [
        "delete RayService/shoal",
        *["look"] * 3,
        "delete StatefulSet/shoal-redis",
    ]


def test_a_cluster_that_an_earlier_down_left_is_found(shoal: Shoal, admin: Client) -> None:
    metadata = {"name": "shoal-a", "namespace": shoal.namespace, "labels": {ORIGIN_LABEL: "shoal"}}
    spec = ray_service(shoal.namespace)["spec"]["rayClusterConfig"]
    body = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec}
    admin.create(body)
    result = shoal("down", "--yes")
    assert (result.exit_code, "RayCluster/shoal-a" in result.out) == (0, True)
    assert admin.find("RayCluster", "shoal-a", shoal.namespace) is None
