"""Bounds of a worker group while it runs.

KubeRay copies minReplicas and maxReplicas into the RayCluster when it makes one, and ignores later
changes of them in the RayService: both objects must be changed.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.config import ConfigError
from cluster.deploy.api import Cluster, Ref
from cluster.deploy.api_errors import ClusterError, NotFound, Refused
from cluster.deploy.check.application import read_application
from cluster.deploy.check.finding import Finding
from cluster.deploy.check.placement import placement_findings
from cluster.deploy.check.ray_cluster import groups
from cluster.deploy.check.source import Located
from cluster.deploy.follow import ORIGIN_LABEL
from cluster.deploy.manifest import Manifest

SCALE_MANAGER = "shoal-scale"
"""Field manager of these changes: an apply that would undo them says so."""
ATTEMPTS = 5
MAX_PODS = 1024


@dataclass(frozen=True)
class Bounds:
    """Numbers of pods of a group."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Change:
    """Of one group in one object."""

    identity: str
    group: str
    before: Bounds
    after: Bounds


def parse_bounds(text: str) -> Bounds:
    """`3`, or `2-6`: at least two pods, at most six. Raises ConfigError."""
    numbers = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text, re.ASCII)
    if numbers is None:
        raise ConfigError(f"{text}: expected a number of pods, or two as in 2-6")
    low = int(numbers[1])
    high = int(numbers[2] or low)
    if not 1 <= low <= high <= MAX_PODS:
        raise ConfigError(f"{text}: expected 1 to {MAX_PODS} pods, the smaller number first")
    return Bounds(low, high)


def empty_pods(service: Manifest, group: str, bounds: Bounds) -> list[Finding]:
    """What `check` would say about a RayService with these bounds: pods without a replica, which
    never become ready."""
    changed = copy.deepcopy(service)
    changed["spec"]["rayClusterConfig"]["workerGroupSpecs"][_find(changed, group)[0]] |= {
        "minReplicas": bounds.low,
        "maxReplicas": bounds.high,
    }
    root = Located(f"{service['kind']}/{service['metadata']['name']}", changed).root
    app, _ = read_application(root)
    found = placement_findings(app, groups(root), None) if app else ()
    return [each for each in found if each.path.endswith(".minReplicas")]


def scale(cluster: Cluster, service: Ref, group: str, bounds: Bounds) -> list[Change]:
    """Set the bounds in the RayService and in its RayClusters. Raises ConfigError if one of them
    does not exist, ClusterError if they keep changing."""
    clusters = [Ref.of(each) for each in _clusters(cluster, service)]
    return [_patch(cluster, ref, group, bounds) for ref in (service, *clusters)]


def copy_bounds(cluster: Cluster, service: Manifest) -> list[Change]:
    """Set the bounds that a RayService names in its RayClusters, where they differ."""
    wanted = all_bounds(service)
    return [
        _patch(cluster, Ref.of(each), group["groupName"], wanted[group["groupName"]])
        for each in _clusters(cluster, Ref.of(service))
        for group in _groups(each)
        if wanted.get(group["groupName"], _bounds(group)) != _bounds(group)
    ]


def all_bounds(obj: Manifest) -> dict[str, Bounds]:
    """By worker group, of a RayService or a RayCluster."""
    return {group["groupName"]: _bounds(group) for group in _groups(obj)}


def serve_bounds(service: Manifest, tier: str) -> Bounds | None:
    """How many workers the application itself keeps in a tier; None if it does not say."""
    applications = yaml.safe_load(service["spec"].get("serveConfigV2") or "")
    applications = (applications or {}).get("applications") or [{}]
    settings = (applications[0].get("args") or {}).get(tier) or {}
    scaling = settings.get("scaling")
    if scaling is not None:
        return Bounds(scaling.get("min_workers", 1), scaling.get("max_workers", 8))
    fixed = settings.get("num_workers")
    return Bounds(fixed, fixed) if fixed is not None else None


def _clusters(cluster: Cluster, service: Ref) -> list[Manifest]:
    label = f"{ORIGIN_LABEL}={service.name}"
    return cluster.select("ray.io/v1", "RayCluster", service.namespace, label)


def _patch(cluster: Cluster, ref: Ref, group: str, bounds: Bounds) -> Change:
    """Try again when the object changes between reading and writing."""
    error: ClusterError | None = None
    for _ in range(ATTEMPTS):
        live = cluster.get(ref)
        if live is None:
            raise ConfigError(f"{ref} does not exist in namespace {ref.namespace}: apply first")
        index, before = _find(live, group)
        path = "/spec" if ref.kind == "RayCluster" else "/spec/rayClusterConfig"
        path = f"{path}/workerGroupSpecs/{index}"
        operations: list[dict[str, Any]] = [
            {"op": "test", "path": f"{path}/groupName", "value": group},
            {"op": "add", "path": f"{path}/minReplicas", "value": bounds.low},
            {"op": "add", "path": f"{path}/maxReplicas", "value": bounds.high},
        ]
        try:
            cluster.json_patch(ref, operations, SCALE_MANAGER)
            return Change(str(ref), group, before, bounds)
        except NotFound:
            raise
        except Refused as refused:
            if refused.status not in (409, 422):  # changed meanwhile, or the test failed
                raise
            error = refused
    raise ClusterError(f"{ref}: still refused after {ATTEMPTS} attempts: {error}")


def _find(live: Manifest, group: str) -> tuple[int, Bounds]:
    groups = _groups(live)
    for index, each in enumerate(groups):
        if each["groupName"] == group:
            return index, _bounds(each)
    names = ", ".join(each["groupName"] for each in groups)
    raise ConfigError(
        f"{group}: no such worker group in {live['metadata']['name']}, it has {names}"
    )


def _groups(live: Manifest) -> list[dict[str, Any]]:
    spec = live["spec"].get("rayClusterConfig", live["spec"])
    groups: list[dict[str, Any]] = spec.get("workerGroupSpecs") or []
    return groups


def _bounds(group: dict[str, Any]) -> Bounds:
    return Bounds(group.get("minReplicas") or 0, group.get("maxReplicas") or 0)
