"""A pretend scheduler and kubelet: the status that pods get, also when something is wrong."""

from __future__ import annotations

from collections.abc import Callable

from tests.k8s.api_server.errors import Json

STARTED = "2026-11-22T12:00:00Z"
LOG = "".join(f"line {number}\n" for number in range(20))

PodFault = Callable[[Json], Json]
"""The status of a pod that has the fault."""


def running(pod: Json, is_ready: bool) -> Json:
    statuses = [
        _container(c, {"running": {"startedAt": STARTED}}, is_ready)
        for c in pod["spec"]["containers"]
    ]
    return {
        "phase": "Running",
        "podIP": "127.0.0.1",
        "startTime": STARTED,
        "conditions": [_condition("PodScheduled", True), _condition("Ready", is_ready)],
        "containerStatuses": statuses,
    }


def unschedulable(pod: Json) -> Json:
    """No node has room; what lacks is taken from the pod's limits."""
    limits = pod["spec"]["containers"][0].get("resources", {}).get("limits") or {"cpu": "1"}
    lacking = "nvidia.com/gpu" if "nvidia.com/gpu" in limits else next(iter(limits))
    message = (
        f"0/5 nodes are available: 5 Insufficient {lacking}. preemption: 0/5 nodes are "
        "available: 5 No preemption victims found for incoming pod."
    )
    condition = _condition("PodScheduled", False, "Unschedulable", message)
    condition["lastTransitionTime"] = pod["metadata"]["creationTimestamp"]
    return {"phase": "Pending", "conditions": [condition]}


def image_missing(pod: Json) -> Json:
    """The registry does not have the image."""
    image = pod["spec"]["containers"][0]["image"]
    message = f'Back-off pulling image "{image}": ErrImagePull: {image}: not found'
    return _waiting(pod, "ImagePullBackOff", message)


def crashing(pod: Json) -> Json:
    """The container ends with an error; its last lines are its message."""
    return _ended(pod, {"exitCode": 1, "reason": "Error", "message": f"{LOG}OSError: no model\n"})


def out_of_memory(pod: Json) -> Json:
    """The kernel killed the container."""
    return _ended(pod, {"exitCode": 137, "reason": "OOMKilled"})


def _ended(pod: Json, how: Json) -> Json:
    """With restartPolicy Never, which autoscaler v2 brings, the pod is over with its container."""
    first, *others = pod["spec"]["containers"]
    ended = _container(first, {"terminated": {**how, "finishedAt": STARTED}}, is_ready=False)
    rest = [_container(c, {"running": {"startedAt": STARTED}}, True) for c in others]
    return {
        "phase": "Failed",
        "conditions": [_condition("PodScheduled", True), _condition("Ready", False)],
        "containerStatuses": [ended, *rest],
    }


def _waiting(pod: Json, reason: str, message: str) -> Json:
    state = {"waiting": {"reason": reason, "message": message}}
    container = pod["spec"]["containers"][0]
    return {
        "phase": "Pending",
        "conditions": [_condition("PodScheduled", True), _condition("Ready", False)],
        "containerStatuses": [_container(container, state, is_ready=False)],
    }


def _container(container: Json, state: Json, is_ready: bool) -> Json:
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "ready": is_ready,
        "restartCount": 0,
        "state": state,
        "lastState": {},
    }


def _condition(kind: str, holds: bool, reason: str = "", message: str = "") -> Json:
    condition = {"type": kind, "status": str(holds)}
    return condition | ({"reason": reason, "message": message} if reason else {})
