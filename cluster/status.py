"""`shoal status` as a table: what the ingress reports about its cluster."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text


def render_status(body: dict[str, Any]) -> Group:
    """The body of GET /status, for people."""
    stage = Text(f"{body['model']}: {body['stage']}", "green" if body["ready"] else "yellow")
    for tier, workers_wanted in sorted(body["scale"].items()):
        stage.append(f"; {tier}: {workers_wanted} workers by command")
    replays, parked = (body["counters"] or {}).get("replays"), body["parked"]
    if replays or parked:
        stage.append(f"; {replays} replays, {parked} waiting for a worker")
    workers = Table("role", "worker", "pid", "endpoint", "experts", box=None)
    for worker in body["workers"]:
        experts = f"{worker['num_experts']}/{worker['num_slots']}" if worker["num_slots"] else ""
        workers.add_row(
            worker["role"], worker["worker_id"], str(worker["pid"]), worker["endpoint"], experts
        )
    engines = Table("running", "waiting", "KV blocks used", "preemptions", "tokens", box=None)
    for stats in body["engines"]:
        used = stats["kv_blocks_total"] - stats["kv_blocks_free"]
        engines.add_row(
            str(stats["num_running"]),
            str(stats["num_waiting"]),
            f"{used}/{stats['kv_blocks_total']}",
            str(stats["num_preemptions"]),
            str(stats["generated_tokens"]),
        )
    return Group(stage, workers, engines)
