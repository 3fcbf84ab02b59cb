"""Every metric of the system: its name, what it counts, its labels and who tells it.

The vLLM names mean what they mean there, with vLLM's bounds and finer ones below them, so that
boards made for vLLM work. Ray puts `ray_` before each name; /metrics and Ray add labels that say
which worker. Labels take values from sets that this code fixes, never from what clients send.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
MemberRole = Literal["placement", "experts", "router", "attention", "ingress"]

MAX_SAMPLES = 512
"""Of a member."""
MAX_LAYERS = 128
TOP_EXPERTS = 16
OTHER = "other"
"""Label value for what is outside its set."""

HOP_PARTS = ("queue", "compute", "wire", "total")
FINISHED_REASONS = ("stop", "length", "abort", "error")

HOP_BOUNDS = tuple(m * 10.0**e for e in range(-5, 1) for m in (1.0, 2.5, 5.0)) + (10.0,)
STEP_BOUNDS = tuple(b for b in HOP_BOUNDS if b >= 1e-4)
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
    """Whose samples have it."""
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    """Of a histogram."""


def _of_attention(name: str, kind: Kind, text: str) -> Metric:
    return Metric(f"vllm_{name}", kind, text, ("attention",), ("model_name",))


def _of_requests(
    name: str, text: str, bounds: tuple[float, ...], labels: tuple[str, ...] = ()
) -> Metric:
    kind: Kind = "histogram" if bounds else "counter"
    return Metric(f"vllm_{name}", kind, text, ("ingress",), ("model_name", *labels), bounds)


_COMPUTING: tuple[MemberRole, ...] = ("experts", "attention")
_ROUTING: tuple[MemberRole, ...] = ("router", "attention")
"""Attention workers route themselves where no router is deployed."""

METRICS: tuple[Metric, ...] = (
    # vLLM's, of the engines
    _of_attention("num_requests_running", "gauge", "Sequences in the running batch."),
    _of_attention("num_requests_waiting", "gauge", "Sequences that wait for their first step."),
    _of_attention("num_requests_swapped", "gauge", "Always 0: preempted sequences recompute."),
    _of_attention("kv_cache_usage_perc", "gauge", "Part of the cache blocks in use, 0 to 1."),
    _of_attention("prompt_tokens_total", "counter", "Prompt tokens, those of shared blocks too."),
    _of_attention("generation_tokens_total", "counter", "Tokens generated."),
    _of_attention("prefix_cache_queries_total", "counter", "Tokens looked up in the prefix cache."),
    _of_attention("prefix_cache_hits_total", "counter", "Tokens found in the prefix cache."),
    _of_attention("num_preemptions_total", "counter", "Sequences preempted for lack of blocks."),
    # vLLM's, of the requests
    _of_requests("time_to_first_token_seconds", "From arrival to the first token.", TTFT_BOUNDS),
    _of_requests(
        "inter_token_latency_seconds", "Between outputs of a sequence.", TOKEN_TIME_BOUNDS
    ),
    _of_requests(
        "request_time_per_output_token_seconds",
        "Mean time between a request's tokens after its first.",
        TOKEN_TIME_BOUNDS,
    ),
    _of_requests("e2e_request_latency_seconds", "From arrival to the end.", REQUEST_TIME_BOUNDS),
    _of_requests(
        "request_queue_time_seconds", "In an attention worker's queue.", REQUEST_TIME_BOUNDS
    ),
    _of_requests(
        "request_prefill_time_seconds", "From first step to first token.", REQUEST_TIME_BOUNDS
    ),
    _of_requests("request_decode_time_seconds", "From first token to last.", REQUEST_TIME_BOUNDS),
    _of_requests("request_prompt_tokens", "Prompt tokens of a request.", NUM_TOKENS_BOUNDS),
    _of_requests("request_generation_tokens", "Tokens made for a request.", NUM_TOKENS_BOUNDS),
    _of_requests("request_success_total", "Sequences that ended.", (), ("finished_reason",)),
    # requests, ours
    Metric(
        "shoal_requests_replayed_total", "counter", "Sequences continued elsewhere.", ("ingress",)
    ),
    Metric(
        "shoal_requests_parked",
        "gauge",
        "Sequences that wait for an attention worker.",
        ("ingress",),
    ),
    Metric(
        "shoal_requests_refused_total", "counter", "Requests not admitted.", ("ingress",), ("code",)
    ),
    Metric(
        "shoal_requests_failed_total",
        "counter",
        "Admitted requests that failed.",
        ("ingress",),
        ("code",),
    ),
    Metric(
        "shoal_requests_cancelled_total",
        "counter",
        "Requests whose client went away.",
        ("ingress",),
    ),
    Metric(
        "shoal_request_expert_seconds_total",
        "counter",
        "What requests cost: time that expert workers computed for them.",
        ("ingress",),
    ),
    # workers
    Metric("shoal_worker_busy", "gauge", "Part of the time spent computing, 0 to 1.", _COMPUTING),
    Metric("shoal_worker_rows_total", "counter", "Token rows computed.", ("experts",)),
    Metric("shoal_worker_rows_per_s", "gauge", "Token rows computed a second.", ("experts",)),
    Metric("shoal_worker_batches_total", "counter", "Batches computed.", ("experts",)),
    Metric(
        "shoal_worker_waiting_batches", "gauge", "Batches that wait for their turn.", ("experts",)
    ),
    Metric(
        "shoal_worker_queue_seconds",
        "histogram",
        "How long batches waited for their turn.",
        ("experts",),
        bounds=QUEUE_BOUNDS,
    ),
    Metric(
        "shoal_worker_refusals_total",
        "counter",
        "Batches not computed: overloaded or draining (refused), without the expert (not_here).",
        ("experts",),
        ("reason",),
    ),
    Metric(
        "shoal_experts_held", "gauge", "(layer, expert) pairs that can be computed.", ("experts",)
    ),
    Metric(
        "shoal_step_seconds",
        "histogram",
        "Steps of the engine.",
        ("attention",),
        bounds=STEP_BOUNDS,
    ),
    Metric("shoal_step_errors_total", "counter", "Steps that failed.", ("attention",)),
    # hops
    Metric(
        "shoal_hop_seconds",
        "histogram",
        "Hops to expert workers: in the worker's queue, computing, on the wire, in all.",
        _ROUTING,
        ("part",),
        HOP_BOUNDS,
    ),
    Metric(
        "shoal_hop_faults_total", "counter", "Hops without a usable answer.", _ROUTING, ("fault",)
    ),
    Metric("shoal_hedges_total", "counter", "Batches sent to another holder as well.", _ROUTING),
    Metric("shoal_resent_pairs_total", "counter", "(token, expert) pairs sent again.", _ROUTING),
    Metric("shoal_holder_waits_total", "counter", "Waits for an expert nobody held.", _ROUTING),
    Metric("shoal_router_failovers_total", "counter", "Changes of the router.", ("attention",)),
    Metric(
        "shoal_frame_errors_total",
        "counter",
        "Frames refused, by the field at fault.",
        ("experts", "router"),
        ("field",),
    ),
    Metric(
        "shoal_channel_bytes_total",
        "counter",
        "Bytes received (in) and sent (out).",
        ("experts", "router"),
        ("direction",),
    ),
    # the cluster
    Metric(
        "shoal_replicas_wanted",
        "gauge",
        "Workers that a tier shall have.",
        ("placement",),
        ("tier",),
    ),
    Metric(
        "shoal_replicas_present", "gauge", "Workers that a tier has.", ("placement",), ("tier",)
    ),
    Metric(
        "shoal_placement_epoch",
        "gauge",
        "Grows when the holders of experts change.",
        ("placement",),
    ),
    Metric("shoal_placement_ready", "gauge", "1 while every expert has a holder.", ("placement",)),
    Metric("shoal_expert_moves_total", "counter", "Slots changed by rebalancing.", ("placement",)),
    Metric(
        "shoal_worker_deaths_total", "counter", "Workers gone unasked.", ("placement",), ("role",)
    ),
    Metric(
        "shoal_layer_imbalance",
        "gauge",
        "Rows of a layer's busiest worker over their mean; 1 is even.",
        ("placement",),
        ("layer",),
    ),
    Metric(
        "shoal_expert_rows_per_s",
        "gauge",
        "Rows a second of the busiest experts; rank 1 is the busiest. Which it is now:"
        " shoal_expert_rank_layer and _id.",
        ("placement",),
        ("rank",),
    ),
    Metric(
        "shoal_expert_rank_layer",
        "gauge",
        "Layer of the expert of a rank.",
        ("placement",),
        ("rank",),
    ),
    Metric(
        "shoal_expert_rank_id",
        "gauge",
        "Number of the expert of a rank.",
        ("placement",),
        ("rank",),
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}
