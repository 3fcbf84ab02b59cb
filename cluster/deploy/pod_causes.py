"""Why a pod does not run, and what to do about it: a pure function of the pod."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

HEAD_GROUP = "headgroup"
"""What KubeRay calls the group of the head."""
UNSCHEDULABLE_PATIENCE = timedelta(minutes=10)
"""A cluster autoscaler needs minutes to bring a GPU node; a pod that waits longer waits in vain."""

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
    "CrashLoopBackOff": "read why it died: `shoal k8s logs --previous`",
}
"""Reasons for which a container waits without an end, and what to do."""

TRANSIENT = {"ErrImagePull"}
"""Reasons the kubelet tries again at once; the second failure has another name."""


@dataclass(frozen=True)
class Cause:
    """One thing that is wrong. `fatal`: waiting longer will not help."""

    group: str
    pod: str
    text: str
    fatal: bool = False


def pod_causes(pod: dict[str, Any], now: datetime) -> list[Cause]:
    """What keeps the pod from running; empty for a pod that runs, starts or is being deleted."""
    if "deletionTimestamp" in pod["metadata"]:
        return []
    group = group_of(pod)
    name = pod["metadata"]["name"]
    return [Cause(group, name, text, fatal) for text, fatal in _problems(pod, now)]


def group_of(pod: dict[str, Any]) -> str:
    """The worker group a pod belongs to."""
    return str((pod["metadata"].get("labels") or {}).get("ray.io/group", ""))


def is_ready(pod: dict[str, Any]) -> bool:
    return any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for condition in pod.get("status", {}).get("conditions") or []
    )


def _problems(pod: dict[str, Any], now: datetime) -> Iterator[tuple[str, bool]]:
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            yield _unschedulable(condition, now)
    if status.get("phase") == "Failed" and "reason" in status:  # Evicted, OutOfnvidia.com/gpu, ...
        yield f"{status['reason']}: {_one_line(status.get('message', ''))}", False
    kinds = ("initContainerStatuses", "containerStatuses")
    for container in (each for kind in kinds for each in status.get(kind) or []):
        yield from _container_problems(container)


def _unschedulable(condition: dict[str, Any], now: datetime) -> tuple[str, bool]:
    message = _one_line(condition.get("message", "")).partition(" preemption:")[0].rstrip(".")
    hints = dict.fromkeys(hint for piece, hint in SCHEDULING_HINTS.items() if piece in message)
    text = "; ".join([f"Unschedulable: {message}", *hints])
    since = condition.get("lastTransitionTime")
    waited = now - datetime.fromisoformat(since) if since else timedelta()
    return text, waited > UNSCHEDULABLE_PATIENCE


def _container_problems(container: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    name = container["name"]
    ended = _termination(container)
    if ended.get("reason") == "OOMKilled":
        yield (
            f"{name}: OOMKilled: raise the memory limit of this group, or lower what it holds",
            True,
        )
        return
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason = waiting.get("reason", "")
    if reason in WAITING_HINTS:
        message = _one_line(waiting.get("message") or container.get("image", ""))
        if "exitCode" in ended:  # more telling than how long the kubelet will wait
            message = f"exit code {ended['exitCode']}"
        yield f"{name}: {reason}: {message}; {WAITING_HINTS[reason]}", reason not in TRANSIENT
    elif (container.get("state") or {}).get("terminated") and ended.get("exitCode"):
        message = _one_line(ended.get("message") or ended.get("reason") or "")
        yield f"{name}: exit code {ended['exitCode']}: {message}", False


def _termination(container: dict[str, Any]) -> dict[str, Any]:
    """How the container ended last; empty if it never did."""
    for state in ("state", "lastState"):
        ended: dict[str, Any] | None = (container.get(state) or {}).get("terminated")
        if ended:
            return ended
    return {}


def _one_line(text: str) -> str:
    return " ".join(text.split())
