"""Server-side apply of a whole deployment: everything as a dry run first, then for real."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cluster.deploy.api import FIELD_MANAGER, Cluster, Ref
from cluster.deploy.api_errors import ClusterError, Conflict, Forbidden, Refused, Unreachable
from cluster.deploy.differ import cluster_changes, content
from cluster.deploy.manifest import CLUSTER_SCOPED, Manifest, identity, in_order
from cluster.deploy.scale import SCALE_MANAGER, all_bounds
from cluster.deploy.secrets import SecretSpec

MANAGED_BY = "app.kubernetes.io/managed-by"
INSTANCE = "app.kubernetes.io/instance"
Action = Literal["created", "configured", "unchanged", "deleted", "skipped"]

OPTIONAL_GROUPS = {
    "monitoring.coreos.com": "the Prometheus operator",
    "gateway.networking.k8s.io": "the Gateway API",
    "policy": "policy/v1, which Kubernetes has since 1.21",
}
"""API groups that a cluster may lack, and what brings them."""
MAX_PATHS = 4
"""So many fields are named in one line."""
ADMIN_KINDS = (*CLUSTER_SCOPED, "Role", "RoleBinding")
"""Kinds that an administrator may have made for a user who may not."""
NO_KUBERAY = (
    "this cluster does not know RayServices: install KubeRay 1.7 or newer with "
    "`helm install kuberay-operator kuberay/kuberay-operator`"
)


@dataclass(frozen=True)
class Step:
    """What happened, or in a dry run would happen, to one object. `before` and `after`: as the
    server has it; None if absent or not known."""

    identity: str
    action: Action
    note: str = ""
    before: Manifest | None = None
    after: Manifest | None = None


class ApplyRefused(ClusterError):
    """Some objects would not come out as they should; `problems` has a line for each reason."""

    def __init__(self, problems: list[str], num_conflicts: int) -> None:
        way = "; --force-conflicts takes fields from their owners" if num_conflicts else ""
        super().__init__(f"not applied, for what is listed above{way}")
        self.problems = problems
        self.num_conflicts = num_conflicts


def stamped(manifests: Iterable[Manifest]) -> list[Manifest]:
    """The manifests with the label by which `shoal k8s down` and --prune know their own."""
    return [
        {**each, "metadata": {**each["metadata"], "labels": _stamp(each["metadata"])}}
        for each in manifests
    ]


def _stamp(metadata: dict[str, Any]) -> dict[str, str]:
    return {**(metadata.get("labels") or {}), MANAGED_BY: FIELD_MANAGER}


def apply_all(
    cluster: Cluster,
    manifests: Iterable[Manifest],
    secrets: Iterable[SecretSpec] = (),
    *,
    force: bool = False,
    anyway: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Make the cluster as the manifests say, nothing of it if the server would refuse a part, or
    KubeRay ignore one (but `anyway`). Secrets are made where they are missing. Raises ApplyRefused,
    Unreachable, Refused."""
    steps: list[Step] = []

    def done(step: Step) -> None:
        steps.append(step)
        on_step(step)

    ordered = in_order(manifests)
    namespaces = [each for each in ordered if each["kind"] == "Namespace"]
    rest = [each for each in ordered if each["kind"] != "Namespace"]
    rehearse(cluster, namespaces, force=force)
    for manifest in namespaces:  # in a namespace that does not exist, no dry run is possible
        done(_apply(cluster, manifest, dry_run=False, force=force))
    rehearse(cluster, rest, force=force, anyway=anyway)
    for spec in secrets:
        done(make_secret(cluster, spec))
    for manifest in rest:
        done(_apply(cluster, manifest, dry_run=False, force=force))
    return steps


def make_secret(cluster: Cluster, spec: SecretSpec, *, dry_run: bool = False) -> Step:
    """A Secret with a new random value, unless there is one: its value is never changed."""
    manifest = spec.manifest(spec.new_value())
    name = identity(manifest)
    if cluster.get(Ref.of(manifest)) is not None:
        return Step(name, "unchanged")
    if not dry_run:
        cluster.create(manifest)
    return Step(name, "created", f"random value; {spec.purpose}")


