"""How many workers a tier should have. Pure: reports, time and memory come in, a target comes out.

Each worker reports the fraction of itself in use; their sum is the load, in workers. The pool
grows to the smallest size that keeps the mean at or below the target, and shrinks to the smallest
that keeps it at or below a lower mark: after a change the same load wants neither direction, so a
constant load moves the target one way only. In doubt nothing changes:

- a worker without a fresh, sane report counts as idle when growing and as full when shrinking,
  and the target is held when too few report;
- what a worker's averages say soon after the pool changed is the past: both delays start later;
- a queue that is too long although the workers look idle adds one worker;
- a pool that was too small comes back only when there is less to do, however idle its successor
  looks: that a queue is gone does not say that it would stay away;
- the hottest worker counts only against shrinking: if the mean is fine, placement has to move
  work, and the reason says so.

Nothing here raises: whatever goes wrong inside, the target is held and the reason tells what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from cluster.autoscaling.settings import AttentionScaling, ExpertScaling, Scaling
from cluster.autoscaling.stats import (
    AnyStats,
    AttentionStats,
    ExpertStats,
    read_stats,
)

AnyScaling = TypeVar("AnyScaling", bound=Scaling)
Cause = Literal[
    "steady",
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
"""Why the target is what it is, for counters: load, pressure (a queue), spare, bounds and coverage
change it; the others hold it."""

ROUNDING = 1e-6  # of sums of averages: 3.0000000001 workers are 3


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


@dataclass(frozen=True)
class Crowded:
    """A pool that was too small at this throughput, and would be again with as much to do."""

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


@dataclass(frozen=True)
class _Load:
    """A tier's reports, summed up. `use` is the fraction of a worker that is in use."""

    what: str
    """The use in words."""
    use: float
    """Sum over the workers that report: so many workers would be full."""
    num_reporting: int
    num_missing: int
    hottest: float
    high: float
    """Mean use above which the pool grows."""
    low: float
    """Mean use to which it may rise by shrinking."""
    throughput: float
    """Work done a second, all workers."""
    remedy: str
    """What helps when one worker is hot and the others are not, in words."""
    pressure: str = ""
    """A queue that is too long, in words."""
    stalled: str = ""
    """Why more workers would not help, in words."""
    ready: bool = True
    """Every worker takes part; one that has just started has no work yet."""
    complete: bool = True
    """Nothing is being loaded that requests wait for: the load seen is the load there is."""

    @property
    def mean(self) -> float:
        return self.use / self.num_reporting

    @property
    def shown(self) -> str:
        return f"{self.what} {self.mean:.2f} of {self.num_reporting} workers"


@dataclass(frozen=True)
class _Wish:
    """What the load of one moment asks for: at least `grow_to`, and `shrink_to` would do."""

    grow_to: int
    shrink_to: int
    cause: Cause
    reason: str


def decide_experts(
    state: PoolState, now_s: float, settings: ExpertScaling, memory: Memory
) -> Decision:
    """The size of the expert pool."""
    return _guarded(_decide_experts, state, now_s, settings, memory)


def decide_attention(
    state: PoolState, now_s: float, settings: AttentionScaling, memory: Memory
) -> Decision:
    """The number of attention workers."""
    return _guarded(_decide_attention, state, now_s, settings, memory)


def coverage(stats: Iterable[ExpertStats]) -> int:
    """Workers that hold every expert once, whichever of them are stopped; 1 if nothing is known.

    Serve chooses who stops, so the ones with the fewest slots may stay. Workers to come are taken
    for average ones.
    """
    known = list(stats)
    missing = max((one.num_experts for one in known), default=0.0)
    slots = sorted(one.num_slots for one in known)
    for number, more in enumerate(slots, start=1):
        missing -= more
        if missing <= ROUNDING:
            return number
    return len(slots) + _round_up(missing / (sum(slots) / len(slots))) if slots else 1


# --- the two tiers ---


def _decide_experts(
    state: PoolState, now_s: float, settings: ExpertScaling, memory: Memory
) -> Decision:
    stats = _fresh(ExpertStats, state, settings)
    if stats:
        memory = replace(memory, coverage=coverage(stats))
    if held := _blind(len(stats), state, now_s, settings, memory):
        return held
    queue_ms = sum(one.queue_p95_ms for one in stats) / len(stats)
    num_experts = max(one.num_experts for one in stats)
    load = _Load(
        what="busy",
        use=sum(one.busy_fraction for one in stats),
        num_reporting=len(stats),
        num_missing=max(0, state.num_running - len(stats)),
        hottest=max(one.busy_fraction for one in stats),
        high=settings.target_busy,
        low=settings.downscale_busy,
        throughput=sum(one.rows_per_s for one in stats),
        remedy="placement has to move work",
        pressure=f"queue p95 {queue_ms:.1f} ms exceeds {settings.max_queue_p95_ms:g} ms"
        if queue_ms > settings.max_queue_p95_ms
        else "",
        ready=all(one.num_held >= 0.5 for one in stats),
        complete=sum(one.num_held for one in stats) >= num_experts - 0.5,
    )
    return _settle(load, state, now_s, settings, memory)


