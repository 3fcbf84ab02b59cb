"""Every metric of the system: its name, what it counts, its labels and who tells it.

The vLLM names mean what they mean there, with vLLM's bounds and finer ones below them, so that
boards made for vLLM work. Ray puts `ray_` before each name; /metrics and Ray add labels that say
which worker. Labels take values from sets that this code fixes, never from what clients send.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attention.metrics import STEP_BOUNDS_S
from cluster.errors import TABLE, EngineFailed, MethodNotAllowed
from experts.metrics import HOP_BOUNDS_S

Kind = Literal["counter", "gauge", "histogram"]
MemberRole = Literal["placement", "experts", "router", "attention", "ingress", "controller"]
Bounds = tuple[float, ...]

OTHER = "other"
"""Label value for what is outside its set."""

HOP_PARTS = ("queue", "compute", "wire", "total")
FINISHED_REASONS = ("stop", "length", "abort", "error")

FAILURE_CODES = frozenset(
    ("deadline_exceeded", "engine_error", "experts_unavailable", "internal_error", "no_worker")
)
"""What a request that was admitted can end with."""
_BEYOND = ("below_min", "above_max")
ERROR_CODES = frozenset(
    (
        *(e.default_code for e in TABLE if e not in (EngineFailed, MethodNotAllowed)),
        *(f"{kind}_{end}_value" for kind in ("integer", "decimal") for end in _BEYOND),
        *("array_above_max_length", "string_above_max_length"),
        *("context_length_exceeded", "draining", "duplicate_key", "empty_array"),
        *("invalid_api_key", "invalid_json", "invalid_type", "invalid_unicode", "invalid_utf8"),
        *("missing_required_parameter", "model_not_found", "too_deep", "unknown_parameter"),
        *("unsupported_content_encoding", "unsupported_content_type", "unsupported_parameter"),
        *("unsupported_endpoint",),
    )
)
"""What a request can be refused with before it is admitted."""

QUEUE_BOUNDS = tuple(2**bits / 1e6 for bits in range(4, 25))
"""Seconds: 16 us to 17 s."""
TTFT_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_TIME_BOUNDS = (
    *(0.0005, 0.001, 0.0025, 0.005),  # ours
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_TIME_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2),  # ours
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
NUM_TOKENS_BOUNDS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of series."""

    name: str
    """Of a counter with `_total`, of a histogram without `_bucket`."""
    kind: Kind
    help: str
    roles: tuple[MemberRole, ...]
    """Whose samples have it. controller: Serve's, which tells Ray alone."""
    labels: tuple[str, ...] = ()
    bounds: Bounds = ()
    """Of a histogram."""


class _Of:
    """Makes metrics that members of these roles tell."""

    def __init__(self, *roles: MemberRole, prefix: str, labels: tuple[str, ...] = ()) -> None:
        self._roles = roles
        self._prefix = prefix
        self._labels = labels

    def _make(self, kind: Kind, name: str, text: str, *labels: str, bounds: Bounds = ()) -> Metric:
        all_labels = (*self._labels, *labels)
        return Metric(f"{self._prefix}_{name}", kind, text, self._roles, all_labels, bounds)

    def counter(self, name: str, text: str, *labels: str) -> Metric:
        return self._make("counter", f"{name}_total", text, *labels)

    def gauge(self, name: str, text: str, *labels: str) -> Metric:
        return self._make("gauge", name, text, *labels)

    def histogram(self, name: str, text: str, bounds: Bounds, *labels: str) -> Metric:
        return self._make("histogram", name, text, *labels, bounds=bounds)


_engines = _Of("attention", prefix="vllm", labels=("model_name",))
_requests = _Of("ingress", prefix="vllm", labels=("model_name",))
_ingress = _Of("ingress", prefix="shoal")
_computing = _Of("experts", "attention", prefix="shoal")
_serving = _Of("experts", "router", prefix="shoal")
_experts = _Of("experts", prefix="shoal")
_attention = _Of("attention", prefix="shoal")
_routing = _Of("router", "attention", prefix="shoal")
"""Attention workers route themselves where no router is deployed."""
_placement = _Of("placement", prefix="shoal")
_controller = _Of("controller", prefix="shoal")

