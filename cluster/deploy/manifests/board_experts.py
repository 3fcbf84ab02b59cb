"""The board of the expert tier: its load, its balance, its hops."""

from __future__ import annotations

from cluster.deploy.manifests.board_lines import percentiles, replicas
from cluster.deploy.manifests.grafana import Line, Panel, Row
from cluster.deploy.manifests.promql import EXPERT_WORKERS, Queries

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
    computed = q.rate("shoal_worker_rows_total")
    waiting = q.max("shoal_worker_waiting_batches", "worker_id", worker_id=EXPERT_WORKERS)
    return (
        Panel(
            "Rows",
            "ops",
            (Line(q.rate("shoal_worker_rows_total", "worker_id"), "{{worker_id}}"),),
            "(token, expert) pairs that each expert worker computes a second.",
        ),
        Panel(
            "Busy",
            "percentunit",
            (
                Line(
                    q.max("shoal_worker_busy", "worker_id", worker_id=EXPERT_WORKERS),
                    "{{worker_id}}",
                ),
            ),
            "Share of its time that an expert worker computes.",
        ),
        Panel(
            "Rows a batch",
            "short",
            (Line(f"{computed} / {q.rate('shoal_worker_batches_total')}", "rows"),),
            "Mean. Larger batches cost less a row.",
        ),
        Panel(
            "Waiting batches",
            "short",
            (Line(waiting, "{{worker_id}}"),),
            "That an expert worker has and does not compute yet.",
        ),
        Panel(
            "Queue",
            "s",
            percentiles(q, "shoal_worker_queue_seconds"),
            "How long a batch waits at an expert worker.",
        ),
    )


def _balance(q: Queries) -> tuple[Panel, ...]:
    ranked = {
        "layer": q.max("shoal_expert_rank_layer", "rank"),
        "expert": q.max("shoal_expert_rank_expert", "rank"),
        "rows/s": q.max("shoal_expert_rows_per_s", "rank"),
    }
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
            "Load of the hottest experts",
            "ops",
            (Line(ranked["rows/s"], "#{{rank}}"),),
            "Rows a second by rank; which expert has it changes with the load.",
        ),
        Panel(
            "Hottest experts now",
            "short",
            tuple(Line(query, column) for column, query in ranked.items()),
            "Of all layers. GET /v1/experts/load and the page /experts have every expert.",
            "table",
        ),
    )


def _hops(q: Queries) -> tuple[Panel, ...]:
    received, sent = (
        q.rate("shoal_channel_bytes_total", direction=direction) for direction in ("in", "out")
    )
    return (
        Panel(
            "A hop",
            "s",
            percentiles(q, "shoal_hop_seconds", part="total"),
            "From a router's frame to the worker's answer; a layer waits for the slowest.",
        ),
        Panel(
            "Parts of a hop, mean",
            "s",
            tuple(Line(q.average("shoal_hop_seconds", part=part), part) for part in HOP_PARTS),
            "Queue: others' batches. Compute: this one's. Wire: the way there and back.",
        ),
        Panel(
            "Parts of a hop, slowest hundredth",
            "s",
            tuple(
                line
                for part in HOP_PARTS
                for line in percentiles(q, "shoal_hop_seconds", shares=(0.99,), of=part, part=part)
            ),
            "The same for the slowest hops, which layers wait for.",
        ),
        Panel(
            "Data plane",
            "Bps",
            (Line(received, "received"), Line(sent, "sent")),
            "Bytes of rows and their headers, of expert workers and routers together.",
        ),
    )


def _pool(q: Queries) -> tuple[Panel, ...]:
    wanted, _ = replicas(q, deployment="Experts")
    return (
        Panel(
            "Expert workers",
            "short",
            (
                Line(wanted, "wanted"),
                Line(q.max("shoal_replicas_present", tier="experts"), "present"),
            ),
            "Wanted by load, by command or as configured, and there.",
        ),
        Panel(
            "Experts held",
            "short",
            (Line(q.max("shoal_experts_held", "worker_id"), "{{worker_id}}"),),
            "(layer, expert) pairs of each worker, replicas included.",
        ),
        Panel(
            "Moves",
            "ops",
            (Line(q.rate("shoal_expert_moves_total"), "moves"),),
            "Experts that a worker takes or gives up a second, to even out the load.",
        ),
        Panel(
            "Epoch",
            "short",
            (Line(q.max("shoal_placement_epoch"), "epoch"),),
            "Counts the versions of the table of who holds what.",
        ),
    )
