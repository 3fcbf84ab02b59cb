"""What events say about a deployment that no status repeats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.deploy.pod_causes import is_ready


def event_causes(
    events: list[dict[str, Any]], cluster_name: str, pods: list[dict[str, Any]]
) -> Iterator[str]:
    """Warnings that no status repeats: volumes that do not mount, objects that are refused."""
    waiting = {pod["metadata"]["name"] for pod in pods if not is_ready(pod)}
    newest: dict[tuple[str, str], str] = {}
    for event in sorted(events, key=_last_seen):
        about = event.get("involvedObject", {})
        is_ours = about.get("name") in (waiting if about.get("kind") == "Pod" else {cluster_name})
        if is_ours and _tells_more(event):
            newest[about["name"], event["reason"]] = " ".join(event.get("message", "").split())
    for (name, reason), message in newest.items():
        yield f"{name}: {reason}: {message}"


def _last_seen(event: dict[str, Any]) -> str:
    """Events come in the order of their names. New ones have eventTime, old ones lastTimestamp."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((str(time) for time in times if time), "")


def _tells_more(event: dict[str, Any]) -> bool:
    reason = event.get("reason", "")
    return reason.startswith("Failed") and reason not in ("Failed", "FailedScheduling")
