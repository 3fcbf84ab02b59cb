"""Shares of the ceilings, and the goals. Pure.

No piece of work is faster than its bytes over the copy bandwidth, nor than its FLOPs over the
dense rate of its type: the longer of the two binds. A share is that time over the measured one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """`value` is that of the worst benchmark of the goal, None if none was measured."""

    goal: Goal
    value: float | None
    where: str
    """The worst benchmark's shape."""

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
    """(the ceiling that binds, the seconds it allows); None if one of the two is not known."""
    if COPY not in ceilings or (benchmark.flops and benchmark.rate not in ceilings):
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


def most_possible(benchmark: Benchmark, measure: Measure, ceilings: Ceilings) -> float | None:
    """What that value would be at the ceiling that binds: a goal above it cannot be met."""
    bound = binding(benchmark, ceilings)
    if bound is None or measure == "seconds":
        return bound and bound[1]
    name = {"bound": bound[0], "copy": COPY, "rate": benchmark.rate}[measure]
    done = benchmark.num_bytes if name == COPY else benchmark.flops
    return done / bound[1] / ceilings[name]


def verdicts(benchmarks: Sequence[Benchmark], ceilings: Ceilings) -> list[Verdict]:
    """One for each goal."""
    return [_verdict(key, goal, benchmarks, ceilings) for key, goal in GOALS.items()]


def _verdict(key: str, goal: Goal, benchmarks: Sequence[Benchmark], ceilings: Ceilings) -> Verdict:
    found = [
        (value, one.shape)
        for one in benchmarks
        if one.goal == key and (value := value_of(one, goal.measure, ceilings)) is not None
    ]
    if not found:
        return Verdict(goal, None, "")
    worst = max(found) if goal.measure == "seconds" else min(found)
    return Verdict(goal, *worst)