def rehearse(
    cluster: Cluster, manifests: Iterable[Manifest], *, force: bool = False, anyway: bool = False
) -> list[Step]:
    """What apply_all would do, as the server says. Raises ApplyRefused with all problems."""
    steps: list[Step] = []
    problems: list[str] = []
    num_conflicts = 0
    new_namespaces: set[str] = set()
    for manifest in in_order(manifests):
        if manifest["metadata"].get("namespace") in new_namespaces:
            note = "not checked by the server: its namespace is new"
            steps.append(Step(identity(manifest), "created", note, None, manifest))
            continue
        try:
            steps.append(_apply(cluster, manifest, dry_run=True, force=force))
        except Unreachable:
            raise
        except Refused as error:
            problems += explain(identity(manifest), error)
            num_conflicts += len(error.conflicts)
            continue
        if not anyway:
            problems += half_change(steps[-1])
        if manifest["kind"] == "Namespace" and steps[-1].action == "created":
            new_namespaces.add(manifest["metadata"]["name"])
    if problems:
        raise ApplyRefused(problems, num_conflicts)
    return steps


def half_change(step: Step) -> list[str]:
    """A line if KubeRay would take one half of a change and ignore the other."""
    after, before = step.after or {}, step.before or {}
    strategy = (after.get("spec", {}).get("upgradeStrategy") or {}).get("type")
    active = (before.get("status") or {}).get("activeServiceStatus") or {}
    if strategy != "None" or not active.get("rayClusterName"):
        return []
    changes = cluster_changes(step.before, step.after)
    if not changes:
        return []
    more = f" and {len(changes) - MAX_PATHS} more" if len(changes) > MAX_PATHS else ""
    return [
        f"{step.identity}: upgrade.strategy is None: KubeRay would keep the pods of "
        f"{active['rayClusterName']} as they are, give them the new settings and ignore "
        f"{', '.join(changes[:MAX_PATHS])}{more}: `shoal k8s down`, then apply; or "
        "upgrade.strategy: NewCluster; or apply --anyway"
    ]


def explain(subject: str, error: Refused) -> list[str]:
    """A line for each field that somebody else decides, else the server's words."""
    return [f"{subject}: {_conflict(each)}" for each in error.conflicts] or [f"{subject}: {error}"]


def _conflict(conflict: Conflict) -> str:
    if conflict.owner == SCALE_MANAGER:
        return (
            f"{conflict.field}: `shoal k8s scale` has set numbers of pods: "
            "write them into the configuration"
        )
    return f"{conflict.field} belongs to {conflict.owner}"


def _apply(cluster: Cluster, manifest: Manifest, *, dry_run: bool, force: bool) -> Step:
    name = identity(manifest)
    group = manifest["apiVersion"].partition("/")[0]
    if cluster.kind(manifest["apiVersion"], manifest["kind"]) is None:
        if group in OPTIONAL_GROUPS:
            note = f"this cluster lacks {OPTIONAL_GROUPS[group]}"
            return Step(name, "skipped", note)
        if group == "ray.io":
            raise ClusterError(NO_KUBERAY)
    if manifest["kind"] in ADMIN_KINDS:
        return _apply_admins(cluster, manifest, dry_run=dry_run, force=force)
    before = cluster.get(Ref.of(manifest))
    try:
        after = cluster.apply(manifest, dry_run=dry_run, force=force)
    except Refused as error:
        if before is None or not _repeats_a_scale(error, before, manifest):
            raise
        after = cluster.apply(manifest, dry_run=dry_run, force=True)
    return Step(name, _action(before, after), "", before, after)


def _repeats_a_scale(error: Refused, before: Manifest, manifest: Manifest) -> bool:
    """Whether the conflict is only with `shoal k8s scale`, and over numbers that agree by now. The
    list of worker groups has one owner as a whole: without this, a changed image would be refused
    for the number of pods that was set once."""
    owners = {conflict.owner for conflict in error.conflicts}
    return owners == {SCALE_MANAGER} and all_bounds(before) == all_bounds(manifest)


def _apply_admins(cluster: Cluster, manifest: Manifest, *, dry_run: bool, force: bool) -> Step:
    """An object that an administrator may have made for this user."""
    name = identity(manifest)
    before, may_read = None, True
    try:
        before = cluster.get(Ref.of(manifest))
    except Forbidden:
        may_read = False
    try:
        after = cluster.apply(manifest, dry_run=dry_run, force=force)
    except Forbidden as error:
        if before is not None:
            return Step(name, "skipped", "exists, and only an administrator may change it")
        if not may_read:
            return Step(name, "skipped", "an administrator's: you may neither read nor change it")
        raise Forbidden(
            error.status,
            "does not exist, and you may not create it: let an administrator apply it "
            "(`shoal k8s render` prints it) and set admin_objects: false",
        ) from None
    return Step(name, _action(before, after), "", before, after)


def _action(before: Manifest | None, after: Manifest) -> Action:
    if before is None:
        return "created"
    return "unchanged" if content(before) == content(after) else "configured"
