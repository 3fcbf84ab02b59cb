"""A verdict as a table, as one line of progress, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.console import Stage
from cluster.deploy.verdict import Verdict

STYLES = {"ready": "bold green", "waiting": "yellow", "failed": "bold red"}


def render_status(judged: Verdict, subject: str) -> RenderableType:
    """Everything there is to say about a deployment."""
    headline = Text.assemble(
        f"{subject}: ", (judged.state, STYLES[judged.state]), f", {judged.summary}"
    )
    parts: list[RenderableType] = [headline]
    if judged.applications:
        states = ", ".join(f"{name} {status}" for name, status in judged.applications.items())
        parts.append(Text(f"application: {states}"))
    if judged.tiers:
        parts.append(_tiers(judged))
    parts += (
        Text(cause, "red" if judged.state == "failed" else "yellow") for cause in judged.causes
    )
    return Group(*parts)


def progress(judged: Verdict) -> Stage:
    """One line; counts pods and names deployments that are not ready."""
    tiers = ", ".join(f"{tier.name} {tier.num_ready}/{tier.num_wanted}" for tier in judged.tiers)
    text = f"{judged.summary}; pods: {tiers}" if tiers else judged.summary
    if judged.unfinished:
        text += f"; not healthy yet: {', '.join(judged.unfinished)}"
    num_ready = sum(tier.num_ready for tier in judged.tiers)
    return Stage(text, num_ready, sum(tier.num_wanted for tier in judged.tiers))


def to_json(judged: Verdict) -> dict[str, Any]:
    return asdict(judged)


def _tiers(judged: Verdict) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tier")
    table.add_column("pods ready", justify="right")
    table.add_column("bounds", justify="right")
    for tier in judged.tiers:
        style = "" if tier.num_ready >= tier.num_wanted else "yellow"
        bounds = f"{tier.min_pods}-{tier.max_pods}"
        table.add_row(tier.name, Text(f"{tier.num_ready}/{tier.num_wanted}", style), bounds)
    return table
