"""Following a deployment until it serves: with a fake clock, and against an API server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.config import ConfigError
from cluster.deploy.api import Cluster, Ref
from cluster.deploy.api_errors import Unreachable
from cluster.deploy.follow import ORIGIN_LABEL, OUTAGE_S, PERIOD_S, Deployment, Follower
from cluster.deploy.history import SETTLE_S
from cluster.deploy.pod_causes import PULL_PATIENCE_S
from cluster.deploy.verdict import Observed, Verdict
from tests.k8s import kuberay_kubelet
from tests.k8s.api_server.patches import JSON
from tests.k8s.kuberay_samples import ray_service
from tests.k8s.shoal_cli import WAIT_S, Shoal

if TYPE_CHECKING:
    from tests.k8s.api_server.client import Client
    from tests.k8s.api_server.server import SimEnv


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def service(ready: bool, reason: str = "Initializing") -> Observed:
    condition = {"type": "Ready", "status": str(ready), "reason": reason}
    status = {"observedGeneration": 1, "conditions": [condition]}
    return Observed({"metadata": {"generation": 1}, "spec": {}, "status": status})


WAITING, READY = service(False), service(True)
AWAY = Unreachable("no answer")


class FakeDeployment:
    """Shows one thing after the other, the last one for ever. Waiting for a change takes the whole
    time."""

    def __init__(self, clock: FakeClock, *shown: Observed | Unreachable | None) -> None:
        self.ref = Ref("ray.io/v1", "RayService", "shoal", "here")
        self._clock = clock
        self._shown = list(shown)

    def observe(self) -> Observed | None:
        shown = self._shown.pop(0) if len(self._shown) > 1 else self._shown[0]
        if isinstance(shown, Unreachable):
            raise shown
        return shown

    def failed_since(self, before: Observed, now: Observed) -> list[dict[str, Any]]:
        return []

    def await_change(self, seen: Observed, timeout_s: float) -> bool:
        self._clock.sleep(timeout_s)
        return False


def follower(clock: FakeClock, *shown: Observed | Unreachable | None) -> Follower:
    deployment: Any = FakeDeployment(clock, *shown)
    return Follower(deployment, clock=clock, sleep=clock.sleep)


class TestWait:
    def test_returns_when_it_serves(self) -> None:
        clock, told = FakeClock(), list[Verdict]()
        judged = follower(clock, WAITING, WAITING, READY).wait_ready(100, told.append)
        assert (judged.state, clock.now) == ("ready", 2 * PERIOD_S)
        assert [each.state for each in told] == ["waiting", "waiting", "ready"]

    def test_a_terminal_state_ends_the_wait_at_once(self) -> None:
        clock = FakeClock()
        refused = service(False, "ValidationFailed")
        judged = follower(clock, WAITING, refused).wait_ready(100, lambda each: None)
        assert (judged.state, clock.now) == ("failed", PERIOD_S)

    def test_the_time_runs_out(self) -> None:
        clock = FakeClock()
        judged = follower(clock, WAITING).wait_ready(12, lambda each: None)
        assert (judged.state, clock.now) == ("waiting", 12)

    def test_a_short_outage_is_waited_for(self) -> None:
        clock = FakeClock()
        judged = follower(clock, WAITING, AWAY, AWAY, READY).wait_ready(100, lambda each: None)
        assert judged.state == "ready"

    def test_a_long_outage_is_not(self) -> None:
        clock = FakeClock()
        with pytest.raises(Unreachable):
            follower(clock, WAITING, AWAY).wait_ready(1000, lambda each: None)
        assert OUTAGE_S < clock.now < OUTAGE_S + PERIOD_S

    def test_what_does_not_exist_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match="shoal k8s apply"):
            follower(FakeClock(), None).look()

    def test_watches_that_end_at_once_make_no_busy_loop(self) -> None:
        clock = FakeClock()
        impatient: Any = FakeDeployment(clock, *[WAITING] * 3, READY)
        impatient.await_change = lambda seen, timeout_s: False
        Follower(impatient, clock=clock, sleep=clock.sleep).wait_ready(100, lambda each: None)
        assert clock.now == 3


def running(status: str, generation: int = 2, seen_generation: int = 2) -> Observed:
    """A service on a live cluster whose application has this status."""
    condition = {"type": "Ready", "status": "True", "reason": "NonZeroServeEndpoints"}
    active = {"rayClusterName": "a", "applicationStatuses": {"shoal": {"status": status}}}
    status_ = {"observedGeneration": seen_generation, "conditions": [condition]}
    status_ |= {"activeServiceStatus": active}
    metadata = {"generation": generation}
    return Observed({"metadata": metadata, "spec": {}, "status": status_})


class TestChange:
    """The operator notes a new generation beside the old statuses."""

    def states(self, *shown: Observed, is_change: bool = True) -> tuple[list[str], float]:
        clock, told = FakeClock(), list[Verdict]()
        deployment: Any = FakeDeployment(clock, *shown)
        looks = Follower(deployment, is_change=is_change, clock=clock, sleep=clock.sleep)
        looks.wait_ready(100, told.append)
        return [each.state for each in told], clock.now

    @pytest.mark.parametrize(("old", "state"), [("RUNNING", "ready"), ("DEPLOY_FAILED", "failed")])
    def test_an_old_status_counts_only_if_it_stays(self, old: str, state: str) -> None:
        states, seconds = self.states(running(old))
        assert (states, seconds) == (["waiting", "waiting", state], 2 * PERIOD_S)
        assert seconds >= SETTLE_S

    def test_the_time_begins_when_the_operator_has_seen_the_change(self) -> None:
        unseen = running("RUNNING", seen_generation=1)
        states, _ = self.states(unseen, unseen, unseen, running("RUNNING"))
        assert states == ["waiting"] * 5 + ["ready"]

    def test_a_status_that_changed_is_the_new_one(self) -> None:
        states, seconds = self.states(running("RUNNING"), running("DEPLOY_FAILED"))
        assert (states, seconds) == (["waiting", "failed"], PERIOD_S)

    def test_one_that_changed_back_as_well(self) -> None:
        states, _ = self.states(running("RUNNING"), running("DEPLOYING"), running("RUNNING"))
        assert states == ["waiting", "waiting", "ready"]

    def test_an_old_failure_is_not_told_as_the_cause(self) -> None:
        clock, told = FakeClock(), list[Verdict]()
        deployment: Any = FakeDeployment(clock, running("DEPLOY_FAILED"), running("RUNNING"))
        looks = Follower(deployment, is_change=True, clock=clock, sleep=clock.sleep)
        looks.wait_ready(100, told.append)
        assert [each.causes for each in told] == [(), ()]

    def test_without_a_change_of_settings_nothing_is_waited_for(self) -> None:
        assert self.states(running("RUNNING"), is_change=False) == (["ready"], 0)


def a_pod(uid: str, *, is_ready: bool = False, has_failed: bool = False) -> dict[str, Any]:
    ready = {"type": "Ready", "status": str(is_ready)}
    ended = {"name": "c", "state": {"terminated": {"exitCode": 1, "message": f"words of {uid}"}}}
    failed = {"phase": "Failed", "containerStatuses": [ended]}
    labels = {"ray.io/cluster": "a", "ray.io/group": "experts"}
    metadata = {"name": uid, "uid": uid, "labels": labels}
    return {
        "metadata": metadata,
        "status": {"conditions": [ready]} | (failed if has_failed else {}),
    }


class TestPods:
    """KubeRay replaces a failed pod at once."""

    def looks(self, *pods: list[dict[str, Any]], seconds: float = 1) -> list[Verdict]:
        named = {"spec": {}, "metadata": {"name": "a"}}
        clock = FakeClock()
        shown = [replace(running("DEPLOYING"), clusters=[named], pods=each) for each in pods]
        deployment: Any = FakeDeployment(clock, *shown)
        looks = Follower(deployment, clock=clock, sleep=clock.sleep)
        told = []
        for _ in pods:
            told.append(looks.look())
            clock.sleep(seconds)
        return told

    def test_the_third_one_that_fails_ends_the_wait(self) -> None:
        told = self.looks(*([a_pod(uid, has_failed=True)] for uid in "pqr"))
        assert [each.state for each in told] == ["waiting", "waiting", "failed"]
        assert "c: exit code 1: words of r; 3 pods failed" in told[-1].causes[0]

    def test_one_that_is_seen_thrice_is_one(self) -> None:
        assert self.looks(*[[a_pod("p", has_failed=True)]] * 3)[-1].state == "waiting"

    def test_one_that_gets_ready_makes_good_for_those_before(self) -> None:
        p, q, r = (a_pod(uid, has_failed=True) for uid in "pqr")
        told = self.looks([p], [q], [a_pod("s", is_ready=True)], [r])
        assert [each.state for each in told] == ["waiting"] * 4
        assert told[2].causes == ()

    def test_an_image_that_does_not_come_for_minutes(self) -> None:
        pod = a_pod("p")
        waiting = {"reason": "ImagePullBackOff", "message": "i/o timeout"}
        pod["status"]["containerStatuses"] = [{"name": "c", "state": {"waiting": waiting}}]
        told = self.looks(*[[pod]] * 3, seconds=PULL_PATIENCE_S / 2)
        assert [each.state for each in told] == ["waiting", "waiting", "failed"]


@pytest.fixture
def shoal(kube: SimEnv, namespace: str, tmp_path: Path) -> Shoal:
    return Shoal(kube, namespace, tmp_path)


@pytest.mark.k8s
class TestWatch:
    @pytest.fixture
    def deployment(self, kube: SimEnv, shoal: Shoal) -> Deployment:
        assert shoal("apply", "--no-wait").exit_code == 0
        return Deployment(Cluster(kube.cluster("admin")), shoal.namespace, "shoal")

    def observed(self, deployment: Deployment) -> Observed:
        seen = deployment.observe()
        assert seen is not None
        return seen

    def test_a_change_before_the_watch_is_not_missed(
        self, deployment: Deployment, shoal: Shoal
    ) -> None:
        seen = self.observed(deployment)
        shoal.write(upgrade={"old_cluster_kept_s": 77})
        shoal("apply", "--no-wait")
        assert deployment.await_change(seen, WAIT_S)

    def test_a_change_during_the_watch_ends_it(self, deployment: Deployment, shoal: Shoal) -> None:
        seen, noticed = self.observed(deployment), list[bool]()

        def notice() -> None:
            noticed.append(deployment.await_change(seen, WAIT_S))

        watch = threading.Thread(target=notice)
        watch.start()
        shoal.write(upgrade={"old_cluster_kept_s": 77})
        shoal("apply", "--no-wait")
        watch.join(WAIT_S)
        assert noticed == [True]

    def test_without_a_change_the_time_runs_out(self, deployment: Deployment) -> None:
        assert not deployment.await_change(self.observed(deployment), 1)

    def test_a_server_that_forgot_is_read_anew(self, kube: SimEnv, deployment: Deployment) -> None:
        if not kube.is_simulated:
            pytest.skip("a real server forgets when it likes")
        seen, done = self.observed(deployment), list[bool]()
        watch = threading.Thread(target=lambda: done.append(deployment.await_change(seen, WAIT_S)))
        watch.start()
        while watch.is_alive():  # until the watch is open and hears of it
            kube.forget_events()
            watch.join(0.05)
        assert done == [False]

    def test_a_pod_that_failed_and_is_gone_is_remembered(
        self, deployment: Deployment, shoal: Shoal, admin: Client
    ) -> None:
        labels = {"ray.io/is-ray-node": "yes", "ray.io/cluster": "shoal-a"}
        spec = {"containers": [{"name": "ray-worker", "image": "shoal:1"}]}
        for kind, meta in (
            ("RayCluster", {"name": "shoal-a", "labels": {ORIGIN_LABEL: "shoal"}}),
            ("Pod", {"name": "p", "labels": labels}),
        ):
            version = "ray.io/v1" if kind == "RayCluster" else "v1"
            body = {
                "spec": ray_service("")["spec"]["rayClusterConfig"]
                if kind == "RayCluster"
                else spec
            }
            metadata = {**meta, "namespace": shoal.namespace}
            admin.create({"apiVersion": version, "kind": kind, "metadata": metadata, **body})
        before = self.observed(deployment)
        failed = [{"op": "add", "path": "/status", "value": {"phase": "Failed"}}]
        admin.patch("Pod", "p", shoal.namespace, failed, JSON, "status")
        admin.delete("Pod", "p", shoal.namespace, gracePeriodSeconds="0")
        now = self.observed(deployment)
        assert len(before.pods) == 1 and now.pods == []
        (gone,) = {each["metadata"]["uid"] for each in deployment.failed_since(before, now)}
        assert gone == before.pods[0]["metadata"]["uid"]
        assert deployment.failed_since(now, now) == []

    def test_an_unreachable_server_is_one_line(self, tmp_path: Path, kube: SimEnv) -> None:
        config = json.loads(kube.cluster("admin").read_text())
        config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
        path = tmp_path / "away"
        path.write_text(json.dumps(config))
        with pytest.raises(Unreachable, match=r"^no answer .*127\.0\.0\.1:1: Connection refused$"):
            Deployment(Cluster(path), "default", "shoal").observe()


FAULTS = {
    "image_missing": ("ImagePullBackOff", "check the image's name"),
    "crashing": ("exit code 1: line 15", "OSError: no model", "pods failed one after the other"),
    "out_of_memory": ("OOMKilled", "raise the memory limit"),
}


@pytest.mark.k8s
class TestApplyAndWait:
    def test_ready(self, shoal: Shoal, kuberay: Callable[..., Any]) -> None:
        kuberay()
        result = shoal("apply")
        assert result.exit_code == 0
        assert "ready: RayService/shoal, serving on shoal-" in result.out

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_pod_that_cannot_run_ends_the_wait(
        self, shoal: Shoal, kuberay: Callable[..., Any], fault: str
    ) -> None:
        from tests.k8s.kuberay_operator import Faults

        kuberay(faults=Faults(pods={"experts": getattr(kuberay_kubelet, fault)}))
        result = shoal("apply")
        assert result.exit_code == 3
        for words in FAULTS[fault]:
            assert words in result.text

    def test_an_unschedulable_pod_is_told_while_waiting(
        self, shoal: Shoal, admin: Client, kuberay: Callable[..., Any]
    ) -> None:
        from tests.k8s.kuberay_operator import Faults

        kuberay(faults=Faults(pods={"experts": kuberay_kubelet.unschedulable}))
        shoal("apply", "--no-wait")
        deadline_s = time.monotonic() + WAIT_S
        while "Unschedulable" not in str(admin.select("Pod", shoal.namespace)):
            assert time.monotonic() < deadline_s
        result = shoal("apply", "--timeout", "1")
        assert result.exit_code == 3
        assert "Unschedulable: 0/5 nodes are available" in result.text
        assert "is not ready after 1 s" in result.text
        assert shoal("status").exit_code == 1

    def test_rays_own_words(self, shoal: Shoal, kuberay: Callable[..., Any]) -> None:
        from tests.k8s.kuberay_operator import Faults

        words = "Traceback:\n  File x\nModuleNotFoundError: No module named 'cluster.apq'"
        kuberay(faults=Faults(application="DEPLOY_FAILED", application_message=words))
        result = shoal("apply")
        assert result.exit_code == 3
        assert "No module named 'cluster.apq'" in result.text
        assert "failed: application shoal: DEPLOY_FAILED" in result.text

    def test_changed_settings_with_which_the_application_fails(
        self, shoal: Shoal, kuberay: Callable[..., Any]
    ) -> None:
        from tests.k8s.kuberay_operator import Faults

        kuberay(faults=Faults(rejected="strict_params", application_message="ValueError: no"))
        assert shoal("apply").exit_code == 0
        shoal.write(settings={"strict_params": True})
        result = shoal("apply")
        assert (result.exit_code, "ValueError: no" in result.err) == (3, True)

    def test_the_operator_gives_up_before_the_wait_does(
        self, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limits = list[float]()

        def wait_ready(self: Follower, timeout_s: float, show: Any) -> Verdict:
            limits.append(timeout_s)
            return Verdict("ready", "")

        monkeypatch.setattr(Follower, "wait_ready", wait_ready)
        shoal("apply")
        shoal("apply", "--timeout", "7")
        assert limits == [WAIT_S + 60, 7]

    def test_an_upgrade_is_ready_when_the_new_cluster_serves(
        self, shoal: Shoal, admin: Client, kuberay: Callable[..., Any]
    ) -> None:
        def active() -> str:
            found = admin.get("RayService", "shoal", shoal.namespace)
            return str(found["status"]["activeServiceStatus"]["rayClusterName"])

        kuberay()
        shoal("apply")
        before = active()
        shoal.write(image="shoal:new")
        assert shoal("apply").exit_code == 0
        assert active() != before

    def test_no_operator(self, shoal: Shoal) -> None:
        result = shoal("apply", "--timeout", "1")
        assert (result.exit_code, "operator has not looked" in result.text) == (3, True)


@pytest.mark.k8s
class TestStatus:
    def test_table_and_json(self, shoal: Shoal, kuberay: Callable[..., Any]) -> None:
        kuberay()
        shoal("apply")
        shown = shoal("status")
        assert shown.exit_code == 0
        assert "RayService/shoal: ready" in shown.out
        assert "experts" in shown.out and "1/1" in shown.out
        told = json.loads(shoal("status", "--json").out)
        assert (told["state"], told["applications"]) == ("ready", {"shoal": "RUNNING"})
        experts = next(tier for tier in told["tiers"] if tier["name"] == "experts")
        assert (experts["num_ready"], experts["num_wanted"]) == (1, 1)

    def test_absent(self, shoal: Shoal) -> None:
        result = shoal("status")
        assert (result.exit_code, "`shoal k8s apply` makes it" in result.err) == (2, True)
