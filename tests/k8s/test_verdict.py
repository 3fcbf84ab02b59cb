"""What `shoal k8s status` says, from objects as an API server shows them."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.deploy.status_view import progress
from cluster.deploy.verdict import Observed, Verdict, verdict

READY = {"type": "Ready", "status": "True", "reason": "NonZeroServeEndpoints"}
IDLE = {"type": "UpgradeInProgress", "status": "False", "reason": "NoPendingCluster"}
OUT_OF_MEMORY = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
STARTING = {"type": "Ready", "status": "False", "reason": "Initializing", "message": "starting"}


def service(*conditions: dict[str, Any], generation: int = 3, **status: Any) -> dict[str, Any]:
    status = {"observedGeneration": 3, "conditions": list(conditions), **status}
    return {"metadata": {"name": "shoal", "generation": generation}, "spec": {}, "status": status}


def cluster(name: str = "shoal-a", **status: Any) -> dict[str, Any]:
    experts = {"groupName": "experts", "replicas": 2, "minReplicas": 2, "maxReplicas": 6}
    return {
        "metadata": {"name": name, "creationTimestamp": name},
        "spec": {"workerGroupSpecs": [experts]},
        "status": status,
    }


def pod(name: str, *, of: str = "shoal-a", group: str = "experts", **status: Any) -> dict[str, Any]:
    labels = {"ray.io/cluster": of, "ray.io/group": group}
    return {"metadata": {"name": name, "labels": labels}, "status": status}


def container(**state: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "ray-worker", "image": "shoal:1", **state}]}


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return container(state={"waiting": {"reason": reason, "message": message}})


def judge(
    shown: dict[str, Any], *pods: dict[str, Any], clusters: Any = None, **more: Any
) -> Verdict:
    return verdict(Observed(shown, clusters or [cluster()], list(pods), **more))


def active(status: str = "RUNNING", message: str = "", name: str = "shoal-a") -> dict[str, Any]:
    return {
        "rayClusterName": name,
        "applicationStatuses": {"shoal": {"status": status, "message": message}},
    }


class TestService:
    def test_serves(self) -> None:
        shown = service(READY, IDLE, activeServiceStatus=active(), numServeEndpoints=4)
        result = judge(shown)
        assert (result.state, result.summary) == ("ready", "serving on shoal-a, 4 endpoints")
        assert result.applications == {"shoal": "RUNNING"}

    def test_a_version_the_operator_has_not_seen_is_not_ready(self) -> None:
        result = judge(service(READY, IDLE, generation=4, activeServiceStatus=active()))
        assert (result.state, "has not looked" in result.summary) == ("waiting", True)

    def test_without_any_status(self) -> None:
        bare = {"metadata": {"name": "shoal", "generation": 1}, "spec": {}}
        assert judge(bare, clusters=[]).state == "waiting"

    @pytest.mark.parametrize("reason", ["ValidationFailed", "InitializingTimeout"])
    def test_terminal_reasons_fail_with_the_operators_words(self, reason: str) -> None:
        ready = {"type": "Ready", "status": "False", "reason": reason, "message": "port missing."}
        result = judge(service(ready))
        assert result.state == "failed"
        assert result.summary.startswith(f"{reason}: port missing; ")

    def test_a_refusal_counts_before_the_status_as_a_whole_is_renewed(self) -> None:
        ready = {"type": "Ready", "status": "False", "reason": "ValidationFailed", "message": "no"}
        shown = service(ready | {"observedGeneration": 4}, generation=4)
        assert judge(shown).state == "failed"

    def test_a_refusal_of_an_older_version_does_not_count(self) -> None:
        ready = {"type": "Ready", "status": "False", "reason": "ValidationFailed", "message": "no"}
        assert judge(service(ready, generation=4)).state == "waiting"

    def test_an_upgrade_is_not_ready_although_the_old_cluster_serves(self) -> None:
        upgrading = {"type": "UpgradeInProgress", "status": "True", "reason": "Both"}
        pending = {"rayClusterName": "shoal-b", "applicationStatuses": {}}
        shown = service(
            READY, upgrading, activeServiceStatus=active(), pendingServiceStatus=pending
        )
        result = judge(shown, clusters=[cluster("shoal-a"), cluster("shoal-b")])
        assert (result.state, result.summary) == ("waiting", "upgrading to shoal-b")

    def test_a_rollback_waits(self) -> None:
        shown = service(READY, IDLE, {"type": "RollbackInProgress", "status": "True"})
        assert "rolling back" in judge(shown).summary


class TestApplication:
    def test_a_failed_application_fails_with_the_end_of_rays_traceback(self) -> None:
        trace = "\n".join(
            ["Traceback", *(f"  File {i}" for i in range(30)), "", "OSError: no /models/x"]
        )
        shown = service(STARTING, pendingServiceStatus=active("DEPLOY_FAILED", trace))
        result = judge(shown)
        assert result.state == "failed"
        assert result.causes[0].startswith("application shoal: DEPLOY_FAILED: ")
        assert result.causes[0].endswith("OSError: no /models/x")
        assert len(result.causes[0].splitlines()) == 6

    def test_a_deployment_says_why_it_is_unhealthy(self) -> None:
        app = active("DEPLOYING")
        app["applicationStatuses"]["shoal"]["serveDeploymentStatuses"] = {
            "Experts": {"status": "UNHEALTHY", "message": "CUDA out of memory"}
        }
        result = judge(service(STARTING, pendingServiceStatus=app))
        assert result.state == "waiting"
        assert result.causes == ("shoal/Experts: UNHEALTHY: CUDA out of memory",)

    @pytest.mark.parametrize("status", ["DEPLOYING", "UNHEALTHY"])
    def test_a_ready_service_whose_application_changes_is_not_ready(self, status: str) -> None:
        result = judge(service(READY, IDLE, activeServiceStatus=active(status)))
        assert (result.state, result.summary) == ("waiting", f"application shoal is {status}")

    def test_the_old_clusters_failure_does_not_fail_the_upgrade_that_repairs_it(self) -> None:
        upgrading = {"type": "UpgradeInProgress", "status": "True"}
        shown = service(
            STARTING,
            upgrading,
            activeServiceStatus=active("DEPLOY_FAILED", "old"),
            pendingServiceStatus=active("DEPLOYING", name="shoal-b"),
        )
        assert judge(shown, clusters=[cluster(), cluster("shoal-b")]).state == "waiting"

    def test_progress_names_what_is_not_healthy_yet(self) -> None:
        app = active("DEPLOYING")
        statuses = {"Ingress": "HEALTHY", "Experts": "UPDATING", "Router": "UPDATING"}
        app["applicationStatuses"]["shoal"]["serveDeploymentStatuses"] = {
            name: {"status": status} for name, status in statuses.items()
        }
        shown = progress(judge(service(STARTING, pendingServiceStatus=app)))
        assert shown.text.endswith("experts 0/2; not healthy yet: Experts, Router")


class TestPods:
    def test_unschedulable_says_what_to_do_and_waits_for_a_node(self) -> None:
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        condition |= {"message": "0/3 nodes: 3 Insufficient nvidia.com/gpu. preemption: 0/3"}
        condition |= {"lastTransitionTime": "2020-01-01T00:00:00Z"}  # however long ago
        status = {"phase": "Pending", "conditions": [condition]}
        result = judge(service(STARTING), pod("p", **status))
        assert result.state == "waiting"
        assert result.causes[0].startswith(
            "experts p: Unschedulable: 0/3 nodes: 3 Insufficient nvidia.com/gpu; add GPU nodes"
        )

    @pytest.mark.parametrize(
        ("reason", "says"),
        [
            ("InvalidImageName", "check the image"),
            ("CreateContainerConfigError", "missing Secrets"),
        ],
    )
    def test_a_container_that_cannot_start_fails(self, reason: str, says: str) -> None:
        result = judge(service(STARTING), pod("p", **waiting(reason, "the kubelet's words")))
        assert result.state == "failed"
        assert f"ray-worker: {reason}: the kubelet's words" in result.causes[0]
        assert says in result.causes[0]

    @pytest.mark.parametrize(
        "message", ["x: not found", "pull access denied", "401 Unauthorized", "invalid reference"]
    )
    def test_an_image_that_the_registry_refuses_fails(self, message: str) -> None:
        result = judge(service(STARTING), pod("p", **waiting("ImagePullBackOff", message)))
        assert (result.state, "check the image's name" in result.causes[0]) == ("failed", True)

    @pytest.mark.parametrize(
        ("pulling_s", "state"), [(0, "waiting"), (299, "waiting"), (300, "failed")]
    )
    def test_a_registry_may_be_slow_for_some_minutes(self, pulling_s: float, state: str) -> None:
        slow = pod("p", **waiting("ImagePullBackOff", "dial tcp: i/o timeout"))
        result = judge(service(STARTING), slow, pulling_s={"p": pulling_s})
        assert (result.state, len(result.causes)) == (state, 1)

    def test_out_of_memory(self) -> None:
        status = container(state=OUT_OF_MEMORY)
        result = judge(service(STARTING), pod("p", **status))
        assert result.state == "failed"
        assert "OOMKilled: raise the memory limit" in result.causes[0]

    def test_out_of_memory_of_an_init_container_is_not_the_groups_limit(self) -> None:
        verify = {"name": "verify-model", "image": "shoal:1", "state": OUT_OF_MEMORY}
        (cause,) = judge(service(STARTING), pod("p", initContainerStatuses=[verify])).causes
        assert cause.startswith("experts p: verify-model: OOMKilled: its own limit is too low")

    def test_a_container_that_runs_again_is_no_trouble(self) -> None:
        status = container(lastState=OUT_OF_MEMORY, state={"running": {}}, ready=True)
        result = judge(service(STARTING), pod("p", **status))
        assert (result.state, result.causes) == ("waiting", ())

    def test_an_exit_is_told_with_the_last_words(self) -> None:
        words = "\n".join(f"line {i}" for i in range(20))
        ended = {"terminated": {"reason": "Error", "exitCode": 1, "message": words}}
        verify = {"name": "verify-model", "image": "shoal:1", "state": ended}
        result = judge(service(STARTING), pod("p", initContainerStatuses=[verify]))
        assert result.state == "waiting"  # the operator makes a new pod
        lines = result.causes[0].splitlines()
        assert lines[0] == "experts p: verify-model: exit code 1: line 14"
        assert (lines[-1], len(lines)) == ("line 19", 6)

    def test_pods_with_the_same_trouble_share_a_line(self) -> None:
        pods = [pod(f"p{i}", **waiting("ImagePullBackOff", "no such tag")) for i in range(3)]
        (cause,) = judge(service(STARTING), *pods).causes
        assert cause.startswith("experts p0 and 2 more: ")

    def failed(self, *names: str) -> tuple[dict[str, Any], ...]:
        ended = {"terminated": {"exitCode": 3, "reason": "Error", "message": "no checkpoint"}}
        return tuple(pod(name, phase="Failed", **container(state=ended)) for name in names)

    def test_two_pods_that_failed_may_have_had_bad_luck(self) -> None:
        result = judge(service(STARTING), pod("r"), failed=self.failed("p", "q"))
        assert result.state == "waiting"
        assert result.causes == ("experts q: ray-worker: exit code 3: no checkpoint",)

    def test_three_pods_that_failed_are_a_fault(self) -> None:
        failed = self.failed("p", "q", "r")
        result = judge(service(STARTING), failed[-1], failed=failed)
        (cause,) = result.causes
        assert result.state == "failed"
        assert cause.startswith("experts r: ray-worker: exit code 3: no checkpoint; 3 pods failed")
        assert "shoal k8s logs experts --follow" in cause

    def test_pods_that_failed_in_another_cluster_do_not_count(self) -> None:
        failed = self.failed("p", "q", "r")
        shown = service(STARTING, pendingServiceStatus={"rayClusterName": "shoal-b"})
        result = judge(shown, clusters=[cluster("shoal-b")], failed=failed)
        assert (result.state, result.causes) == ("waiting", ())

    def test_trouble_of_a_service_that_serves_is_told_and_not_fatal(self) -> None:
        shown = service(READY, IDLE, activeServiceStatus=active())
        result = judge(shown, pod("p", **waiting("ImagePullBackOff")))
        assert (result.state, len(result.causes)) == ("ready", 1)

    def test_pods_of_the_last_try_do_not_fail_the_next_one(self) -> None:
        shown = service(STARTING, generation=4)  # repaired, and not looked at yet
        result = judge(shown, pod("p", **waiting("InvalidImageName")))
        assert (result.state, result.causes) == ("waiting", ())

    def test_pods_of_the_old_cluster_and_deleted_ones_do_not_count(self) -> None:
        gone = pod("p", **waiting("InvalidImageName"))
        gone["metadata"]["deletionTimestamp"] = "2026-11-22T11:00:00Z"
        other = pod("q", of="shoal-0", **waiting("InvalidImageName"))
        assert judge(service(STARTING), gone, other).causes == ()

    def test_pods_the_server_refuses(self) -> None:
        failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateWorkerPod"}
        refused = cluster(conditions=[failure | {"message": "no PriorityClass with name x"}])
        result = judge(service(STARTING), clusters=[refused])
        assert (result.state, "no PriorityClass" in result.causes[0]) == ("failed", True)

    def test_a_quota_may_be_raised(self) -> None:
        failure = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: gpus"}
        assert judge(service(STARTING), clusters=[cluster(conditions=[failure])]).state == "waiting"


class TestTiers:
    def test_ready_and_wanted(self) -> None:
        ready = {"conditions": [{"type": "Ready", "status": "True"}]}
        pods = [pod("h", group="headgroup", **ready), pod("a", **ready), pod("b")]
        tiers = {tier.name: tier for tier in judge(service(STARTING), *pods).tiers}
        experts = tiers["experts"]
        assert (tiers["headgroup"].num_ready, tiers["headgroup"].num_wanted) == (1, 1)
        assert (experts.num_ready, experts.num_wanted) == (1, 2)
        assert (experts.min_pods, experts.max_pods) == (2, 6)

    def test_hosts_of_a_unit_are_pods(self) -> None:
        several = cluster()
        several["spec"]["workerGroupSpecs"][0] |= {"numOfHosts": 4, "replicas": 9}
        tier = judge(service(STARTING), clusters=[several]).tiers[1]
        assert (tier.num_wanted, tier.max_pods) == (24, 24)


class TestEvents:
    def event(self, kind: str, name: str, reason: str, message: str) -> dict[str, Any]:
        about = {"kind": kind, "name": name}
        return {"type": "Warning", "involvedObject": about, "reason": reason, "message": message}

    def test_a_volume_that_does_not_mount(self) -> None:
        events = [self.event("Pod", "p", "FailedMount", 'secret "shoal-keys" not found')] * 2
        result = judge(service(STARTING), pod("p"), events=events)
        assert result.causes == ('p: FailedMount: secret "shoal-keys" not found',)

    def test_the_newest_of_several_counts_whatever_their_names(self) -> None:
        old = self.event("Pod", "p", "FailedMount", "old") | {
            "lastTimestamp": "2026-11-22T12:00:00Z"
        }
        new = self.event("Pod", "p", "FailedMount", "new") | {"eventTime": "2026-11-22T12:01:00.5Z"}
        result = judge(service(STARTING), pod("p"), events=[new, old])
        assert result.causes == ("p: FailedMount: new",)

    def test_events_of_other_objects_and_those_a_status_repeats_are_left_out(self) -> None:
        events = [
            self.event("Pod", "stranger", "FailedMount", "x"),
            self.event("Pod", "p", "FailedScheduling", "x"),
        ]
        assert judge(service(STARTING), pod("p"), events=events).causes == ()

    def test_what_may_not_be_read_is_said(self) -> None:
        assert "Events: not permitted" in judge(service(STARTING), hidden=("Events",)).causes[0]