METRICS: tuple[Metric, ...] = (
    # vLLM's, of the engines
    _engines.gauge("num_requests_running", "Sequences in the running batch."),
    _engines.gauge("num_requests_waiting", "Sequences that wait for their first step."),
    _engines.gauge("num_requests_swapped", "Always 0: what is preempted is computed again."),
    _engines.gauge("kv_cache_usage_perc", "Part of the cache blocks in use, 0 to 1."),
    _engines.counter(
        "prompt_tokens", "Tokens of the prompts taken in, each prompt once, cached ones included."
    ),
    _engines.counter("generation_tokens", "Tokens generated."),
    _engines.counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    _engines.counter("prefix_cache_hits", "Of these, those found there."),
    _engines.counter("num_preemptions", "Sequences preempted for lack of blocks."),
    # vLLM's, of the requests; all but the gaps between outputs of those that ended well
    _requests.histogram("time_to_first_token_seconds", "To the first token.", TTFT_BOUNDS),
    _requests.histogram(
        "inter_token_latency_seconds", "Between two outputs of a sequence.", TOKEN_TIME_BOUNDS
    ),
    _requests.histogram(
        "request_time_per_output_token_seconds", "Mean of a sequence.", TOKEN_TIME_BOUNDS
    ),
    _requests.histogram("e2e_request_latency_seconds", "To a good end.", REQUEST_TIME_BOUNDS),
    _requests.histogram("request_queue_time_seconds", "Not computing.", REQUEST_TIME_BOUNDS),
    _requests.histogram(
        "request_prefill_time_seconds", "From first step to first token.", REQUEST_TIME_BOUNDS
    ),
    _requests.histogram(
        "request_decode_time_seconds", "From first token to last.", REQUEST_TIME_BOUNDS
    ),
    _requests.histogram("request_prompt_tokens", "Tokens of prompts.", NUM_TOKENS_BOUNDS),
    _requests.histogram("request_generation_tokens", "Tokens of answers.", NUM_TOKENS_BOUNDS),
    _requests.counter("request_success", "Sequences that ended.", "finished_reason"),
    # requests, ours
    _ingress.counter("requests_replayed", "Sequences continued on another attention worker."),
    _ingress.gauge("requests_parked", "Sequences that wait for an attention worker."),
    _ingress.counter("requests_admitted", "Requests taken in, however they end."),
    _ingress.counter("requests_refused", "Requests that were not admitted.", "code"),
    _ingress.counter("requests_failed", "Admitted requests that ended in an error.", "code"),
    _ingress.counter("requests_cancelled", "Requests whose client went away."),
    _ingress.counter(
        "request_expert_seconds", "What requests cost: time that experts computed for them."
    ),
    # workers
    _computing.gauge(
        "worker_busy", "Part of the time spent computing, of an engine in steps, 0 to 1."
    ),
    _attention.counter("worker_requests", "Sequences taken in."),
    _attention.counter(
        "recomputed_tokens", "Computed again, after a preemption or another worker's end."
    ),
    _experts.counter("worker_rows", "Rows computed: (token, expert) pairs."),
    _experts.gauge("worker_rows_per_s", "Rows, (token, expert) pairs, computed a second."),
    _experts.counter("worker_batches", "Batches computed."),
    _serving.gauge("worker_waiting_batches", "Batches that wait for their turn."),
    _experts.histogram("worker_queue_seconds", "Batches' waits for their turn.", QUEUE_BOUNDS),
    _experts.counter("worker_refusals", "Batches not computed.", "reason"),
    _experts.gauge("experts_held", "(layer, expert) pairs that can be computed."),
    _attention.histogram("step_seconds", "Steps of the engine.", STEP_BOUNDS_S),
    _attention.counter("step_errors", "Steps that failed, or waited for experts in vain."),
    # hops
    _routing.histogram(
        "hop_seconds",
        "Hops to expert workers: in its queue, computing, else.",
        HOP_BOUNDS_S,
        "part",
    ),
    _routing.counter("hop_faults", "Hops without a usable answer.", "fault"),
    _routing.counter("hedges", "Batches sent to another holder as well."),
    _routing.counter("resent_pairs", "(token, expert) pairs sent again."),
    _routing.counter("holder_waits", "Waits for an expert that nobody held."),
    _attention.counter("router_failovers", "Changes of the router."),
    _serving.counter(
        "frame_errors", "Frames refused, by the field at fault; peers without the secret.", "field"
    ),
    _serving.counter("channel_bytes", "Bytes of the data plane, in and out.", "direction"),
    # the cluster
    _placement.gauge("replicas_wanted", "By command, by load or as configured.", "tier"),
    _placement.gauge("replicas_present", "Workers that a tier has.", "tier"),
    _placement.gauge("placement_epoch", "Grows when the holders of experts change."),
    _placement.gauge("placement_ready", "1 while all is there that requests need."),
    _placement.counter("expert_moves", "Slots changed by rebalancing."),
    _placement.counter("worker_deaths", "Workers gone unasked.", "role"),
    _placement.gauge(
        "layer_imbalance", "Rows of a layer's busiest worker over their mean; 1 is even.", "layer"
    ),
    _placement.gauge(
        "expert_rows_per_s", "Rows, (token, expert) pairs, a second of the busiest experts.", "rank"
    ),
    _placement.gauge("expert_rank_layer", "Layer of the expert of a rank, -1: none.", "rank"),
    _placement.gauge("expert_rank_expert", "Id of the expert of a rank, -1: none.", "rank"),
    # told by Serve's controller, to Ray only
    _controller.counter(
        "scaling_decisions", "Decisions of the autoscaling policies.", "deployment", "cause"
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}


def series_of(metric: Metric) -> tuple[str, ...]:
    """The names that its samples have."""
    if metric.kind == "histogram":
        return tuple(f"{metric.name}_{part}" for part in ("bucket", "sum", "count"))
    return (metric.name,)


METRIC_OF = {name: metric for metric in METRICS for name in series_of(metric)}
"""By the name of a sample."""
