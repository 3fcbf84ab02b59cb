"""When to call somebody: alert rules for Prometheus, and what to do then.

The rules hold for one deployment, whose series `Scope` chooses: by the PodMonitor's job on
Kubernetes, by Ray's own job name on a machine without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.deploy.manifests.alerting import Alert, Scope
from cluster.deploy.manifests.promql import EXPERT_WORKERS
from cluster.deploy.sections import AlertLimits

OVERLOAD_CODES = (
    *("server_overloaded", "model_loading", "draining"),
    *("no_worker", "experts_unavailable", "directory_unreachable"),
)
OWN_FAULT_CODES = ("engine_error", "internal_error")
BLIND_CAUSES = ("error", "unknown")
"""Of scaling decisions that hold the size for want of knowledge."""
REFUSED_SHARE = 0.05
DEATHS_IN_15_MIN = 3
BUSY, CACHE_FULL = 0.7, 0.95
HEDGED_SHARE = 0.1


def rule_groups(name: str, scope: Scope, limits: AlertLimits) -> dict[str, Any]:
    """A rule file of Prometheus, and the spec of a PrometheusRule."""
    return {"groups": [{"name": name, "rules": [each.rule for each in alerts(scope, limits)]}]}


def alerts(scope: Scope, limits: AlertLimits) -> list[Alert]:
    """All of them; names are unique."""
    return [*_cluster(scope), *_workers(scope), *_requests(scope, limits), *_hops(scope, limits)]


def _cluster(scope: Scope) -> Iterator[Alert]:
    q = scope.over("15m")
    healthy = q.sum("serve_deployment_replica_healthy", "deployment", application="shoal")
    undecided = q.increase(
        "shoal_scaling_decisions_total", "deployment", cause=("error", "unknown")
    )
    yield Alert(
        "ShoalHeadDown",
        f"absent(up{{{scope.head}}} == 1)",
        "5m",
        "critical",
        "Ray's head does not answer",
        "Requests go on, but nothing is scaled or replaced until it is back.",
        "look at the head's pod or process; with gcs-redis it comes back with its state, without"
        " it the whole cluster starts anew.",
    )
    yield Alert(
        "ShoalTierEmpty",
        f"{healthy} == 0",
        "2m",
        "critical",
        "{{ $labels.deployment }} has no healthy replica",
        "Requests wait for one, then fail.",
        "`shoal k8s status` or Ray's dashboard says why replicas do not start; the last lines of"
        " their logs name the cause.",
    )
    yield Alert(
        "ShoalNoPlacement",
        f"absent({q.max('shoal_placement_epoch')})",
        "5m",
        "critical",
        "Placement tells nothing",
        "Nobody knows who holds which expert: workers that live go on with the last table, new ones"
        " cannot join.",
        "Serve starts it again by itself; look at the log of its replica, and whether the metrics"
        " of its node are scraped at all.",
    )
    yield Alert(
        "ShoalNotReady",
        f"{q.max('shoal_placement_ready')} == 0",
        "2m",
        "critical",
        "Not all is there that requests need",
        "Experts without a holder, no router or no attention worker: requests wait.",
        "`shoal status` names what is missing; more expert workers, or more slots a worker, make"
        " room for experts.",
    )
    yield Alert(
        "ShoalScalingBlind",
        f"{undecided} > 0",
        "15m",
        "warning",
        "{{ $labels.deployment }} keeps its size",
        "Its workers do not report their load, or the policy fails; the size is held meanwhile.",
        "the log of Serve's controller says which; `shoal scale` sets a size by hand.",
    )


def _workers(scope: Scope) -> Iterator[Alert]:
    q = scope.over("15m")
    wanted, present = (q.max(f"shoal_replicas_{what}", "tier") for what in ("wanted", "present"))
    busy = q.mean("shoal_worker_busy", worker_id=EXPERT_WORKERS)
    yield Alert(
        "ShoalWorkersMissing",
        f"{wanted} - {present} > 0",
        "15m",
        "warning",
        "{{ $value }} workers of {{ $labels.tier }} are wanted and not there",
        "They do not start: no node has room, an image or a checkpoint is missing, or they fail.",
        "`shoal k8s status` and `shoal k8s check --live` name the cause; without Kubernetes, Ray's"
        " dashboard.",
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


def _requests(scope: Scope, limits: AlertLimits) -> Iterator[Alert]:
    q = scope.over("5m")
    refused = q.rate("shoal_requests_refused_total", code=OVERLOAD_CODES)
    asked = f"({refused} + {q.rate('vllm_request_success_total')} or {refused})"
    failed = q.increase("shoal_requests_failed_total", "code", code=OWN_FAULT_CODES)
    waiting, cache = q.sum("vllm_num_requests_waiting"), q.mean("vllm_kv_cache_usage_perc")
    yield Alert(
        "ShoalFirstTokenSlow",
        f"{q.quantile(0.99, 'vllm_time_to_first_token_seconds')} > {limits.first_token_s:g}",
        "10m",
        "warning",
        "The slowest hundredth waits {{ $value | humanizeDuration }} for its first token",
        f"More than {limits.first_token_s:g} s: queues are long, or prompts are.",
        "the board's queue and prefill times say which; more attention workers shorten both.",
    )
    yield Alert(
        "ShoalTokensSlow",
        f"{q.quantile(0.99, 'vllm_inter_token_latency_seconds')} > {limits.token_gap_s:g}",
        "10m",
        "warning",
        "The slowest hundredth of tokens takes {{ $value | humanizeDuration }}",
        f"More than {limits.token_gap_s:g} s between tokens: readers see streams stutter.",
        "steps (shoal_step_seconds) or hops (shoal_hop_seconds) are slow: the board's Busy panel"
        " says which tier is too small.",
    )
    yield Alert(
        "ShoalRequestsRefused",
        f"{refused} / {asked} > {REFUSED_SHARE}",
        "5m",
        "warning",
        "{{ $value | humanizePercentage }} of requests are refused",
        "For want of room or of workers; clients are told when to come back.",
        "codes are on the faults board: server_overloaded asks for attention workers or a larger"
        " cache, the others for the tier that is down.",
    )
    yield Alert(
        "ShoalRequestsFail",
        f"{failed} > 0",
        "0m",
        "critical",
        "Requests fail with {{ $labels.code }}",
        "They were admitted and then failed, through no fault of their clients.",
        "search the logs for their request ids; report it with the traceback.",
    )
    yield Alert(
        "ShoalRequestsParked",
        f"{q.sum('shoal_requests_parked')} > 0",
        "2m",
        "warning",
        "{{ $value }} sequences wait for an attention worker",
        "Theirs died and no other one can take them.",
        "see ShoalWorkersMissing; they go on by themselves when a worker comes.",
    )
    yield Alert(
        "ShoalCacheFull",
        f"{cache} > {CACHE_FULL} and on() {waiting} > 0",
        "10m",
        "warning",
        "The KV cache is full and sequences wait",
        "They wait for room, and running ones are preempted and computed again.",
        "more attention workers (`shoal scale attention N`), a larger kv_cache_bytes, or shorter"
        " contexts.",
    )


def _hops(scope: Scope, limits: AlertLimits) -> Iterator[Alert]:
    q = scope.over("5m")
    hedged = f"{q.rate('shoal_hedges_total')} / {q.count('shoal_hop_seconds', part='total')}"
    yield Alert(
        "ShoalHopsSlow",
        f"{q.quantile(0.99, 'shoal_hop_seconds', part='total')} > {limits.hop_s:g}",
        "10m",
        "warning",
        "The slowest hundredth of hops takes {{ $value | humanizeDuration }}",
        f"More than {limits.hop_s:g} s, and each layer waits for its slowest hop.",
        "the experts board divides it into queue (too few workers), compute (a slow node) and wire"
        " (the network).",
    )
    yield Alert(
        "ShoalHedging",
        f"{hedged} > {HEDGED_SHARE}",
        "15m",
        "warning",
        "{{ $value | humanizePercentage }} of hops go to a second holder, too",
        "Some worker answers much later than it used to, again and again.",
        "find it by its busy share and queue on the experts board; `shoal experts drain` takes it"
        " out of service.",
    )
    yield Alert(
        "ShoalHopsFail",
        f"{q.increase('shoal_hop_faults_total', 'fault')} > 0",
        "15m",
        "warning",
        "Hops fail all the time: {{ $labels.fault }}",
        "Each is sent again, so that nobody notices but by the time it takes.",
        "one death gives a burst and no alert; what lasts is a worker that answers wrongly, or a"
        " network that loses connections.",
    )
    yield Alert(
        "ShoalFramesDamaged",
        f"{q.increase('shoal_frame_errors_total', 'field')} > 0",
        "0m",
        "warning",
        "Damaged frames: {{ $labels.field }}",
        "Someone who is no member tries to connect (handshake), or memory or network change bytes.",
        "the log of the worker names the peer; check who can reach its port.",
    )
