"""What GET /status tells of workers and tiers, from the snapshot and everybody's samples. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from attention.messages import Stats
from cluster.observability.cluster_metrics import by_label, sum_of, value_of
from cluster.observability.rates import Samples
from experts.messages import Snapshot, WorkerInfo
from experts.metrics import Sample

Json = dict[str, Any]


def describe_workers(snapshot: Snapshot | None, samples: Samples) -> list[Json]:
    """Every live worker, and how busy it is as far as it has said."""
    if snapshot is None:
        return []
    held = Counter(name for layer in snapshot.holders.values() for e in layer for name in e)
    return [
        {
            **worker.model_dump(),
            "num_experts": held[worker.worker_id],
            "drained": worker.worker_id in snapshot.drained,
            **_load(worker, samples.get(worker.worker_id, ())),
        }
        for worker in snapshot.workers
    ]


def describe_tiers(samples: Samples) -> Json:
    """Workers wanted and present of each tier; wanted is null until its policy has said so. {}
    while the directory is away."""
    wanted = by_label(samples, "shoal_replicas_wanted", "tier")
    present = by_label(samples, "shoal_replicas_present", "tier")
    return {
        tier: {"wanted": int(wanted[tier]) if tier in wanted else None, "present": int(number)}
        for tier, number in present.items()
        if number or tier in wanted  # routers may live inside the attention workers
    }


def count_events(samples: Samples) -> Json:
    """What has happened in the whole cluster since Placement's start. samples: of those that are
    gone too."""
    return {
        "replays": int(sum_of(samples, "shoal_requests_replayed_total")),
        "deaths": int(sum_of(samples, "shoal_worker_deaths_total")),
        "moves": int(sum_of(samples, "shoal_expert_moves_total")),
        "hedges": int(sum_of(samples, "shoal_hedges_total")),
        "preemptions": int(sum_of(samples, "vllm_num_preemptions_total")),
    }


def count_requests(samples: Samples, engines: Sequence[Stats]) -> Json:
    """Sequences that run and wait now; requests refused and cancelled so far, by ingresses that are
    gone too if the samples have them."""
    return {
        "requests_running": sum(stats.num_running for stats in engines),
        "requests_waiting": sum(stats.num_waiting for stats in engines),
        "refused": int(sum_of(samples, "shoal_requests_refused_total")),
        "cancelled": int(sum_of(samples, "shoal_requests_cancelled_total")),
    }


def _load(worker: WorkerInfo, samples: Sequence[Sample]) -> Json:
    """queue: sequences that wait, or batches."""
    is_engine = worker.role == "attention"
    name = "vllm_num_requests_waiting" if is_engine else "shoal_worker_waiting_batches"
    num_waiting = value_of(samples, name)
    return {
        "busy": value_of(samples, "shoal_worker_busy"),
        "queue": None if num_waiting is None else int(num_waiting),
        "rows_per_s": value_of(samples, "shoal_worker_rows_per_s"),
    }
