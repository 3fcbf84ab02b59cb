"""What earlier looks at a deployment showed, and one look alone does not tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.deploy.manifest import Manifest
from cluster.deploy.pod_causes import group_of, has_failed, is_ready, lacks_image
from cluster.deploy.verdict import Observed, current_status, is_current

SETTLE_S = 10.0
"""KubeRay notes a new generation beside the applications' old statuses, submits the new settings
only then, and looks again some two seconds later."""


class History:
    """Memory of one Follower; `now_s` comes from its clock."""

    def __init__(self, is_change: bool) -> None:
        """`is_change`: the application's settings have just been changed."""
        self._failed: dict[str, Manifest] = {}
        self._pulling_since: dict[str, float] = {}
        self._is_settled = not is_change
        self._first: tuple[float, Any] | None = None

    def note_pods(self, pods: Iterable[Manifest], now_s: float) -> None:
        """Pods as they are, or were before they went."""
        for pod in pods:
            uid = pod["metadata"]["uid"]
            if has_failed(pod):
                self._failed[uid] = pod
            elif is_ready(pod):
                self._forget(pod)
            if lacks_image(pod):
                self._pulling_since.setdefault(uid, now_s)
            else:
                self._pulling_since.pop(uid, None)

    def failed(self) -> tuple[Manifest, ...]:
        """Pods that failed, and none of their group has been ready since."""
        return tuple(self._failed.values())

    def pulling_s(self, now_s: float) -> dict[str, float]:
        """By uid: for so long an image has not come."""
        return {uid: now_s - since for uid, since in self._pulling_since.items()}

    def is_settled(self, seen: Observed, now_s: float) -> bool:
        """Whether the statuses of applications can be those of the new settings: they have changed
        since the operator noted the generation, or SETTLE_S have passed."""
        if not self._is_settled and is_current(seen.service):
            current = current_status(seen.service)
            applications = current.get("applicationStatuses") or {}
            statuses = {name: app.get("status") for name, app in applications.items()}
            shown = (current.get("rayClusterName"), statuses)
            self._first = self._first or (now_s, shown)
            since, first = self._first
            self._is_settled = shown != first or now_s - since >= SETTLE_S
        return self._is_settled

    def _forget(self, ready: Manifest) -> None:
        """Failures of the group before one of its pods got ready."""
        place = _place(ready)
        self._failed = {uid: pod for uid, pod in self._failed.items() if _place(pod) != place}


def _place(pod: Manifest) -> tuple[str, str]:
    return pod["metadata"]["labels"].get("ray.io/cluster", ""), group_of(pod)
