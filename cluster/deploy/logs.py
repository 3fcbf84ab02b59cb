"""Logs of a tier's pods side by side, each line with its pod's name."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from cluster.config import ConfigError
from cluster.deploy.api import Cluster, Ref
from cluster.deploy.api_errors import ClusterError
from cluster.deploy.pod_causes import HEAD_GROUP, group_of

PODS_PERIOD_S = 5.0
"""While following, new pods are looked for so often."""

Line = tuple[str, str]
"""Name of the pod, and a line of its log."""


def show_logs(
    cluster: Cluster, pods: list[dict[str, Any]], tail_lines: int | None
) -> Iterator[Line]:
    """What there is, pod by pod. A pod that has no log yet says so."""
    for pod in pods:
        yield from _lines(cluster, pod, speaker(pod), tail_lines=tail_lines)


def follow_logs(
    cluster: Cluster,
    find_pods: Callable[[], list[dict[str, Any]]],
    tail_lines: int | None,
    wait_s: float = PODS_PERIOD_S,
) -> Iterator[Line]:
    """Lines of all pods as they come, also of pods that appear later; without an end."""
    lines: queue.Queue[Line] = queue.Queue()
    followed: set[tuple[str, str]] = set()
    while True:
        for pod in find_pods():
            container = speaker(pod)
            log = (pod["metadata"]["uid"], container)
            if log not in followed and _has_started(pod, container):
                followed.add(log)
                _follow(cluster, pod, container, tail_lines, lines)
        try:
            yield lines.get(timeout=wait_s)
            while True:
                yield lines.get_nowait()
        except queue.Empty:
            pass


def named_pods(pods: list[dict[str, Any]], tier: str | None) -> list[dict[str, Any]]:
    """As `pods_of_tier`. Raises ConfigError if there is none."""
    if chosen := pods_of_tier(pods, tier):
        return chosen
    groups = sorted({group_of(pod) for pod in pods})
    have = f"pods there are of {', '.join(groups)}" if groups else "there are no pods at all"
    raise ConfigError(f"no pods of tier {tier or 'any'}: {have}; see `shoal k8s status`")


def pods_of_tier(pods: list[dict[str, Any]], tier: str | None) -> list[dict[str, Any]]:
    """Those of a group in the order of their names; None: all."""
    group = HEAD_GROUP if tier == "head" else tier
    chosen = [pod for pod in pods if group in (None, group_of(pod))]
    return sorted(chosen, key=lambda pod: str(pod["metadata"]["name"]))


def speaker(pod: dict[str, Any]) -> str:
    """The init container that runs or has failed, else Ray's; what follows Ray's are sidecars."""
    for each in (pod.get("status") or {}).get("initContainerStatuses") or []:
        state = each.get("state") or {}
        if "running" in state or (state.get("terminated") or {}).get("exitCode"):
            return str(each["name"])
    return _ray_container(pod)


def _ray_container(pod: dict[str, Any]) -> str:
    return str(pod["spec"]["containers"][0]["name"])


def _follow(
    cluster: Cluster,
    pod: dict[str, Any],
    container: str,
    tail_lines: int | None,
    lines: queue.Queue[Line],
) -> None:
    def read() -> None:
        for line in _lines(cluster, pod, container, tail_lines=tail_lines, follow=True):
            lines.put(line)

    # daemon: the wait for the next line cannot be interrupted otherwise
    threading.Thread(target=read, name=f"log of {pod['metadata']['name']}", daemon=True).start()


def _lines(cluster: Cluster, pod: dict[str, Any], container: str, **options: Any) -> Iterator[Line]:
    ref = Ref("v1", "Pod", pod["metadata"]["name"], pod["metadata"]["namespace"])
    try:
        for line in cluster.log(ref, container, **options):
            yield ref.name, line
    except ClusterError as error:
        yield ref.name, f"(no log: {error})"


def _has_started(pod: dict[str, Any], container: str) -> bool:
    phase = (pod.get("status") or {}).get("phase")
    return container != _ray_container(pod) or phase in ("Running", "Succeeded", "Failed")
