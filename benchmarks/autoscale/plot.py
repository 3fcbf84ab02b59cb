"""The picture of the day: load, devices, latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from serving.summary import percentile

from autoscale.figures import Answer, Bounds, windows
from autoscale.trace import AFTERNOON, HOURS, Day, Request
from autoscale.watch import Sample

COLORS = {"static": "#8a8a8a", "copies": "#d9822b", "shoal": "#1f6fb4"}
WINDOW_HOURS = 0.5
MIN_ANSWERS = 3


@dataclass(frozen=True)
class Curve:
    """One way to size the tier."""

    name: str
    title: str
    devices_per_worker: int
    answers: Sequence[Answer]
    samples: Sequence[Sample]


def draw(
    day: Day, trace: Sequence[Request], curves: Sequence[Curve], bounds: Bounds, path: Path
) -> None:
    """Three panels over the hours of the day."""
    figure, panels = plt.subplots(3, 1, figsize=(9, 8), sharex=True)
    _load(panels[0], day, trace)
    for curve in curves:
        _devices(panels[1], day, curve)
        _latency(panels[2], day, curve)
    panels[1].set_ylabel("devices of the expert tier")
    panels[1].set_ylim(0, 1.25 * panels[1].get_ylim()[1])
    panels[1].legend(loc="upper left", fontsize=8, ncols=len(curves))
    panels[2].axhline(bounds.tpot_s * 1e3, color="black", linestyle=":", linewidth=1)
    panels[2].text(0.1, bounds.tpot_s * 1e3, "service level", fontsize=8, va="bottom")
    panels[2].set_ylabel("ms a token, p95")
    panels[2].set_ylim(bottom=0)
    panels[2].set_xlabel("hour of the day")
    panels[2].set_xlim(0, HOURS)
    panels[2].set_xticks(range(0, 25, 3))
    for panel in panels:
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _load(panel: Any, day: Day, trace: Sequence[Request]) -> None:
    """Tokens a second that are asked for, morning's domains below the afternoon's."""
    late = [request for request in trace if request.item.domain in AFTERNOON]
    early = [request for request in trace if request.item.domain not in AFTERNOON]
    hours = [WINDOW_HOURS * number for number in range(int(HOURS / WINDOW_HOURS))]
    below, above = _tokens_per_s(day, early), _tokens_per_s(day, late)
    style = {"width": WINDOW_HOURS, "align": "edge"}
    panel.bar(hours, below, color="#9ecae1", label="arithmetic, code, facts", **style)
    panel.bar(hours, above, bottom=below, color="#fdae6b", label="French, chat, stories", **style)
    panel.plot(hours, [day.tokens_per_s(h / HOURS * day.day_s) for h in hours], "k--", lw=0.8)
    panel.set_ylabel("tokens/s asked for")
    panel.legend(loc="upper left", fontsize=8)


def _tokens_per_s(day: Day, requests: Sequence[Request]) -> list[float]:
    width_s = _window_s(day)
    points = [(request.due_s, float(request.item.num_tokens)) for request in requests]
    return [sum(values) / width_s for values in windows(points, width_s, day.day_s)]


def _devices(panel: Any, day: Day, curve: Curve) -> None:
    hours = [day.hour(sample.time_s) for sample in curve.samples]
    numbers = [sample.allocated * curve.devices_per_worker for sample in curve.samples]
    panel.step(hours, numbers, where="post", color=COLORS[curve.name], label=curve.title)


def _latency(panel: Any, day: Day, curve: Curve) -> None:
    """Of the requests that were due in each window; a failed one leaves a gap."""
    points = [(answer.due_s, answer.tpot_s * 1e3) for answer in curve.answers]
    found = windows(points, _window_s(day), day.day_s)
    middles = [WINDOW_HOURS * (number + 0.5) for number in range(len(found))]
    shown = [
        (hour, percentile(values, 95))
        for hour, values in zip(middles, found, strict=True)
        if len(values) >= MIN_ANSWERS
    ]
    panel.plot(*zip(*shown, strict=True), color=COLORS[curve.name], linewidth=1.2)


def _window_s(day: Day) -> float:
    return day.day_s * WINDOW_HOURS / HOURS
