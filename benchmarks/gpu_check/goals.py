"""Shares of the ceilings, and the goals. Pure.

No piece of work is faster than its bytes over the copy bandwidth, nor than its FLOPs over the
dense rate of its type: the longer of the two binds. A share is that time over the measured one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gpu_check.rows import COPY, Benchmark, Ceiling

Ceilings = Mapping[str, float]
"""Bytes/s of COPY, FLOP/s of each type."""
Measure = Literal["bound", "copy", "rate", "seconds"]


@dataclass(frozen=True)
class Goal:
    """measure: share of the ceiling that binds, of the copy bandwidth or of the dense rate of its
    type (at least `limit`), or seconds (at most)."""

    text: str
    measure: Measure
    limit: float


@dataclass(frozen=True)
class Verdict:
    """Of one benchmark that speaks to the goal; value None: it was not measured."""

    goal: Goal
    where: str
    value: float | None
    most_possible: float | None
    """The value at the ceiling that binds: a goal beyond it cannot be met."""

    @property
    def text(self) -> str:
        if self.value is None:
            return "not measured"
        if self.goal.measure == "seconds":
            return "met" if self.value <= self.goal.limit else "missed"
        return "met" if self.value >= self.goal.limit else "missed"


GOALS: dict[str, Goal] = {
    "mla-decode": Goal("MLA decode, 128 heads, bf16, batch 64-256, context 4-8k", "bound", 0.70),
    "grouped-bf16": Goal("grouped GEMM, V3, 32 local experts, 4k rows, bf16", "rate", 0.70),
    "grouped-fp8": Goal("grouped GEMM, V3, 32 local experts, 4k rows, fp8", "rate", 0.60),
    "grouped-few-rows": Goal("the same, 64 rows in all", "copy", 0.80),
    "routing": Goal("gate + dispatch + combine, 4k tokens", "seconds", 60e-6),
    "lite-decode": Goal("V2-Lite decode, batch 64, context 1k, inline", "bound", 0.50),
}


def ceilings_of(rows: Sequence[Ceiling]) -> dict[str, float]:
    """Those that were measured."""
    return {row.name: row.value for row in rows if row.value is not None}


def binding(benchmark: Benchmark, ceilings: Ceilings) -> tuple[str, float] | None:
    """(the ceiling that binds, the seconds it allows); None if a ceiling is not known, and for
    what is not bound by one."""
    if not benchmark.num_bytes or COPY not in ceilings:
        return None
    if benchmark.flops and benchmark.rate not in ceilings:
        return None
    moving = (COPY, benchmark.num_bytes / ceilings[COPY])
    if not benchmark.flops:
        return moving
    return max(moving, (benchmark.rate, benchmark.flops / ceilings[benchmark.rate]), key=_seconds)


def _seconds(bound: tuple[str, float]) -> float:
    return bound[1]


def value_of(benchmark: Benchmark, measure: Measure, ceilings: Ceilings) -> float | None:
    """What a goal of this measure compares; None if it was not measured."""
    seconds = benchmark.seconds
    if seconds is None or measure == "seconds":
        return seconds
    if measure == "bound":
        bound = binding(benchmark, ceilings)
        return bound and bound[1] / seconds
    name = COPY if measure == "copy" else benchmark.rate
    done = benchmark.num_bytes if measure == "copy" else benchmark.flops
    return done / seconds / ceilings[name] if name in ceilings else None


def best_value(benchmark: Benchmark, measure: Measure, ceilings: Ceilings) -> float | None:
    """What that value would be at the ceiling that binds."""
    bound = binding(benchmark, ceilings)
    return bound and value_of(replace(benchmark, seconds=bound[1]), measure, ceilings)


def verdicts(benchmarks: Sequence[Benchmark], ceilings: Ceilings) -> list[Verdict]:
    """One for each benchmark that speaks to a goal; one for a goal that none speaks to."""
    return [
        verdict
        for key, goal in GOALS.items()
        for verdict in _verdicts(goal, [one for one in benchmarks if one.goal == key], ceilings)
    ]


def _verdicts(goal: Goal, found: Sequence[Benchmark], ceilings: Ceilings) -> list[Verdict]:
    if not found:
        return [Verdict(goal, "", None, None)]
    return [
        Verdict(
            goal,
            one.shape,
            value_of(one, goal.measure, ceilings),
            best_value(one, goal.measure, ceilings),
        )
        for one in found
    ]