def _decide_attention(
    state: PoolState, now_s: float, settings: AttentionScaling, memory: Memory
) -> Decision:
    stats = _fresh(AttentionStats, state, settings)
    if held := _blind(len(stats), state, now_s, settings, memory):
        return held
    capacity_tokens = sum(one.kv_capacity_tokens for one in stats) / len(stats)
    waiting_tokens = sum(one.waiting_tokens for one in stats)
    waiting_each = waiting_tokens / len(stats)
    throughput = sum(one.tokens_per_s for one in stats)
    running = sum(one.running_requests for one in stats)
    load = _Load(
        what="KV use with waiting prompts",
        use=sum(one.kv_use_fraction for one in stats) + waiting_tokens / capacity_tokens,
        num_reporting=len(stats),
        num_missing=max(0, state.num_running - len(stats)),
        hottest=max(one.kv_use_fraction for one in stats),
        high=settings.target_kv_use,
        low=settings.downscale_kv_use,
        throughput=throughput,
        remedy="requests have to be spread",
        pressure=f"{waiting_each:.0f} prompt tokens wait for each worker, more than "
        f"{settings.max_waiting_tokens}"
        if waiting_each > settings.max_waiting_tokens
        else "",
        stalled="requests are open but no token moves: the experts are not answering"
        if waiting_tokens + running >= 0.5 and throughput < ROUNDING
        else "",
    )
    return _settle(load, state, now_s, settings, memory)


def _fresh(kind: type[AnyStats], state: PoolState, settings: Scaling) -> list[AnyStats]:
    """The reports that count. A time in the future is as wrong as one long past."""
    young = (one for one in state.reports.values() if abs(one.age_s) <= settings.max_age_s)
    found = (read_stats(kind, one.values) for one in young)
    return [stats for stats in found if stats is not None]


def _blind(
    num_reporting: int, state: PoolState, now_s: float, settings: Scaling, memory: Memory
) -> Decision | None:
    """The target as it is, when too little is known; timers start anew."""
    if not math.isfinite(now_s):
        reason = f"the clock says {now_s}"
    elif state.num_running <= 0:
        reason = "no worker runs"  # so it looks, too, while Serve's controller recovers
    elif num_reporting < max(1, settings.min_reporting * state.num_running):
        reason = f"{num_reporting} of {state.num_running} workers have fresh, sane metrics"
    else:
        return None
    return _hold(state, settings, replace(memory, pool=None, direction=None), "unknown", reason)


# --- what both share ---


def _settle(
    load: _Load, state: PoolState, now_s: float, settings: Scaling, memory: Memory
) -> Decision:
    """From the wish of this moment to a target: bounds first, then delays and steps."""
    target, (lowest, highest) = state.target, _bounds(settings, memory)
    memory = _note(memory, load, state, now_s)
    if memory.coverage > highest or not lowest <= target <= highest:
        return _hold(state, settings, memory, "coverage", _out_of_room(settings, memory))
    wish = _wish(load, target, memory)
    wants_more = wish.grow_to > target
    if not wants_more and wish.shrink_to >= target:
        return Decision(target, wish.cause, wish.reason, replace(memory, direction=None))
    if target == (highest if wants_more else lowest):
        reason = f"{wish.reason}; {_limit(settings, memory, upper=wants_more)}"
        return Decision(target, "bounds", reason, replace(memory, direction=None))
    memory = _wait(memory, wish, "up" if wants_more else "down", now_s)
    delay_s = settings.upscale_delay_s if wants_more else settings.downscale_delay_s
    since_s = max(memory.direction_since_s, memory.pool_since_s + settings.settle_s)
    left_s = since_s + delay_s - now_s
    if left_s > ROUNDING:
        return Decision(target, "steady", f"{wish.reason}; {left_s:.1f} s to wait", memory)
    if not wants_more:
        new = max(memory.busiest, target - settings.max_step_down, lowest)
        return Decision(new, wish.cause, wish.reason, memory)
    new = min(wish.grow_to, target + settings.max_step_up, highest)
    crowded = Crowded(target, load.throughput)
    return Decision(new, wish.cause, wish.reason, replace(memory, crowded=crowded))


def _wait(memory: Memory, wish: _Wish, direction: Literal["up", "down"], now_s: float) -> Memory:
    """Count the time of this wish, and the most that it asked for meanwhile."""
    if direction != memory.direction or now_s < memory.direction_since_s:
        memory = replace(memory, direction=direction, direction_since_s=now_s, busiest=0)
    return replace(memory, busiest=max(memory.busiest, wish.shrink_to))


