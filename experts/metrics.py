"""Numbers that a process tells others: samples of counters, gauges and histograms. Pure.

A member reads its counters about once a second, never per token; what must be observed at each
event (a hop) goes into a Histogram, which costs a bisection and two additions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, NamedTuple

from pydantic import Field

SampleName = Annotated[str, Field(pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]{0,127}$")]
LabelName = Annotated[str, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]{0,63}$")]
LabelValue = Annotated[str, Field(max_length=128)]
Labels = Annotated[tuple[tuple[LabelName, LabelValue], ...], Field(max_length=8)]

HOP_BOUNDS_S = (*(m * 10.0**e for e in range(-5, 1) for m in (1.0, 2.5, 5.0)), 10.0)
"""Of the histograms of hops."""


class Sample(NamedTuple):
    """One series at one moment, named as Prometheus names it: `_total`, `_bucket`, `_sum`, ..

    The bounds are checked where a sample crosses to another process (experts/messages.py).
    """

    name: SampleName
    labels: Labels
    value: Annotated[float, Field(allow_inf_nan=False)]


class Histogram:
    """Counts by upper bound. One thread observes; others may read a sample late, never torn."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """bounds: ascending, without infinity."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        """What was observed up to now."""
        twin = Histogram(self.bounds)
        twin.counts, twin.total = self.counts.copy(), self.total
        return twin

    def samples(self, name: str, labels: Labels = ()) -> Iterator[Sample]:
        """Cumulative, as Prometheus has them: `le` is an upper bound that belongs to its bucket."""
        count = 0
        for series, number in zip(
            _buckets(name, labels, self.bounds), tuple(self.counts), strict=True
        ):
            count += number
            yield Sample(*series, count)
        yield Sample(f"{name}_sum", labels, self.total)
        yield Sample(f"{name}_count", labels, count)


@cache
def _buckets(
    name: str, labels: Labels, bounds: tuple[float, ...]
) -> tuple[tuple[SampleName, Labels], ...]:
    """Name and labels of each bucket: written once, not once a second (a third of the work)."""
    les = (*map(str, bounds), "+Inf")
    return tuple((f"{name}_bucket", (*labels, ("le", le))) for le in les)
