"""The board for when something is wrong: deaths, retries, refusals, damaged frames."""

from __future__ import annotations

from cluster.deploy.manifests.grafana import Line, Panel, Row
from cluster.deploy.manifests.promql import Queries, or_zero

TITLE = "Shoal: faults"
DESCRIPTION = "What failed, and what was done about it. All zero on a good day."


def rows(q: Queries) -> tuple[Row, ...]:
    """Top to bottom."""
    return (
        Row("Workers", _workers(q)),
        Row("Hops", _hops(q)),
        Row("Requests", _requests(q)),
        Row("Ray", _ray(q)),
    )


def _events(
    q: Queries, title: str, metric: str, description: str, label: str = "", name: str = ""
) -> Panel:
    """A counter of things that should not happen, by a label if it has one."""
    by = (label,) if label else ()
    legend = f"{{{{{label}}}}}" if label else name
    return Panel(title, "ops", (Line(or_zero(q.rate(metric, *by)), legend),), description)


def _workers(q: Queries) -> tuple[Panel, ...]:
    return (
        _events(
            q,
            "Deaths",
            "shoal_worker_deaths_total",
            "Members whose connection ended without a farewell.",
            "role",
        ),
        Panel(
            "Missing workers",
            "short",
            (
                Line(
                    f"{q.max('shoal_replicas_wanted', 'tier')}"
                    f" - {q.max('shoal_replicas_present', 'tier')}",
                    "{{tier}}",
                ),
            ),
            "Wanted and not there: starting, waiting for a node, or failing.",
        ),
        Panel(
            "Every expert has a holder",
            "bool_yes_no",
            (Line(q.max("shoal_placement_ready"), "ready"),),
            "0: tokens that need the missing ones wait, or go without, as on_unavailable says.",
        ),
    )


def _hops(q: Queries) -> tuple[Panel, ...]:
    return (
        _events(
            q, "Faults", "shoal_hop_faults_total", "Hops that failed; each is retried.", "fault"
        ),
        Panel(
            "What routers do about it",
            "ops",
            (
                Line(or_zero(q.rate("shoal_hedges_total")), "asked a second holder, too"),
                Line(or_zero(q.rate("shoal_resent_pairs_total")), "pairs sent again"),
                Line(or_zero(q.rate("shoal_holder_waits_total")), "waits for a holder"),
                Line(or_zero(q.rate("shoal_router_failovers_total")), "other routers taken"),
            ),
            "Hedges answer slow workers, the rest dead ones.",
        ),
        _events(
            q,
            "Damaged frames",
            "shoal_frame_errors_total",
            "By the field that was wrong; the connection is ended each time.",
            "field",
        ),
    )


def _requests(q: Queries) -> tuple[Panel, ...]:
    return (
        _events(
            q,
            "Refused",
            "shoal_requests_refused_total",
            "By the code of the error.",
            "code",
        ),
        Panel(
            "Replayed and parked",
            "short",
            (
                Line(or_zero(q.increase("shoal_requests_replayed_total")), "replayed"),
                Line(q.sum("shoal_requests_parked"), "parked"),
            ),
            "After their attention worker died: on another one, or waiting for one.",
        ),
        Panel(
            "Cancelled and preempted",
            "ops",
            (
                Line(or_zero(q.rate("shoal_requests_cancelled_total")), "cancelled"),
                Line(or_zero(q.rate("vllm_num_preemptions_total")), "preempted"),
            ),
            "By clients that went away; for want of cache.",
        ),
    )


def _ray(q: Queries) -> tuple[Panel, ...]:
    healthy = q.sum("serve_deployment_replica_healthy", "deployment")
    decisions = q.rate("shoal_scaling_decisions_total", "deployment", "cause")
    return (
        Panel(
            "Healthy replicas",
            "short",
            (Line(healthy, "{{deployment}}"),),
            "As Serve's controller counts them.",
        ),
        Panel(
            "Scaling decisions",
            "ops",
            (Line(decisions, "{{deployment}}: {{cause}}"),),
            "Of the policies, by cause; `error` and `unknown` hold the size.",
        ),
        Panel(
            "Memory of nodes",
            "percentunit",
            (
                Line(
                    f"{q.max('node_mem_used', 'instance')} / {q.max('node_mem_total', 'instance')}",
                    "{{instance}}",
                ),
            ),
            "Ray kills workers when a node runs out of it.",
        ),
    )