def _note(memory: Memory, load: _Load, state: PoolState, now_s: float) -> Memory:
    """Start the timers anew when the pool has changed, and forget a queue when the work is less.

    A target that was decided but not adopted yet leaves the pool, so the wish, as it is: Serve may
    have delays of its own, and would never see a wish that lasts one tick.
    """
    pool = (state.target, state.num_running, load.ready)
    if pool != memory.pool or now_s < memory.pool_since_s:
        memory = replace(memory, pool=pool, pool_since_s=now_s, direction=None)
    sure = load.complete and not (load.num_missing or load.stalled or load.pressure)
    if memory.crowded and sure:
        less = memory.crowded.throughput * load.low / load.high
        if load.throughput < less:
            memory = replace(memory, crowded=None)
    return memory


def _wish(load: _Load, target: int, memory: Memory) -> _Wish:
    if load.stalled:
        return _stay(target, "stalled", load.stalled)
    grow_to = _round_up(load.use / load.high)
    if grow_to > target:
        reason = f"{load.shown} would need {grow_to} to stay at {load.high:g}"
        return _Wish(grow_to, grow_to, "load", reason)
    num_running = memory.pool[1] if memory.pool else 0
    if load.pressure and load.ready and num_running >= target and not load.num_missing:
        return _Wish(target + 1, target + 1, "pressure", f"{load.pressure} at {load.shown}")
    if load.hottest > load.high:
        hottest = f"{load.shown}, the hottest {load.hottest:.2f}"
        return _stay(target, "skew", f"{hottest}: skew, not size, is the problem; {load.remedy}")
    return _shrink(load, target, num_running, memory)


def _shrink(load: _Load, target: int, num_running: int, memory: Memory) -> _Wish:
    """The smallest pool that would do, if it is smaller and nothing speaks against it."""
    shrink_to = max(1, _round_up((load.use + load.num_missing) / load.low))
    if shrink_to >= target:
        return _stay(target, "steady", f"{load.shown}: {target} are right")
    if load.pressure:
        return _stay(target, "steady", f"{load.pressure}, but workers are still starting")
    if not load.complete:
        return _stay(target, "steady", f"{load.shown}, but experts are still being loaded")
    if num_running < target and load.mean > load.low:
        return _stay(target, "steady", f"{load.shown}, {target - num_running} more are starting")
    if memory.crowded and shrink_to <= memory.crowded.num_workers:
        shrink_to = memory.crowded.num_workers + 1
        if shrink_to >= target:
            crowded = f"{memory.crowded.num_workers} were too few for as much work"
            return _stay(target, "steady", f"{load.shown}, but {crowded}")
    return _Wish(target, shrink_to, "spare", f"{load.shown}: {shrink_to} would do")


def _stay(target: int, cause: Cause, reason: str) -> _Wish:
    return _Wish(target, target, cause, reason)


def _bounds(settings: Scaling, memory: Memory) -> tuple[int, int]:
    lowest = max(settings.min_workers, memory.coverage)
    return min(lowest, settings.max_workers), settings.max_workers


def _out_of_room(settings: Scaling, memory: Memory) -> str:
    return (
        f"{memory.coverage} workers are needed to hold every expert, max_workers = "
        f"{settings.max_workers}: raise it, or the slots of a worker"
    )


def _limit(settings: Scaling, memory: Memory, *, upper: bool) -> str:
    """The bound that a wish met, in words."""
    if upper:
        return f"max_workers = {settings.max_workers}"
    if memory.coverage > settings.min_workers:
        return f"{memory.coverage} are needed to hold every expert"
    return f"min_workers = {settings.min_workers}"


def _hold(
    state: PoolState, settings: Scaling, memory: Memory, cause: Cause, reason: str
) -> Decision:
    """The present target, or the nearest one within the bounds."""
    lowest, highest = _bounds(settings, memory)
    target = min(max(state.target, lowest), highest)
    if target == state.target:
        return Decision(target, cause, f"held at {target}: {reason}", memory)
    limit = _limit(settings, memory, upper=target < state.target)
    needed = target > state.target and memory.coverage > settings.min_workers
    return Decision(target, "coverage" if needed else "bounds", limit, memory)


def _guarded(
    decide: Callable[[PoolState, float, AnyScaling, Memory], Decision],
    state: PoolState,
    now_s: float,
    settings: AnyScaling,
    memory: Memory,
) -> Decision:
    """An exception would stop Serve's controller from updating any application."""
    try:
        return decide(state, now_s, settings, memory)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return _hold(state, settings, memory, "error", " ".join(reason.split()))


def _round_up(workers: float) -> int:
    return math.ceil(workers - ROUNDING)
