"""`shoal k8s check --live`: what a cluster says before anything is applied."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.deploy.api import Kind, Ref
from cluster.deploy.api_errors import Forbidden
from cluster.deploy.preflight import preflight, unknown_fields
from tests.k8s.shoal_cli import Shoal

if TYPE_CHECKING:
    from tests.k8s.api_server.server import SimEnv

SCHEMA = {
    "type": "object",
    "properties": {
        "rayVersion": {"type": "string"},
        "groups": {"type": "array", "items": {"type": "object", "properties": {"name": {}}}},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "any": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
    },
}


def test_unknown_fields_have_paths() -> None:
    value = {
        "rayVersion": "2.60.0",
        "authOptions": {"mode": "token"},
        "groups": [{"name": "a"}, {"name": "b", "labels": {}}],
        "labels": {"x": "y"},
        "any": {"thing": 1},
    }
    assert list(unknown_fields(value, SCHEMA, "spec")) == [
        "spec.authOptions",
        "spec.groups[1].labels",
    ]


def ray_service(gpus: int = 8, pods: int = 2) -> dict[str, Any]:
    container = {"name": "ray-worker", "resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}
    pod = {"containers": [container], "nodeSelector": {"gpu": "h200"}}
    group = {"groupName": "experts", "minReplicas": pods, "template": {"spec": pod}}
    cluster = {"rayVersion": "2.60.0", "workerGroupSpecs": [group]}
    metadata = {"name": "shoal", "namespace": "here"}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": metadata,
        "spec": {"rayClusterConfig": cluster},
    }


def claim(storage_class: str | None) -> dict[str, Any]:
    spec = {"storageClassName": storage_class} if storage_class else {}
    metadata = {"name": "models", "namespace": "here"}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": spec,
    }


def node(gpus: int, **spec: Any) -> dict[str, Any]:
    allocatable = {"nvidia.com/gpu": str(gpus)}
    return {
        "metadata": {"labels": {"gpu": "h200"}},
        "spec": spec,
        "status": {"allocatable": allocatable},
    }


class FakeCluster:
    """Lists what it is given; None stands for a kind that may not be listed."""

    def __init__(self, denied: set[str] | None = None, **lists: list[Any] | None) -> None:
        self._lists = lists
        self._denied = denied or set()

    def kind(self, api_version: str, kind: str) -> Kind:
        return Kind("/apis/x", f"{kind.lower()}s", True)

    def get(self, ref: Ref) -> None:
        return None

    def select(self, api_version: str, kind: str) -> list[Any]:
        found = self._lists.get(kind, [])
        if found is None:
            raise Forbidden(403, f"HTTP 403: cannot list {kind}")
        return found

    def create(self, review: dict[str, Any]) -> dict[str, Any]:
        asked = review["spec"]["resourceAttributes"]
        allowed = f"{asked['verb']} {asked['resource']}" not in self._denied
        return {"status": {"allowed": allowed}}


def answers(cluster: Any, *manifests: dict[str, Any]) -> dict[str, str]:
    """Text and level of each answer."""
    return {answer.text: answer.level for answer in preflight(cluster, list(manifests))}


def find(told: dict[str, str], words: str) -> str:
    (level,) = (level for text, level in told.items() if words in text)
    return level


class TestGpus:
    def test_enough(self) -> None:
        told = answers(FakeCluster(Node=[node(8), node(8)]), ray_service())
        assert find(told, "experts: 2 pods of 8 GPUs: the nodes have room for 2") == "ok"

    @pytest.mark.parametrize(
        "nodes",
        [[node(8)], [node(4)] * 4, [node(8), node(8, unschedulable=True)], []],
        ids=["too few", "too small", "cordoned", "none"],
    )
    def test_too_little(self, nodes: list[Any]) -> None:
        told = answers(FakeCluster(Node=nodes), ray_service())
        assert find(told, "experts: 2 pods of 8 GPUs") == "error"

    def test_nodes_of_another_kind_do_not_count(self) -> None:
        other = node(8) | {"metadata": {"labels": {"gpu": "a100"}}}
        told = answers(FakeCluster(Node=[other, other]), ray_service())
        assert find(told, "0 nodes (gpu=h200) have room for 0") == "error"

    def test_nodes_that_may_not_be_listed_are_no_error(self) -> None:
        told = answers(FakeCluster(Node=None), ray_service())
        assert find(told, "cannot list Node") == "unknown"


class TestStorage:
    DEFAULT = {
        "metadata": {
            "name": "fast",
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        }
    }

    @pytest.mark.parametrize("wanted", [None, "fast"])
    def test_exists(self, wanted: str | None) -> None:
        told = answers(FakeCluster(StorageClass=[self.DEFAULT]), claim(wanted))
        assert find(told, "models: StorageClass") == "ok"

    def test_unknown_name(self) -> None:
        told = answers(FakeCluster(StorageClass=[self.DEFAULT]), claim("slow"))
        assert find(told, "no StorageClass slow: there are fast") == "error"

    def test_no_default(self) -> None:
        told = answers(FakeCluster(StorageClass=[]), claim(None))
        assert find(told, "no default StorageClass") == "error"


class TestRights:
    def test_all(self) -> None:
        assert find(answers(FakeCluster(), claim("x")), "you may apply and follow") == "ok"

    def test_each_missing_right_is_named(self) -> None:
        denied = {"patch rayservices", "list pods"}
        told = answers(FakeCluster(denied=denied), ray_service())
        assert find(told, "in namespace here: patch RayService, list Pod") == "error"


@pytest.mark.k8s
class TestCommand:
    @pytest.fixture
    def shoal(self, kube: SimEnv, namespace: str, tmp_path: Path) -> Shoal:
        return Shoal(kube, namespace, tmp_path)

    def test_a_cluster_that_fits(self, shoal: Shoal) -> None:
        result = shoal("check", "--live")
        assert result.exit_code == 0, result.text
        assert "KubeRay knows every field" in result.out
        assert "you may apply and follow everything" in result.out

    def test_a_user_without_rights(self, shoal: Shoal) -> None:
        result = shoal("check", "--live", user="deployer")
        assert result.exit_code == 1
        assert "you may not, in namespace" in result.out
