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


def only_bounds_differ(before: dict[str, Any] | None, after: dict[str, Any] | None) -> bool:
    """Whether two RayServices want the same cluster: KubeRay builds a new one for any other change
    of it, and ignores a change of the numbers of workers."""
    return before is not None and after is not None and _unbounded(before) == _unbounded(after)


def _unbounded(service: dict[str, Any]) -> dict[str, Any]:
    cluster = service["spec"].get("rayClusterConfig") or {}
    bounds = ("replicas", "minReplicas", "maxReplicas")
    groups = [
        {key: value for key, value in group.items() if key not in bounds}
        for group in cluster.get("workerGroupSpecs") or []
    ]
    return {**cluster, "workerGroupSpecs": groups}


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
