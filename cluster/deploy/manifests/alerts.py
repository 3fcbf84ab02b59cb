"""When to call somebody: alert rules for Prometheus, and what to do then.

The rules hold for one deployment, whose series `Scope` chooses: by the PodMonitor's job on
Kubernetes, by Ray's own job name on a machine without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.deploy.manifests.alerting import Alert, Scope
from cluster.deploy.manifests.board_lines import missing, replicas
from cluster.deploy.manifests.promql import EXPERT_WORKERS
from cluster.deploy.manifests.traffic_alerts import hops, requests
from cluster.deploy.sections import AlertLimits

BLIND_CAUSES = ("error", "unknown")
"""Of scaling decisions that hold the size for want of knowledge."""
UNHEALTHY = 2
"""Status of a deployment of Serve some of whose replicas died or hang: no start, no redeploy."""
WEIGHTLESS = ("Ingress", "Placement", "Router")
"""Deployments that start in seconds."""
BLIND_SHARE = 0.5
DEATHS_IN_15_MIN = 3
BUSY = 0.7


def rule_groups(name: str, scope: Scope, limits: AlertLimits) -> dict[str, Any]:
    """A rule file of Prometheus, and the spec of a PrometheusRule."""
    return {"groups": [{"name": name, "rules": [each.rule for each in alerts(scope, limits)]}]}


def alerts(scope: Scope, limits: AlertLimits) -> list[Alert]:
    """All of them; names are unique."""
    return [
        *_cluster(scope),
        *_readiness(scope, limits),
        *_workers(scope, limits),
        *requests(scope, limits),
        *hops(scope, limits),
    ]


def _cluster(scope: Scope) -> Iterator[Alert]:
    q = scope.over("5m")
    wanted, healthy = replicas(q, deployment=WEIGHTLESS)
    yield Alert(
        "ShoalHeadDown",
        f"absent(up{{{scope.head}}} == 1) and on() {scope.was_ready}",
        "5m",
        "critical",
        "Ray's head does not answer",
        "Requests go on, but nothing is scaled or replaced until it is back.",
        "look at the head's pod or process; with gcs-redis it comes back with its state, without"
        " it the whole cluster starts anew.",
    )
    yield Alert(
        "ShoalTierEmpty",
        f"{wanted} > 0 unless on (deployment) {healthy} > 0 and on() {scope.was_ready}",
        "5m",
        "critical",
        "{{ $labels.deployment }} has no healthy replica",
        "It loads no weights, so that it should be there within seconds. Requests need it.",
        "`shoal k8s status` or Ray's dashboard says why replicas do not start; the last lines of"
        " their logs name the cause.",
    )
    yield Alert(
        "ShoalNoPlacement",
        f"absent({q.max('shoal_placement_epoch')}) and on() {scope.was_ready}",
        "5m",
        "critical",
        "Placement tells nothing",
        "Nobody knows who holds which expert: workers that live go on with the last table, new ones"
        " cannot join.",
        "Serve starts it again by itself; look at the log of its replica, and whether the metrics"
        " of its node are scraped at all.",
    )


def _readiness(scope: Scope, limits: AlertLimits) -> Iterator[Alert]:
    start = f"{limits.start_s}s"
    q = scope.over(start)
    ready = q.max("shoal_placement_ready")
    died = q.increase("shoal_worker_deaths_total")  # as far as the Placement of now has seen it
    status = q.min("serve_deployment_status", application="shoal")
    yield Alert(
        "ShoalOutage",
        f"{ready} == 0 and on() ({died} > 0 or {status} == {UNHEALTHY})",
        "2m",
        "critical",
        "Workers died, and those that are left cannot serve",
        "Experts without a holder, no router or no attention worker: requests wait, then fail.",
        "`shoal status` names what is missing; see ShoalWorkersMissing for why it does not come"
        " back.",
    )
    yield Alert(
        "ShoalNotReady",
        f"absent({ready} == 1)",
        start,
        "critical",
        "Not all is there that requests need",
        f"For {start}, longer than a start takes: experts without a holder, no router, no attention"
        " worker, or no cluster at all.",
        "`shoal status` names what is missing; more expert workers, or more slots a worker, make"
        " room for experts.",
    )


def _workers(scope: Scope, limits: AlertLimits) -> Iterator[Alert]:
    start = f"{limits.start_s}s"
    q, recent = scope.over("15m"), scope.over("5m")
    decided = recent.increase("shoal_scaling_decisions_total", "deployment")
    blind = recent.increase("shoal_scaling_decisions_total", "deployment", cause=BLIND_CAUSES)
    busy = q.mean("shoal_worker_busy", worker_id=EXPERT_WORKERS)
    wanted, present = (q.max(f"shoal_replicas_{what}", "tier") for what in ("wanted", "present"))
    yield Alert(
        "ShoalWorkersMissing",
        f"{missing(q)} > 0",
        start,
        "warning",
        "{{ $value }} replicas of {{ $labels.deployment }} are wanted and not there",
        "They do not start: no node has room, an image or a checkpoint is missing, or they fail.",
        "`shoal k8s status` and `shoal k8s check --live` name the cause; without Kubernetes, Ray's"
        " dashboard.",
    )
    yield Alert(
        "ShoalWorkersDoNotJoin",
        f"{wanted} - {present} > 0 unless on() {missing(q)} > 0",
        start,
        "warning",
        "{{ $value }} workers of the tier {{ $labels.tier }} run and do not join",
        "Serve counts them as healthy, Placement does not know them: no work goes to them.",
        "their logs say why their line to Placement breaks: another cluster's secret, a network"
        " rule, another version.",
    )
    yield Alert(
        "ShoalScalingBlind",
        f"{blind} / {decided} > {BLIND_SHARE}",
        start,
        "warning",
        "{{ $labels.deployment }} keeps its size",
        "Its workers do not report their load, or the policy fails; the size is held meanwhile.",
        "the log of Serve's controller says which; `shoal scale` sets a size by hand.",
    )
    yield Alert(
        "ShoalWorkersDie",
        f"{q.increase('shoal_worker_deaths_total', 'role')} > {DEATHS_IN_15_MIN}",
        "0m",
        "critical",
        "{{ $labels.role }} workers die again and again",
        f"More than {DEATHS_IN_15_MIN} in 15 minutes. Each is replaced and its requests are"
        " replayed, but a cause that stays will reach the last one.",
        "the logs of dead replicas (Ray's dashboard, `shoal k8s logs`): out of memory, a GPU's"
        " fault, or one request that kills them.",
    )
    yield Alert(
        "ShoalImbalance",
        f"{q.max('shoal_layer_imbalance')} > 2 and on() {busy} > {BUSY}",
        "30m",
        "warning",
        "A layer's busiest expert worker has more than twice the mean",
        "Every token waits for it, while the pool is busy on the whole.",
        "look at /experts; `shoal experts rebalance` at once, more redundancy for replicas of the"
        " hot experts.",
    )
