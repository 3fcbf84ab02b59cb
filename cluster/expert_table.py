"""`shoal experts show` as tables: how hot the experts are, and who holds how many."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

NUM_HOTTEST = 3
EVEN = 0.8
"""Balancedness from here on is shown in green."""


def render_experts(body: dict[str, Any]) -> Group:
    """The body of GET /v1/experts/load, for people."""
    workers = [worker["worker_id"] for worker in body["workers"]]
    title = Text(
        f"{body['model']}: rows of the last {body['window_s']:g} s, epoch {body['epoch']}", "bold"
    )
    layers = Table("layer", "balance", "hottest experts", "replicas", "holders", box=None)
    for layer in body["layers"]:
        balance = layer["balancedness"]
        layers.add_row(
            str(layer["layer"]),
            Text(f"{balance:.2f}", "green" if balance >= EVEN else "yellow"),
            _hottest(layer["experts"]),
            _replicas(layer["experts"]),
            _holders(layer["experts"], workers),
        )
    rows = Table("worker", "rows", "share", box=None)
    total = sum(worker["rows"] for worker in body["workers"])
    for worker in body["workers"]:
        share = f"{worker['rows'] / total:.0%}" if total else "-"
        rows.add_row(worker["worker_id"], str(worker["rows"]), share)
    return Group(title, layers, rows)


def _hottest(experts: list[dict[str, Any]]) -> str:
    """ "12: 31 %  7: 12 %": the experts with most of the layer's rows."""
    total = sum(expert["rows"] for expert in experts)
    if not total:
        return "no rows"
    hottest = sorted(experts, key=lambda expert: (-expert["rows"], expert["expert"]))
    return "  ".join(
        f"{expert['expert']}: {expert['rows'] / total:.0%}" for expert in hottest[:NUM_HOTTEST]
    )


def _replicas(experts: list[dict[str, Any]]) -> str:
    """ "64 + 8": held experts and further replicas; who is missing, if some are."""
    held = sum(expert["replicas"] > 0 for expert in experts)
    further = sum(max(expert["replicas"] - 1, 0) for expert in experts)
    missing = len(experts) - held
    return f"{held} + {further}" + (f", {missing} missing" if missing else "")


def _holders(experts: list[dict[str, Any]], workers: list[str]) -> str:
    """ "worker-0: 36  worker-1: 36": held experts by worker."""
    held = Counter(name for expert in experts for name in expert["holders"])
    return "  ".join(f"{name}: {held[name]}" for name in workers)
