"""What state a deployment is in and why: a pure function of what the API server shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.deploy.event_causes import event_causes
from cluster.deploy.pod_causes import HEAD_GROUP, Cause, group_of, is_ready, pod_causes, tail

State = Literal["ready", "waiting", "failed"]

TERMINAL_REASONS = {
    "ValidationFailed": "correct the configuration and apply again",
    "InitializingTimeout": "`shoal k8s down`, raise the initializing timeout and apply again",
}
"""Reasons of the Ready condition after which the operator does nothing more, and what to do."""

MAX_FAILED_PODS = 3
"""So many pods of a group that failed, and none got ready: the next one will fail as well."""


@dataclass(frozen=True)
class Observed:
    """Objects of one deployment as read from the API server, and what is remembered of them; of
    events the warnings only. `hidden`: kinds we may not read."""

    service: dict[str, Any]
    clusters: list[dict[str, Any]] = field(default_factory=list)
    pods: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    hidden: tuple[str, ...] = ()
    pods_version: str = ""
    """Of the list of pods."""
    failed: tuple[dict[str, Any], ...] = ()
    """Pods that failed, the last one last, and none of their group has been ready since."""
    pulling_s: Mapping[str, float] = field(default_factory=dict)
    """By uid: for so long a pod's image has not come."""
    is_settled: bool = True
    """False: the applications' statuses may be those from before the last change of settings."""


@dataclass(frozen=True)
class Tier:
    """Pods of one worker group; `wanted` is what the autoscaler asks for now."""

    name: str
    num_ready: int
    num_wanted: int
    min_pods: int
    max_pods: int


@dataclass(frozen=True)
class Verdict:
    """`summary` is one line; `causes` may have several lines each, the most telling first."""

    state: State
    summary: str
    causes: tuple[str, ...] = ()
    tiers: tuple[Tier, ...] = ()
    applications: dict[str, str] = field(default_factory=dict)
    unfinished: tuple[str, ...] = ()
    """Deployments that are not HEALTHY yet."""


def verdict(seen: Observed) -> Verdict:
    """Judge the newest cluster of the service: the pending one while an upgrade runs."""
    current = current_status(seen.service)
    cluster = _current_cluster(seen, current)
    pods = _pods_of(cluster, seen.pods)
    state, summary = _state(seen, current, cluster)
    causes: list[str] = []
    if is_current(seen.service):  # else pods and applications are those of the last try
        troubles = [*_refused_pods(cluster), *_pod_troubles(seen, cluster, pods)]
        if seen.is_settled:
            causes += _application_causes(current)
        causes += _grouped(troubles)
        if state != "ready":
            causes += event_causes(seen.events, _name(cluster), pods)
        if state == "waiting" and any(cause.fatal for cause in troubles):
            state, summary = "failed", "a pod cannot run"
    causes += (f"{kind}: not permitted to read them; ask for the right" for kind in seen.hidden)
    return Verdict(
        state,
        summary,
        tuple(causes),
        tuple(_tiers(cluster, pods)),
        {name: app.get("status", "") for name, app in _applications(current).items()},
        tuple(_unfinished(current)),
    )


# ---- the service


def _state(
    seen: Observed, current: dict[str, Any], cluster: dict[str, Any] | None
) -> tuple[State, str]:
    service = seen.service
    conditions = {each["type"]: each for each in service.get("status", {}).get("conditions") or []}
    ready = conditions.get("Ready", {})
    reason, message = ready.get("reason", ""), ready.get("message", "")
    if "deletionTimestamp" in service["metadata"]:
        return "waiting", "is being deleted"
    if not is_current(service):
        return "waiting", "the KubeRay operator has not looked at this version yet"
    if reason in TERMINAL_REASONS:
        return "failed", f"{reason}: {message.rstrip('.')}; {TERMINAL_REASONS[reason]}"
    if not seen.is_settled:
        return "waiting", "the KubeRay operator hands the new settings to Ray"
    for name, app in _applications(current).items():
        if app.get("status") == "DEPLOY_FAILED":
            return "failed", f"application {name}: DEPLOY_FAILED"
    if conditions.get("RollbackInProgress", {}).get("status") == "True":
        return "waiting", "rolling back to the version that served before"
    if conditions.get("UpgradeInProgress", {}).get("status") == "True":
        return "waiting", f"upgrading to {_name(cluster)}"
    for name, app in _applications(current).items():
        if app.get("status") != "RUNNING":  # a new serveConfigV2 on a cluster that stays Ready
            return "waiting", f"application {name} is {app.get('status', 'unknown')}"
    if ready.get("status") == "True":
        endpoints = service["status"].get("numServeEndpoints", 0)
        return "ready", f"serving on {_name(cluster)}, {endpoints} endpoints"
    return "waiting", f"{reason}: {message}".strip(": ") or "no status from the operator yet"


def is_current(service: dict[str, Any]) -> bool:
    """Whether the status speaks of the spec as it is now. A refused spec is noted in the
    condition before the status as a whole."""
    status = service.get("status", {})
    noted = [each.get("observedGeneration", 0) for each in status.get("conditions") or []]
    judged = max([status.get("observedGeneration", 0), *noted])
    return bool(judged >= service["metadata"].get("generation", 0))


