"""`shoal k8s scale`: both objects, whatever else happens to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.config import ConfigError
from cluster.deploy.api import Ref
from cluster.deploy.api_errors import ClusterError, Forbidden, Refused
from cluster.deploy.scale import ATTEMPTS, Bounds, parse_bounds, scale, serve_bounds
from tests.k8s.shoal_cli import Shoal

if TYPE_CHECKING:
    from tests.k8s.api_server.client import Client
    from tests.k8s.api_server.server import SimEnv

SERVICE = Ref("ray.io/v1", "RayService", "shoal", "here")


class TestBounds:
    @pytest.mark.parametrize(("text", "bounds"), [("3", Bounds(3, 3)), ("2-6", Bounds(2, 6))])
    def test_one_number_or_two(self, text: str, bounds: Bounds) -> None:
        assert parse_bounds(text) == bounds

    @pytest.mark.parametrize("text", ["", "x", "0", "6-2", "-3", "2-", "2000", "٣"])
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="pods"):
            parse_bounds(text)

    def test_what_the_application_allows(self) -> None:
        config = """
applications:
- args:
    experts: {num_workers: 2, scaling: {min_workers: 2, max_workers: 5}}
    attention: {num_workers: 3}
"""
        service = {"spec": {"serveConfigV2": config}}
        assert serve_bounds(service, "experts") == Bounds(2, 5)
        assert serve_bounds(service, "attention") == Bounds(3, 3)
        assert serve_bounds(service, "ingress") is None
        assert serve_bounds({"spec": {}}, "experts") is None


class FakeCluster:
    """A RayService whose groups are as `orders` says, one after each refused patch."""

    def __init__(self, *orders: tuple[str, ...], refusals: list[Refused] | None = None) -> None:
        self._orders = list(orders)
        self._refusals = refusals or []
        self.patched: list[dict[str, Any]] = []

    def get(self, ref: Ref) -> dict[str, Any]:
        order = self._orders.pop(0) if len(self._orders) > 1 else self._orders[0]
        groups = [{"groupName": name, "minReplicas": 1, "maxReplicas": 1} for name in order]
        spec = {"rayClusterConfig": {"workerGroupSpecs": groups}}
        return {"metadata": {"name": "shoal"}, "spec": spec}

    def select(self, *args: Any) -> list[dict[str, Any]]:
        return []

    def json_patch(self, ref: Ref, operations: list[dict[str, Any]], manager: str) -> None:
        if self._refusals:
            raise self._refusals.pop(0)
        self.patched = operations


def patch(cluster: Any) -> Any:
    return scale(cluster, SERVICE, "experts", Bounds(2, 6))


class TestConcurrency:
    def test_the_group_is_found_anew_after_it_moved(self) -> None:
        moved = Refused(422, "test failed")
        fake = FakeCluster(("experts",), ("ingress", "experts"), refusals=[moved])
        patch(fake)
        assert {each["path"].split("/")[4] for each in fake.patched} == {"1"}
        assert fake.patched[0] == {
            "op": "test",
            "path": "/spec/rayClusterConfig/workerGroupSpecs/1/groupName",
            "value": "experts",
        }

    def test_it_gives_up_at_last(self) -> None:
        refusals = [Refused(409, "changed")] * ATTEMPTS
        with pytest.raises(ClusterError, match=f"after {ATTEMPTS} attempts: changed"):
            patch(FakeCluster(("experts",), refusals=refusals))

    def test_missing_rights_are_told_at_once(self) -> None:
        fake = FakeCluster(("experts",), refusals=[Forbidden(403, "may not patch")])
        with pytest.raises(Forbidden):
            patch(fake)

    def test_an_unknown_group_names_the_known_ones(self) -> None:
        with pytest.raises(ConfigError, match="it has ingress, attention"):
            patch(FakeCluster(("ingress", "attention")))


@pytest.mark.k8s
class TestCommand:
    @pytest.fixture
    def shoal(self, kube: SimEnv, namespace: str, tmp_path: Path) -> Shoal:
        return Shoal(kube, namespace, tmp_path)

    def bounds(self, obj: dict[str, Any]) -> tuple[int, int]:
        spec = obj["spec"].get("rayClusterConfig", obj["spec"])
        group = next(g for g in spec["workerGroupSpecs"] if g["groupName"] == "experts")
        return group["minReplicas"], group["maxReplicas"]

    def test_both_objects_and_the_pods_follow(
        self, shoal: Shoal, admin: Client, kuberay: Callable[..., Any]
    ) -> None:
        kuberay()
        shoal("apply")
        result = shoal("scale", "experts", "1-4")
        assert result.exit_code == 0
        assert "RayService/shoal: experts 1 -> 1-4 pods" in result.out
        (cluster,) = admin.select("RayCluster", shoal.namespace)
        service = admin.get("RayService", "shoal", shoal.namespace)
        assert self.bounds(service) == self.bounds(cluster) == (1, 4)

    def test_it_says_what_the_application_makes_of_the_room(self, shoal: Shoal) -> None:
        shoal("apply", "--no-wait")
        told = shoal("scale", "experts", "1-4").text
        workers = shoal.config.experts.num_workers
        assert f"the application keeps {workers} workers there, 2 a pod" in told
        assert "pods beyond 1 stay empty: raise experts.max_pods" in told

    def test_ingress_has_fixed_pods_with_several_replicas(self, shoal: Shoal) -> None:
        shoal.write(ingress={"pods": 2, "replicas_per_pod": 3})
        shoal("apply", "--no-wait")
        told = shoal("scale", "ingress", "2-5").text
        assert "the application keeps 6 workers there, 3 a pod" in told
        assert "pods beyond 2 stay empty: raise ingress.pods in" in told

    @pytest.mark.parametrize("tier", ["ingress", "experts"])
    def test_a_minimum_that_leaves_pods_without_replicas_is_refused(
        self, shoal: Shoal, admin: Client, tier: str
    ) -> None:
        shoal("apply", "--no-wait")
        before = admin.get("RayService", "shoal", shoal.namespace)["spec"]
        result = shoal("scale", tier, "2-4")
        assert result.exit_code == 2
        assert "may leave one empty, never to become ready" in result.text
        assert f"raise {tier}.pods in" in result.text
        assert admin.get("RayService", "shoal", shoal.namespace)["spec"] == before

    def test_the_next_apply_asks_about_numbers_that_differ(self, shoal: Shoal) -> None:
        shoal("apply", "--no-wait")
        shoal("scale", "experts", "1-4")
        result = shoal("apply", "--no-wait")
        assert result.exit_code == 3
        assert "`shoal k8s scale` has set numbers of pods: write them into the conf" in result.err
        numbers = {"cpus": 2, "workers_per_pod": 2, "pods": 1, "max_pods": 4}
        shoal.write(experts=numbers, image="shoal:new")
        assert shoal("apply", "--no-wait").exit_code == 0

    def test_absent(self, shoal: Shoal) -> None:
        result = shoal("scale", "experts", "2")
        assert (result.exit_code, "apply first" in result.err) == (2, True)
