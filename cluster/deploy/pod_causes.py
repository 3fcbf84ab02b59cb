"""Why a pod does not run, and what to do about it: a pure function of the pod."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HEAD_GROUP = "headgroup"
"""What KubeRay calls the group of the head."""
PULL_PATIENCE_S = 300.0
"""A registry may be slow or away so long."""
NO_SUCH_IMAGE = ("not found", "unauthorized", "denied", "invalid")
"""Words of a registry for which it makes no sense to ask it again."""
TAIL_LINES = 6

SCHEDULING_HINTS = {
    "Insufficient nvidia.com/gpu": "add GPU nodes, or ask for fewer GPUs or workers",
    "Insufficient memory": "lower the pod's memory or add larger nodes",
    "Insufficient cpu": "lower the pod's CPUs or add larger nodes",
    "node affinity/selector": "compare the group's nodeSelector with `kubectl get nodes -L`",
    "untolerated taint": "add a toleration for that taint to the group",
    "persistentvolumeclaim": "check the claim and its StorageClass: `kubectl get pvc`",
    "PersistentVolumeClaims": "check the claim and its StorageClass: `kubectl get pvc`",
    "topology spread constraints": "free nodes in the other racks or zones, or relax the spread",
}
"""What to do, by a piece of the scheduler's message."""

IMAGE_HINT = "check the image's name and tag, and the pull secret"
WAITING_HINTS = {
    "ErrImagePull": IMAGE_HINT,
    "ImagePullBackOff": IMAGE_HINT,
    "InvalidImageName": IMAGE_HINT,
    "CreateContainerConfigError": "`shoal k8s apply` creates missing Secrets; check their names",
    "CreateContainerError": "check the container's volumes, command and security context",
    "RunContainerError": "check the container's command and the node's device plugin",
}
"""Reasons for which a container waits without an end, and what to do."""

PULLS = ("ErrImagePull", "ImagePullBackOff")
OUT_OF_MEMORY = "raise the memory limit of this group, or lower what it holds"
OUT_OF_MEMORY_AT_START = "its own limit is too low for this model: report it"


@dataclass(frozen=True)
class Cause:
    """One thing that is wrong. `fatal`: waiting longer will not help."""

    group: str
    pod: str
    text: str
    fatal: bool = False


def pod_causes(pod: dict[str, Any], pulling_s: float = 0) -> list[Cause]:
    """What keeps the pod from running; empty for a pod that runs, starts or is being deleted.
    `pulling_s`: for so long its image has not come."""
    if "deletionTimestamp" in pod["metadata"]:
        return []
    group = group_of(pod)
    name = pod["metadata"]["name"]
    return [Cause(group, name, text, fatal) for text, fatal in _problems(pod, pulling_s)]


def group_of(pod: dict[str, Any]) -> str:
    """The worker group a pod belongs to."""
    return str((pod["metadata"].get("labels") or {}).get("ray.io/group", ""))


def is_ready(pod: dict[str, Any]) -> bool:
    return any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for condition in pod.get("status", {}).get("conditions") or []
    )


def has_failed(pod: dict[str, Any]) -> bool:
    """Whether it is over by itself. With autoscaler v2 pods are never restarted: KubeRay deletes
    one that has failed at once, and makes another."""
    is_over = (pod.get("status") or {}).get("phase") == "Failed"
    return is_over and "deletionTimestamp" not in pod["metadata"]


def lacks_image(pod: dict[str, Any]) -> bool:
    """Whether a container waits for its image after a failed try."""
    return any(_waiting(each).get("reason") in PULLS for each, _ in _containers(pod))


def tail(message: str) -> str:
    """The last lines, where programs and Ray say what was wrong."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    return "\n".join(lines[-TAIL_LINES:])


def _problems(pod: dict[str, Any], pulling_s: float) -> Iterator[tuple[str, bool]]:
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            yield _unschedulable(condition), False  # a node may come after any time
    if status.get("phase") == "Failed" and "reason" in status:  # Evicted, OutOfnvidia.com/gpu, ...
        yield f"{status['reason']}: {_one_line(status.get('message', ''))}", False
    for container, is_init in _containers(pod):
        yield from _container_problems(container, is_init, pulling_s)


def _containers(pod: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Statuses, and whether it is an init container."""
    status = pod.get("status") or {}
    yield from ((each, True) for each in status.get("initContainerStatuses") or [])
    yield from ((each, False) for each in status.get("containerStatuses") or [])


def _unschedulable(condition: dict[str, Any]) -> str:
    message = _one_line(condition.get("message", "")).partition(" preemption:")[0].rstrip(".")
    hints = dict.fromkeys(hint for piece, hint in SCHEDULING_HINTS.items() if piece in message)
    return "; ".join([f"Unschedulable: {message}", *hints])


def _container_problems(
    container: dict[str, Any], is_init: bool, pulling_s: float
) -> Iterator[tuple[str, bool]]:
    name = container["name"]
    ended = (container.get("state") or {}).get("terminated") or {}
    reason = _waiting(container).get("reason", "")
    if ended.get("reason") == "OOMKilled":
        hint = OUT_OF_MEMORY_AT_START if is_init else OUT_OF_MEMORY
        yield f"{name}: OOMKilled: {hint}", True
    elif ended.get("exitCode"):
        message = tail(ended.get("message") or ended.get("reason") or "")
        yield f"{name}: exit code {ended['exitCode']}: {message}", False
    elif reason in WAITING_HINTS:
        message = _one_line(_waiting(container).get("message") or container.get("image", ""))
        fatal = reason not in PULLS or _is_hopeless(message) or pulling_s >= PULL_PATIENCE_S
        yield f"{name}: {reason}: {message}; {WAITING_HINTS[reason]}", fatal


def _waiting(container: dict[str, Any]) -> dict[str, Any]:
    return (container.get("state") or {}).get("waiting") or {}


def _is_hopeless(message: str) -> bool:
    return any(words in message.lower() for words in NO_SUCH_IMAGE)


def _one_line(text: str) -> str:
    return " ".join(text.split())