def current_status(service: dict[str, Any]) -> dict[str, Any]:
    """Status of the cluster that is being built, else of the one that serves."""
    status = service.get("status", {})
    pending: dict[str, Any] = status.get("pendingServiceStatus") or {}
    if pending.get("rayClusterName") or pending.get("applicationStatuses"):
        return pending
    return status.get("activeServiceStatus") or {}


# ---- the application


def _applications(current: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return current.get("applicationStatuses") or {}


def _application_causes(current: dict[str, Any]) -> Iterator[str]:
    """Ray's own words about applications and deployments that failed."""
    for name, app in _applications(current).items():
        deployments = (app.get("serveDeploymentStatuses") or {}).items()
        for what, entry in [
            (f"application {name}", app),
            *((f"{name}/{d}", s) for d, s in deployments),
        ]:
            if entry.get("status") in ("DEPLOY_FAILED", "UNHEALTHY"):
                yield f"{what}: {entry['status']}: {tail(entry.get('message', ''))}"


def _unfinished(current: dict[str, Any]) -> Iterator[str]:
    for app in _applications(current).values():
        for name, entry in (app.get("serveDeploymentStatuses") or {}).items():
            if entry.get("status") != "HEALTHY":
                yield name


# ---- clusters and pods


def _current_cluster(seen: Observed, current: dict[str, Any]) -> dict[str, Any] | None:
    by_name = {cluster["metadata"]["name"]: cluster for cluster in seen.clusters}
    named = by_name.get(current.get("rayClusterName", ""))
    return named or (seen.clusters[-1] if seen.clusters else None)


def _name(cluster: dict[str, Any] | None) -> str:
    return cluster["metadata"]["name"] if cluster else "a new cluster"


def _pods_of(
    cluster: dict[str, Any] | None, pods: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    if cluster is None:
        return []
    name = cluster["metadata"]["name"]
    return [pod for pod in pods if pod["metadata"].get("labels", {}).get("ray.io/cluster") == name]


def _refused_pods(cluster: dict[str, Any] | None) -> Iterator[Cause]:
    """Pods that the API server did not let the operator create."""
    for condition in ((cluster or {}).get("status") or {}).get("conditions") or []:
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            message = condition.get("message", "")
            is_quota = "exceeded quota" in message
            text = f"{condition.get('reason', 'ReplicaFailure')}: {message}"
            yield Cause("pods", "", text, fatal=not is_quota)


def _pod_troubles(
    seen: Observed, cluster: dict[str, Any] | None, pods: list[dict[str, Any]]
) -> Iterator[Cause]:
    """Of pods that are there, and of the last one of each group that failed."""
    failed: dict[str, list[dict[str, Any]]] = {}
    for pod in _pods_of(cluster, seen.failed):
        failed.setdefault(group_of(pod), []).append(pod)
    for group, those in failed.items():
        yield from _failures(group, those)
    told = {_uid(pod) for pod in seen.failed}
    for pod in pods:
        if _uid(pod) not in told:
            yield from pod_causes(pod, seen.pulling_s.get(_uid(pod), 0))


def _failures(group: str, failed: list[dict[str, Any]]) -> Iterator[Cause]:
    """Why the last pod of a group failed; fatal if it is one of many."""
    name = failed[-1]["metadata"]["name"]
    for cause in pod_causes(failed[-1]) or [Cause(group, name, "Failed: no reason given")]:
        if len(failed) < MAX_FAILED_PODS:
            yield cause
            continue
        again = f"{len(failed)} pods failed one after the other, and the next one will"
        read = f"`shoal k8s logs {group} --follow` reads it while it lives"
        yield Cause(group, name, f"{cause.text}; {again}: {read}", fatal=True)


def _uid(pod: dict[str, Any]) -> str:
    return str(pod["metadata"].get("uid", pod["metadata"]["name"]))


def _grouped(causes: Iterable[Cause]) -> Iterator[str]:
    """One line for all pods of a group with the same trouble."""
    pods: dict[tuple[str, str], list[str]] = {}
    for cause in causes:
        pods.setdefault((cause.group, cause.text), []).append(cause.pod)
    for (group, text), names in pods.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{group} {names[0]}".strip() + f"{more}: {text}"


def _tiers(cluster: dict[str, Any] | None, pods: list[dict[str, Any]]) -> Iterator[Tier]:
    if cluster is None:
        return
    yield _tier(HEAD_GROUP, pods, {"replicas": 1, "minReplicas": 1, "maxReplicas": 1})
    for group in cluster["spec"].get("workerGroupSpecs") or []:
        yield _tier(group["groupName"], pods, group)


def _tier(name: str, pods: list[dict[str, Any]], group: dict[str, Any]) -> Tier:
    hosts = group.get("numOfHosts") or 1
    low, high = group.get("minReplicas") or 0, group.get("maxReplicas") or 0
    wanted = min(max(group.get("replicas") or 0, low), high)
    num_ready = sum(group_of(pod) == name and is_ready(pod) for pod in pods)
    return Tier(name, num_ready, wanted * hosts, low * hosts, high * hosts)
