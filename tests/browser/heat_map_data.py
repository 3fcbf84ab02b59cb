"""Crafted answers for the page /experts: clusters of any size and fate, without a server behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

Json = dict[str, Any]
STREAM = "**/v1/experts/load/stream*"
STATUS = "**/status"


def load_of(
    workers: Sequence[str],
    num_layers: int = 2,
    num_experts: int = 4,
    *,
    epoch: int = 1,
    hot: int = 0,
) -> Json:
    """Expert e of every layer is held by worker e modulo their number and computes 10 e rows/s;
    the expert `hot` computes 1000."""
    rows = [50 * expert for expert in range(num_experts)]
    rows[hot] = 5000
    holders = [[expert % len(workers)] for expert in range(num_experts)]
    return {
        "model": "crafted",
        "epoch": epoch,
        "window_s": 60.0,
        "recent_s": 5.0,
        "layers": list(range(1, num_layers + 1)),
        "workers": list(workers),
        "rows": [rows] * num_layers,
        "recent_rows": [rows] * num_layers,
        "holders": [holders] * num_layers,
        "balancedness": [0.9] * num_layers,
        "expert_balancedness": [0.3] * num_layers,
    }


def status_of(workers: Sequence[str], **more: Any) -> Json:
    """Expert workers of a cluster that serves chaos and operations."""
    listed = [
        {
            "worker_id": worker,
            "role": "experts",
            "pid": 100 + i,
            "node": "",
            "num_experts": 4,
            "num_slots": 8,
            "busy": 0.5,
            "queue": 1,
            "rows_per_s": 120.0,
            "drained": False,
        }
        for i, worker in enumerate(workers)
    ]
    body = {
        "ready": True,
        "stage": "ready",
        "workers": listed,
        "tiers": {"experts": {"wanted": 2, "present": len(workers)}},
        "rates": None,
        "chaos": True,
        "operations": True,
    }
    return body | more


def stream(page: Page, loads: Callable[[int], Sequence[Json]]) -> None:
    """Answer the nth connection with the events `loads(n)`, then end the stream."""
    connections = 0

    def answer(route: Route) -> None:
        nonlocal connections
        events = "".join(f"data: {json.dumps(load)}\n\n" for load in loads(connections))
        connections += 1
        route.fulfill(body=events + "data: [DONE]\n\n", content_type="text/event-stream")

    page.route(STREAM, answer)


def statuses(page: Page, status: Callable[[], Json]) -> None:
    """Answer /status."""
    page.route(STATUS, lambda route: route.fulfill(json=status()))
