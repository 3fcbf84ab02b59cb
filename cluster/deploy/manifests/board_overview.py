"""The board that one looks at first: requests, latencies, tokens, capacity."""

from __future__ import annotations

from cluster.deploy.manifests.board_lines import percentiles, replicas
from cluster.deploy.manifests.grafana import Line, Panel, Row
from cluster.deploy.manifests.promql import Queries, or_zero

TITLE = "Shoal: overview"
DESCRIPTION = "How fast it answers, how much it does and what room it has left."


def rows(q: Queries) -> tuple[Row, ...]:
    """Top to bottom."""
    return (
        Row("Now", _now(q)),
        Row("Requests", _requests(q)),
        Row("Tokens", _tokens(q)),
        Row("Capacity", _capacity(q)),
    )


def _now(q: Queries) -> tuple[Panel, ...]:
    return (
        Panel(
            "Running",
            "short",
            (Line(q.sum("vllm_num_requests_running"), "running"),),
            "Sequences in the steps of all attention workers.",
            "stat",
        ),
        Panel(
            "Waiting",
            "short",
            (Line(q.sum("vllm_num_requests_waiting"), "waiting"),),
            "Sequences that wait for room in the cache or in a step.",
            "stat",
        ),
        Panel(
            "Generated",
            "short",
            (Line(q.rate("vllm_generation_tokens_total"), "tokens/s"),),
            "New tokens a second.",
            "stat",
        ),
        Panel(
            "First token, p99",
            "s",
            (Line(q.quantile(0.99, "vllm_time_to_first_token_seconds"), "p99"),),
            "From a request's arrival to its first token.",
            "stat",
        ),
        Panel(
            "Cache in use",
            "percentunit",
            (Line(q.max("vllm_kv_cache_usage_perc"), "fullest"),),
            "Of the KV cache of the fullest attention worker.",
            "stat",
        ),
        Panel(
            "Ready",
            "bool_yes_no",
            (Line(q.max("shoal_placement_ready"), "ready"),),
            "Every expert has a holder, and there are routers and attention workers.",
            "stat",
        ),
    )


def _requests(q: Queries) -> tuple[Panel, ...]:
    ends = ("admitted", "refused", "failed", "cancelled")
    reasons = q.rate("vllm_request_success_total", "finished_reason")
    admitted = q.rate("shoal_requests_admitted_total")
    parts = ("queue", "prefill", "decode")
    return (
        Panel(
            "Requests",
            "reqps",
            tuple(Line(or_zero(q.rate(f"shoal_requests_{end}_total")), end) for end in ends),
            "Of those that were admitted some fail, of some the client goes away.",
        ),
        Panel(
            "Sequences that ended",
            "reqps",
            (Line(reasons, "{{finished_reason}}"),),
            "A request has n of them. abort: the client went away.",
        ),
        Panel(
            "Time to the first token",
            "s",
            percentiles(q, "vllm_time_to_first_token_seconds"),
            "From arrival to the first token: queue and prompt.",
        ),
        Panel(
            "Time between tokens",
            "s",
            percentiles(q, "vllm_inter_token_latency_seconds"),
            "Of each sequence, token by token: what a reader of a stream feels.",
        ),
        Panel(
            "Whole request",
            "s",
            percentiles(q, "vllm_e2e_request_latency_seconds"),
            "From arrival to the last token; grows with the length of answers.",
        ),
        Panel(
            "Where a request's time goes",
            "s",
            tuple(Line(q.average(f"vllm_request_{part}_time_seconds"), part) for part in parts),
            "Means. A long queue asks for attention workers or cache, a long decode for experts.",
        ),
        Panel(
            "Cost of a request",
            "s",
            (
                Line(
                    f"{q.rate('shoal_request_expert_seconds_total')} / {admitted}",
                    "expert seconds",
                ),
            ),
            "Time that expert workers computed for a request, on average.",
        ),
    )


def _tokens(q: Queries) -> tuple[Panel, ...]:
    return (
        Panel(
            "Tokens",
            "ops",
            (
                Line(q.rate("vllm_prompt_tokens_total"), "prompt"),
                Line(q.rate("vllm_generation_tokens_total"), "generated"),
            ),
            "A second, of all workers.",
        ),
        Panel(
            "Length of requests",
            "short",
            tuple(
                line
                for what in ("prompt", "generation")
                for line in percentiles(
                    q, f"vllm_request_{what}_tokens", shares=(0.5, 0.99), of=what
                )
            ),
            "Tokens of prompts and of answers.",
        ),
        Panel(
            "Prompts found in the cache",
            "percentunit",
            (
                Line(
                    f"{q.rate('vllm_prefix_cache_hits_total')}"
                    f" / {q.rate('vllm_prefix_cache_queries_total')}",
                    "hits",
                ),
            ),
            "Share of prompt tokens that an earlier request left in the KV cache.",
        ),
    )


def _capacity(q: Queries) -> tuple[Panel, ...]:
    wanted, _ = replicas(q)
    return (
        Panel(
            "Sequences",
            "short",
            (
                Line(q.sum("vllm_num_requests_running"), "running"),
                Line(q.sum("vllm_num_requests_waiting"), "waiting"),
            ),
            "Of all attention workers.",
        ),
        Panel(
            "KV cache",
            "percentunit",
            (Line(q.max("vllm_kv_cache_usage_perc", "worker_id"), "{{worker_id}}"),),
            "Share of its blocks that each attention worker uses.",
        ),
        Panel(
            "Preemptions",
            "ops",
            (Line(q.rate("vllm_num_preemptions_total"), "preempted"),),
            "Sequences that gave their cache to others and are computed again.",
        ),
        Panel(
            "Computed again",
            "ops",
            (Line(q.rate("shoal_recomputed_tokens_total"), "tokens"),),
            "Tokens a second, after preemptions and deaths of attention workers.",
        ),
        Panel(
            "Busy",
            "percentunit",
            (Line(q.max("shoal_worker_busy", "worker_id"), "{{worker_id}}"),),
            "Share of its time that a worker computes; its tier scales by it.",
        ),
        Panel(
            "Workers",
            "short",
            (
                Line(wanted, "{{deployment}} wanted"),
                Line(q.max("shoal_replicas_present", "tier"), "{{tier}} present"),
            ),
            "Wanted by load, by command or as configured; present: known to the directory.",
        ),
        Panel(
            "Steps",
            "s",
            percentiles(q, "shoal_step_seconds"),
            "Of the engines: one step gives every running sequence a token.",
        ),
    )
