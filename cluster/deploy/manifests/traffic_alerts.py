"""When to call somebody for what requests and hops meet."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.deploy.manifests.alerting import Alert, Scope
from cluster.deploy.manifests.promql import NoneOf
from cluster.deploy.sections import AlertLimits

OVERLOAD_CODES = ("server_overloaded", "model_loading", "draining")
"""Of requests that were refused for want of room."""
UNSERVED_CODES = ("no_worker", "experts_unavailable", "deadline_exceeded")
"""Of requests that were admitted and then found no worker, no holder of an expert, or no time."""
OWN_FAULT_CODES = ("engine_error", "internal_error")
HARMFUL_FAULTS = ("lost", "malformed", "failed", "not_finite")
"""Of hops; the others are answers of a worker that is busy, late, or gives up experts."""
STRANGERS = ("auth", "handshake")
HARMLESS_FIELDS = (*STRANGERS, "handler", "truncated")
"""Of frame errors: no members, failures of our own code (logged), connections of the dead."""
UNSERVED_SHARE = 0.05
CACHE_FULL = 0.95
HEDGED_SHARE, FAILED_HOPS_SHARE = 0.1, 0.01
STRANGERS_IN_5_MIN = 20


def requests(scope: Scope, limits: AlertLimits) -> Iterator[Alert]:
    """Of those that clients send."""
    q = scope.over("5m")
    refused = q.rate("shoal_requests_refused_total", code=OVERLOAD_CODES)
    lost = q.rate("shoal_requests_failed_total", code=UNSERVED_CODES)
    unserved = f"({refused} + {lost}) / ({refused} + {q.rate('shoal_requests_admitted_total')})"
    failed, stopped = (
        q.increase(f"shoal_requests_{how}_total", "code", code=OWN_FAULT_CODES)
        for how in ("failed", "refused")
    )
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
        "ShoalRequestsUnserved",
        f"{unserved} > {UNSERVED_SHARE} and on() {scope.was_ready}",
        "5m",
        "warning",
        "{{ $value | humanizePercentage }} of requests are not served",
        "For want of room, of workers, of experts or of time; clients are told when to come back.",
        "codes are on the faults board: server_overloaded asks for attention workers or a larger"
        " cache, deadline_exceeded for speed, the others for the tier that is down.",
    )
    yield Alert(
        "ShoalRequestsFail",
        f"{failed} > 0 or {stopped} > 0",
        "0m",
        "critical",
        "Requests fail with {{ $labels.code }}",
        "Through no fault of their clients.",
        "search the logs for their request ids; report it with the traceback.",
    )
    yield Alert(
        "ShoalRequestsParked",
        f"{q.sum('shoal_requests_parked')} > 0 and on() {scope.was_ready}",
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


def hops(scope: Scope, limits: AlertLimits) -> Iterator[Alert]:
    """Of what routers send to expert workers, and of the frames that arrive."""
    q = scope.over("5m")
    answered = q.count("shoal_hop_seconds", part="total")
    hedged = f"{q.rate('shoal_hedges_total')} / {answered}"
    faults = q.rate("shoal_hop_faults_total", fault=HARMFUL_FAULTS)
    damaged = q.increase("shoal_frame_errors_total", "field", field=NoneOf(HARMLESS_FIELDS))
    strangers = q.increase("shoal_frame_errors_total", field=STRANGERS)
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
        f"{faults} / ({faults} + {answered}) > {FAILED_HOPS_SHARE}",
        "15m",
        "warning",
        "{{ $value | humanizePercentage }} of hops fail",
        "Each is sent again, so that nobody notices but by the time it takes.",
        "the faults board says how: lost asks for a look at the network, the others at the logs of"
        " expert workers. One death gives a burst and no alert.",
    )
    yield Alert(
        "ShoalFramesDamaged",
        f"{damaged} > 0",
        "0m",
        "warning",
        "Damaged frames: {{ $labels.field }}",
        "A member sent what is no frame: memory or network change bytes, or versions differ.",
        "the log of the worker names the peer; look at that node's memory and network.",
    )
    yield Alert(
        "ShoalStrangers",
        f"{strangers} > {STRANGERS_IN_5_MIN}",
        "0m",
        "warning",
        "Someone who is no member tries to connect",
        "A scan, or a worker with another cluster's secret.",
        "the log of the worker names the peer; check who can reach its port.",
    )
