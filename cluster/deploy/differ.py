"""Whether two versions of an object differ in what somebody wants, and how: pure."""

from __future__ import annotations

import difflib
import hashlib
from typing import Any

import yaml

BOOKKEEPING = (
    "creationTimestamp",
    "generation",
    "managedFields",
    "resourceVersion",
    "selfLink",
    "uid",
)
"""Metadata that the server keeps. A resourceVersion may change although nothing else did."""


def content(obj: dict[str, Any] | None) -> dict[str, Any]:
    """The object without status and bookkeeping; {} for None."""
    if obj is None:
        return {}
    kept = {key: value for key, value in obj.items() if key != "status"}
    metadata = {k: v for k, v in kept.get("metadata", {}).items() if k not in BOOKKEEPING}
    return {**kept, "metadata": metadata}


def unified_diff(identity: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """What changes, as a unified diff of YAML; empty when nothing does. Values of Secrets are
    shown as fingerprints."""
    lines = difflib.unified_diff(
        _lines(before), _lines(after), f"live/{identity}", f"new/{identity}", lineterm=""
    )
    return "\n".join(lines)


def cluster_changes(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[str]:
    """Fields in which two RayServices want different clusters: KubeRay builds a new one for any
    change of it but that of the numbers of workers, which it ignores."""
    return [] if before is None or after is None else _paths(_unbounded(before), _unbounded(after))


def settings_differ(before: dict[str, Any] | None, after: dict[str, Any] | None) -> bool:
    """Whether a live RayService gets another serveConfigV2, which KubeRay hands to its cluster."""
    given = [(each or {}).get("spec", {}).get("serveConfigV2") for each in (before, after)]
    return before is not None and given[0] != given[1]


def _unbounded(service: dict[str, Any]) -> dict[str, Any]:
    cluster = service["spec"].get("rayClusterConfig") or {}
    bounds = ("replicas", "minReplicas", "maxReplicas")
    groups = [
        {key: value for key, value in group.items() if key not in bounds}
        for group in cluster.get("workerGroupSpecs") or []
    ]
    return {**cluster, "workerGroupSpecs": groups}


def _paths(before: Any, after: Any, path: str = "") -> list[str]:
    """Of the values that differ; items of lists by their names."""
    if before == after:
        return []
    old, new = _entries(before), _entries(after)
    if old is None or new is None:
        return [path]
    keys = dict.fromkeys([*old, *new])
    return [each for key in keys for each in _paths(old.get(key), new.get(key), path + key)]


def _entries(value: Any) -> dict[str, Any] | None:
    """Parts by what they add to a path; None for a plain value."""
    if isinstance(value, dict):
        return {f".{key}": item for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        names = [item.get("groupName", item.get("name", i)) for i, item in enumerate(value)]
        return {f"[{name}]": item for name, item in zip(names, value, strict=True)}
    return None


def _lines(obj: dict[str, Any] | None) -> list[str]:
    shown = content(obj)
    if not shown:
        return []
    if shown.get("kind") == "Secret":
        shown = {
            **shown,
            **{key: _masked(shown[key]) for key in ("data", "stringData") if shown.get(key)},
        }
    return yaml.safe_dump(shown, sort_keys=True, width=100).splitlines()


def _masked(values: dict[str, str]) -> dict[str, str]:
    digest = {key: hashlib.sha256(value.encode()).hexdigest() for key, value in values.items()}
    return {key: f"(sha256 {text[:8]})" for key, text in digest.items()}
