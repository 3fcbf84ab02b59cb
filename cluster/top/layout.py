"""What fits on a screen of some height: how many lines each part has, which layers show. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.top.reading import Reading

NUM_HOTTEST = 8
NUM_EVENTS = 5
MIN_LINES = 3
NUM_FIXED_LINES = 11
"""One of title, five of numbers, two above the heat map, two heads of lists, one of keys."""
MIN_HEIGHT = NUM_FIXED_LINES + 2 * MIN_LINES
WORKING_ROLES = ("experts", "attention", "router")


@dataclass(frozen=True)
class Sizes:
    """How many lines each part of a screen has."""

    layers: int
    rows: int
    """Of the hottest experts, beside the workers."""
    events: int

    @classmethod
    def of(cls, reading: Reading, height: int | None) -> Sizes:
        """On a screen of `height` lines; None: of a moment, with room for all but events."""
        num_layers = len(reading.load.layers) if reading.load else 0
        num_rows = max(NUM_HOTTEST, len(workers_of(reading)))
        if height is None:
            return cls(num_layers, num_rows, 0)
        free = max(height - NUM_FIXED_LINES, 0)
        rows = min(num_rows, max(free // 3, free - num_layers - NUM_EVENTS, MIN_LINES))
        layers = min(num_layers, max(free - rows - min(NUM_EVENTS, free // 6), MIN_LINES))
        return cls(layers, rows, max(free - rows - layers, 0))


@dataclass(frozen=True)
class Scroll:
    """Which layer may be the topmost one."""

    page: int
    """Layers shown at once."""
    last: int
    """The position from which on the last layers are shown."""

    @classmethod
    def of(cls, reading: Reading, height: int) -> Scroll:
        """On a screen of `height` lines."""
        page = Sizes.of(reading, height).layers
        return cls(page, len(reading.load.layers) - page if reading.load else 0)

    def to(self, position: int) -> int:
        """The nearest position there is."""
        return min(max(position, 0), self.last)

    def step(self, key: str) -> int:
        """By how much a key moves."""
        steps = {"up": -1, "down": 1, "page up": -self.page, "page down": self.page}
        return {**steps, "home": -self.last, "end": self.last}.get(key, 0)


def workers_of(reading: Reading) -> list[dict[str, Any]]:
    """Those of its status that compute, in the order in which they are shown."""
    workers = [w for w in (reading.status or {})["workers"] if w["role"] in WORKING_ROLES]
    return sorted(workers, key=lambda w: (WORKING_ROLES.index(w["role"]), w["worker_id"]))
