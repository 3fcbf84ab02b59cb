"""What goes into a scaling decision and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Cause = Literal[
    "steady",
    "fixed",
    "command",
    "load",
    "pressure",
    "spare",
    "bounds",
    "coverage",
    "skew",
    "stalled",
    "unknown",
    "error",
]
"""Why the target is what it is, for counters: command, load, pressure (a queue), spare, bounds and
coverage change it; the others hold it."""


@dataclass(frozen=True)
class Report:
    """The averages of one worker, as they came, and how long ago it last reported."""

    values: Mapping[str, Any]
    age_s: float = 0.0


@dataclass(frozen=True)
class PoolState:
    """A tier as the autoscaler sees it."""

    target: int
    """Workers that are wanted at present."""
    num_running: int
    """Workers that have started and are not stopping."""
    reports: Mapping[str, Report] = field(default_factory=dict)
    """By worker."""
    commanded: int = 0
    """Workers that somebody asked for (`shoal scale`); 0: nobody did."""


@dataclass(frozen=True)
class Crowded:
    """A pool that was too small at this throughput, and would be again with as much to do.

    Without drained workers.
    """

    num_workers: int
    throughput: float


@dataclass(frozen=True)
class Memory:
    """What a decision leaves to the next one; times are those of `now_s`."""

    pool: tuple[int, int, bool] | None = None  # target, num_running, ready
    pool_since_s: float = 0.0
    direction: Literal["up", "down"] | None = None
    direction_since_s: float = 0.0
    busiest: int = 0  # the most workers a moment of this wish to shrink asked for
    coverage: int = 1
    crowded: Crowded | None = None


@dataclass(frozen=True)
class Decision:
    """The new target, and why in one line."""

    target: int
    cause: Cause
    reason: str
    memory: Memory
