"""The board of the expert tier: its load, its balance, its hops."""

from __future__ import annotations

from cluster.deploy.manifests.grafana import Line, Panel, Row
from cluster.deploy.manifests.promql import Queries, or_zero

TITLE = "Shoal: experts"
DESCRIPTION = "What expert workers compute, how evenly, and what a hop to them takes."
HOP_PARTS = ("queue", "compute", "wire")


def rows(q: Queries) -> tuple[Row, ...]:
    """Top to bottom."""
    return (
        Row("Load", _load(q)),
        Row("Balance", _balance(q)),
        Row("Hops", _hops(q)),
        Row("Pool", _pool(q)),
    )


def _load(q: Queries) -> tuple[Panel, ...]:
    return (
        Panel(
            "Rows",
            "ops",
            (Line(q.rate("shoal_worker_rows_total", "replica"), "{{replica}}"),),
            "Rows (token, expert) that each expert worker computes a second.",
        ),
        Panel(
            "Busy",
            "percentunit",
            (Line(q.max("shoal_worker_busy", "replica", deployment="Experts"), "{{replica}}"),),
            "Share of its time that an expert worker computes.",
        ),
        Panel(
            "Rows a batch",
            "short",
            (
                Line(
                    f"{q.rate('shoal_worker_rows_total')} / {q.rate('shoal_worker_batches_total')}",
                    "rows",
                ),
            ),
            "Mean. Larger batches cost less a row.",
        ),
        Panel(
            "Waiting batches",
            "short",
            (Line(q.max("shoal_worker_waiting_batches", "replica"), "{{replica}}"),),
            "That an expert worker has and does not compute yet.",
        ),
        Panel(
            "Queue",
            "s",
            tuple(
                Line(q.quantile(share, "shoal_worker_queue_seconds"), f"p{share * 100:g}")
                for share in (0.5, 0.99)
            ),
            "How long a batch waits at an expert worker.",
        ),
    )


def _balance(q: Queries) -> tuple[Panel, ...]:
    return (
        Panel(
            "Imbalance by layer",
            "short",
            (Line(q.max("shoal_layer_imbalance", "layer"), "layer {{layer}}"),),
            "Rows of the busiest worker over the mean: 1 is even, N is all on one of N workers.",
        ),
        Panel(
            "Worst layer",
            "short",
            (
                Line(q.max("shoal_layer_imbalance"), "worst"),
                Line(q.mean("shoal_layer_imbalance"), "mean"),
            ),
            "Every token passes every layer, so the worst one sets the pace.",
        ),
        Panel(
            "Hottest experts",
            "ops",
            (Line(q.max("shoal_expert_rows_per_s", "rank"), "#{{rank}}"),),
            "Rows a second of the 16 hottest (layer, expert); GET /v1/experts/load names them.",
        ),
    )


def _hops(q: Queries) -> tuple[Panel, ...]:
    return (
        Panel(
            "A hop",
            "s",
            tuple(
                Line(q.quantile(share, "shoal_hop_seconds", part="total"), f"p{share * 100:g}")
                for share in (0.5, 0.9, 0.99)
            ),
            "From a router's frame to the worker's answer; a layer waits for the slowest.",
        ),
        Panel(
            "Parts of a hop, mean",
            "s",
            tuple(Line(q.average("shoal_hop_seconds", part=part), part) for part in HOP_PARTS),
            "Queue: others' batches. Compute: this one's. Wire: the way there and back.",
        ),
        Panel(
            "Parts of a hop, p99",
            "s",
            tuple(
                Line(q.quantile(0.99, "shoal_hop_seconds", part=part), part) for part in HOP_PARTS
            ),
            "The same in the slowest hundredth.",
        ),
    )


def _pool(q: Queries) -> tuple[Panel, ...]:
    return (
        Panel(
            "Expert workers",
            "short",
            (
                Line(q.max("shoal_replicas_wanted", tier="experts"), "wanted"),
                Line(q.max("shoal_replicas_present", tier="experts"), "present"),
            ),
            "Wanted by load or by command, and there.",
        ),
        Panel(
            "Experts held",
            "short",
            (Line(q.max("shoal_experts_held", "replica"), "{{replica}}"),),
            "(layer, expert) pairs of each worker, replicas included.",
        ),
        Panel(
            "Moves",
            "ops",
            (Line(or_zero(q.rate("shoal_expert_moves_total")), "moves"),),
            "Experts that a worker took or gave up, to even out the load or after a death.",
        ),
        Panel(
            "Epoch",
            "short",
            (Line(q.max("shoal_placement_epoch"), "epoch"),),
            "Counts the versions of the table of who holds what.",
        ),
    )
