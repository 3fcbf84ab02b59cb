"""What followed from one reading to the next: who came and went, and how fast tokens came."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from cluster.top.reading import Reading

MAX_EVENTS = 100
MAX_RATES = 60
COUNTED = ("deaths", "moves", "replays")
"""Counters of /status whose steps are events. Hedges and preemptions may be many a second."""


class History:
    """The newest readings of one server, its events, its tokens a second."""

    def __init__(self, first: Reading) -> None:
        """first: of a server that answered."""
        self.newest = self.answered = first
        """The last reading, and the last one with a status."""
        self.events: deque[tuple[float, str]] = deque(maxlen=MAX_EVENTS)
        """(at_s, what happened), oldest first."""
        self.tokens_per_s: deque[float] = deque(maxlen=MAX_RATES)
        self._note_rate(first)

    @property
    def away_s(self) -> float | None:
        """For how long the server has not answered; None if it did the last time."""
        if self.newest is self.answered:
            return None
        return self.newest.at_s - self.answered.at_s

    def add(self, reading: Reading) -> list[str]:
        """Take in the next reading. Returns what happened since the one before."""
        happened = list(self._happened(reading))
        self.newest = reading
        if reading.status is not None:
            self.answered = reading
            self._note_rate(reading)
        self.events.extend((reading.at_s, text) for text in happened)
        return happened

    def _happened(self, reading: Reading) -> Iterator[str]:
        if reading.status is None:
            if self.away_s is None:
                yield f"the server is away: {reading.error}"
            return
        if self.away_s is not None:
            yield f"the server is back after {reading.at_s - self.answered.at_s:.0f} s"
        yield from changes(self.answered.status or {}, reading.status)

    def _note_rate(self, reading: Reading) -> None:
        rate = rates_of(reading).get("generated_tokens_per_s")
        if rate is not None:
            self.tokens_per_s.append(rate)


def rates_of(reading: Reading) -> dict[str, Any]:
    """The rates in its status; empty while there are none."""
    return (reading.status or {}).get("rates") or {}


def changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What happened between two bodies of /status, a line each."""
    old, new = ({w["worker_id"]: w for w in body["workers"]} for body in (before, after))
    if left := [name for name in old if name not in new]:
        yield f"left: {', '.join(left)}"
    if joined := [name for name in new if name not in old]:
        yield f"joined: {', '.join(joined)}"
    both = [name for name in new if name in old]
    if drained := [n for n in both if new[n].get("drained") and not old[n].get("drained")]:
        yield f"drained: {', '.join(drained)}"
    if (stage := after["stage"]) != before["stage"]:
        yield stage
    wanted_before, wanted = wanted_by_tier(before), wanted_by_tier(after)
    for tier, now in wanted.items():
        was = wanted_before.get(tier)
        if now is not None and was is not None and now != was:
            yield f"{tier}: {now} wanted, {was} before"
    if wanted_before and wanted:  # else the directory is away, and with it most counters
        yield from _steps(before.get("counters") or {}, after.get("counters") or {})


def wanted_by_tier(status: dict[str, Any]) -> dict[str, int | None]:
    """Replicas that each tier should have."""
    return {tier: size.get("wanted") for tier, size in (status.get("tiers") or {}).items()}


def _steps(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Counters start anew with their process, so a step back is none."""
    for name in COUNTED:
        number = (after.get(name) or 0) - (before.get(name) or 0)
        if number > 0:
            yield f"{name} +{number}"
