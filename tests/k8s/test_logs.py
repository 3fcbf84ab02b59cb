"""`shoal k8s logs`: lines of several pods, each with its pod's name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.config import ConfigError
from cluster.deploy.api import Ref
from cluster.deploy.api_errors import Refused
from cluster.deploy.logs import follow_logs, named_pods, show_logs
from tests.k8s.shoal_cli import Shoal

if TYPE_CHECKING:
    from tests.k8s.api_server.client import Client
    from tests.k8s.api_server.server import SimEnv


def pod(name: str, group: str = "experts", phase: str = "Running") -> dict[str, Any]:
    metadata = {"name": name, "namespace": "here", "uid": name, "labels": {"ray.io/group": group}}
    containers = [{"name": "ray-worker"}, {"name": "autoscaler"}]
    return {"metadata": metadata, "spec": {"containers": containers}, "status": {"phase": phase}}


class FakeCluster:
    """Two lines for each pod, but none for `broken`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    def log(self, ref: Ref, container: str, **options: Any) -> Iterator[str]:
        self.asked.append((ref.name, container, options))
        if ref.name == "broken":
            raise Refused(400, "container is waiting to start")
        yield from ("one", "two")


def shown(*pods: dict[str, Any]) -> tuple[list[tuple[str, str]], FakeCluster]:
    fake: Any = FakeCluster()
    return list(show_logs(fake, list(pods), 5)), fake


def test_lines_have_the_name_of_their_pod() -> None:
    lines, fake = shown(pod("a"), pod("b"))
    assert lines == [("a", "one"), ("a", "two"), ("b", "one"), ("b", "two")]
    assert fake.asked[0] == ("a", "ray-worker", {"tail_lines": 5})


def test_a_pod_without_a_log_does_not_hide_the_others() -> None:
    lines, _ = shown(pod("broken"), pod("b"))
    assert lines[0] == ("broken", "(no log: container is waiting to start)")
    assert lines[1:] == [("b", "one"), ("b", "two")]


def test_pods_that_come_later_are_followed_and_each_only_once() -> None:
    rounds = iter([[pod("a")], [pod("a"), pod("b", phase="Pending")]])
    last = [pod("a"), pod("b")]
    fake: Any = FakeCluster()
    lines = follow_logs(fake, lambda: next(rounds, last), 5, wait_s=0.02)
    got = sorted(itertools.islice(lines, 4))
    assert got == [("a", "one"), ("a", "two"), ("b", "one"), ("b", "two")]
    assert sorted(name for name, _, _ in fake.asked) == ["a", "b"]


@pytest.mark.parametrize(
    ("state", "speaks"),
    [
        ({"running": {}}, "verify-model"),
        ({"terminated": {"exitCode": 2}}, "verify-model"),
        ({"terminated": {"exitCode": 0}}, "ray-worker"),
        ({"waiting": {"reason": "PodInitializing"}}, "ray-worker"),
    ],
)
def test_an_init_container_speaks_until_it_is_done(state: dict[str, Any], speaks: str) -> None:
    starting = pod("a", phase="Pending")
    starting["status"]["initContainerStatuses"] = [{"name": "verify-model", "state": state}]
    _, fake = shown(starting)
    assert fake.asked[0][1] == speaks


def test_first_the_init_container_is_followed_then_ray() -> None:
    starting = pod("a", phase="Pending")
    starting["status"]["initContainerStatuses"] = [{"name": "init", "state": {"running": {}}}]
    rounds = iter([[starting], [starting]])
    fake: Any = FakeCluster()
    lines = follow_logs(fake, lambda: next(rounds, [pod("a")]), 5, wait_s=0.02)
    list(itertools.islice(lines, 4))
    assert [container for _, container, _ in fake.asked] == ["init", "ray-worker"]


class TestTier:
    PODS = (pod("h", "headgroup"), pod("e2"), pod("e1"), pod("i", "ingress"))

    def names(self, tier: str | None) -> list[str]:
        return [each["metadata"]["name"] for each in named_pods(list(self.PODS), tier)]

    def test_one_or_all(self) -> None:
        assert self.names("experts") == ["e1", "e2"]
        assert self.names("head") == ["h"]
        assert self.names(None) == ["e1", "e2", "h", "i"]

    def test_an_unknown_one_names_the_known(self) -> None:
        with pytest.raises(ConfigError, match="pods there are of experts, headgroup, ingress"):
            self.names("expert")


@pytest.mark.k8s
class TestCommand:
    @pytest.fixture
    def shoal(self, kube: SimEnv, namespace: str, tmp_path: Path) -> Shoal:
        return Shoal(kube, namespace, tmp_path)

    def test_the_last_lines_of_a_tier(
        self, kube: SimEnv, shoal: Shoal, admin: Client, kuberay: Callable[..., Any]
    ) -> None:
        if not kube.is_simulated:
            pytest.skip("without a kubelet a real server has no logs")
        kuberay()
        shoal("apply")
        (name,) = (
            each["metadata"]["name"]
            for each in admin.select("Pod", shoal.namespace, "ray.io/group=experts")
        )
        kube.write_log(shoal.namespace, name, "first\nsecond\nthird\n")
        result = shoal("logs", "experts", "--tail", "2")
        assert result.out.splitlines() == [f"{name}  second", f"{name}  third"]

    def test_no_pods(self, shoal: Shoal) -> None:
        result = shoal("logs")
        assert (result.exit_code, "there are no pods at all" in result.err) == (2, True)
