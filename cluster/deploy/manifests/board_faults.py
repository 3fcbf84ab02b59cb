"""The board for when something is wrong: deaths, retries, refusals, damaged frames."""

from __future__ import annotations

from dataclasses import replace

from cluster.deploy.manifests.board_lines import counted, counted_by, missing
from cluster.deploy.manifests.grafana import Line, Panel, Row
from cluster.deploy.manifests.promql import Queries

TITLE = "Shoal: faults"
DESCRIPTION = "What failed, and what was done about it. Events are those of the last five minutes."
WINDOW = "5m"
"""Of events: they are rare, a rate a second would say nothing."""


def rows(q: Queries) -> tuple[Row, ...]:
    """Top to bottom."""
    events = replace(q, window=WINDOW)
    return (
        Row("Workers", _workers(events)),
        Row("Hops", _hops(events)),
        Row("Requests", _requests(events)),
        Row("Ray", _ray(events)),
    )


def _workers(q: Queries) -> tuple[Panel, ...]:
    return (
        Panel(
            "Deaths",
            "short",
            (counted_by(q, "shoal_worker_deaths_total", "role"),),
            "Members that went without being told to.",
        ),
        Panel(
            "Missing workers",
            "short",
            (Line(missing(q), "{{deployment}}"),),
            "Wanted and not healthy: starting, waiting for a node, or failing.",
        ),
        Panel(
            "Ready",
            "bool_yes_no",
            (Line(q.max("shoal_placement_ready"), "ready"),),
            "No: requests wait for what is missing; `shoal status` names it.",
        ),
    )


def _hops(q: Queries) -> tuple[Panel, ...]:
    return (
        Panel(
            "Failed hops",
            "short",
            (counted_by(q, "shoal_hop_faults_total", "fault"),),
            "Each is sent again.",
        ),
        Panel(
            "What is done about slow and dead workers",
            "short",
            (
                counted(q, "shoal_hedges_total", "asked a second holder, too"),
                counted(q, "shoal_resent_pairs_total", "pairs sent again"),
                counted(q, "shoal_holder_waits_total", "waits for a holder"),
                counted(q, "shoal_router_failovers_total", "other routers taken"),
            ),
            "Hedges answer slow workers, the rest dead ones.",
        ),
        Panel(
            "Batches not computed",
            "short",
            (counted_by(q, "shoal_worker_refusals_total", "reason"),),
            "By expert workers that are overloaded, draining, or do not hold the expert.",
        ),
        Panel(
            "Damaged frames",
            "short",
            (counted_by(q, "shoal_frame_errors_total", "field"),),
            "By the field that was wrong, which ends the connection; `auth` and `handshake` are of"
            " peers that are no members, `truncated` of the dead, `handler` of our own code.",
        ),
        Panel(
            "Failed steps",
            "short",
            (counted(q, "shoal_step_errors_total", "steps"),),
            "Of engines: its sequences fail. One that waited for experts in vain is done again with"
            " those that can wait.",
        ),
    )


def _requests(q: Queries) -> tuple[Panel, ...]:
    return (
        Panel(
            "Refused",
            "short",
            (counted_by(q, "shoal_requests_refused_total", "code"),),
            "Before any work, by the code of the error that the client got.",
        ),
        Panel(
            "Failed",
            "short",
            (counted_by(q, "shoal_requests_failed_total", "code"),),
            "After they were admitted.",
        ),
        Panel(
            "Saved",
            "short",
            (
                counted(q, "shoal_requests_replayed_total", "replayed"),
                Line(q.sum("shoal_requests_parked"), "parked now"),
            ),
            "Sequences whose attention worker died: on another one, or waiting for one.",
        ),
        Panel(
            "Given up, put back",
            "short",
            (
                counted(q, "shoal_requests_cancelled_total", "cancelled"),
                counted(q, "vllm_num_preemptions_total", "preempted"),
            ),
            "By clients that went away; for want of cache, to be computed again.",
        ),
    )


def _ray(q: Queries) -> tuple[Panel, ...]:
    decisions = q.increase("shoal_scaling_decisions_total", "deployment", "cause")
    used, total = (q.max(f"node_mem_{which}", "instance") for which in ("used", "total"))
    return (
        Panel(
            "Healthy replicas",
            "short",
            (Line(q.sum("serve_deployment_replica_healthy", "deployment"), "{{deployment}}"),),
            "As Serve's controller counts them.",
        ),
        Panel(
            "Scaling decisions",
            "short",
            (Line(decisions, "{{deployment}}: {{cause}}"),),
            "Of the policies, by cause; `error` and `unknown` hold the size.",
        ),
        Panel(
            "Memory of nodes",
            "percentunit",
            (Line(f"{used} / {total}", "{{instance}}"),),
            "Ray kills workers when a node runs out of it.",
        ),
    )
