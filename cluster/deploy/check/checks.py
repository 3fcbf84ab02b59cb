"""The whole check: every object by itself, then the objects together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.deploy.check.application import read_application
from cluster.deploy.check.finding import Finding
from cluster.deploy.check.operator_rules import operator_findings
from cluster.deploy.check.placement import placement_findings
from cluster.deploy.check.pod_rules import metadata_findings, pod_findings
from cluster.deploy.check.ray_cluster import groups
from cluster.deploy.check.ray_pods import (
    cluster_findings,
    file_findings,
    group_findings,
    port_findings,
)
from cluster.deploy.check.references import notes, reference_findings
from cluster.deploy.check.schemas import NEWEST, schema_findings
from cluster.deploy.check.source import Located, shape_faults
from cluster.deploy.check.typed import ray_findings
from cluster.deploy.sizes import ModelSizes


def check_manifests(
    located: Iterable[Located], version: str = NEWEST, sizes: ModelSizes | None = None
) -> list[Finding]:
    """Every mistake in the objects of one deployment, in their order.

    `version`: of Kubernetes, 1.30 to 1.37. `sizes`: of the model, for whether it fits the GPUs;
    None leaves that out. Raises ConfigError where the schemas are not installed.
    """
    found: list[Finding] = []
    sound: list[Located] = []
    for each in located:
        faults = [*each.faults, *([] if each.faults and each.body is None else shape_faults(each))]
        found += faults
        if not faults:
            sound.append(each)
    for each in sound:
        found += schema_findings(each.root, version)
        found += ray_findings(each.root, version)
        found += metadata_findings(each.root["metadata"])
        found += pod_findings(each.root)
        found += operator_findings(each.root)
        if each.kind == "RayService":
            found += _service_findings(each, sizes)
    found += reference_findings(sound)
    return list(dict.fromkeys(found))


def list_notes(located: Iterable[Located]) -> list[Finding]:
    """No mistakes: what the objects name and somebody else has to make, such as Secrets."""
    return notes([each for each in located if not each.faults and not shape_faults(each)])


def _service_findings(located: Located, sizes: ModelSizes | None) -> Iterator[Finding]:
    """What Shoal itself asks of its RayService."""
    root = located.root
    ray_groups = groups(root)
    yield from cluster_findings(root)
    for group in ray_groups:
        yield from group_findings(group)
    app, faults = read_application(root)
    yield from faults
    if app is not None:
        yield from port_findings(app, root, ray_groups)
        yield from file_findings(app, ray_groups)
        yield from placement_findings(app, ray_groups, sizes)
