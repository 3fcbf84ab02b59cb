"""`shoal k8s down`: what goes, and what stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.deploy.api import Cluster, Ref
from cluster.deploy.api_errors import ClusterError
from cluster.deploy.down import take_down
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


def test_everything_but_data_goes(shoal: Shoal, admin: Client, kuberay: Callable[..., Any]) -> None:
    kuberay()
    shoal.write(**STORED)
    assert shoal("apply").exit_code == 0
    result = shoal("down", "--yes")
    assert result.exit_code == 0, result.text
    assert "volumes and Secrets are kept" in result.text
    gone = ("RayService", "RayCluster", "Pod", "Service", "ServiceAccount", "Role")
    assert names(admin, shoal.namespace, *gone) == set()
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
    service = Ref("ray.io/v1", "RayService", "shoal", shoal.namespace)
    cluster, told, times = Cluster(kube.cluster("admin")), list[str](), iter([0.0, 1.0, 99.0])
    with pytest.raises(ClusterError, match=r"RayService/shoal \(held by .*ray\.io/hold"):
        take_down(
            cluster,
            service,
            [service],
            30,
            show=told.append,
            clock=lambda: next(times),
            sleep=lambda seconds: None,
        )
    assert told == ["waiting for 1 to go: " + told[0].removeprefix("waiting for 1 to go: ")]
    admin.patch("RayService", "shoal", shoal.namespace, {"metadata": {"finalizers": None}})
