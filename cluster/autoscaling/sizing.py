"""From the load of a tier to its size: what both tiers share. Pure; policy.py has the rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from cluster.autoscaling.pool import Cause, Crowded, Decision, Memory, PoolState
from cluster.autoscaling.settings import Scaling

ROUNDING = 1e-6  # of sums of averages: 3.0000000001 workers are 3


@dataclass(frozen=True)
class Load:
    """A tier's reports, summed up. `use` is the fraction of a worker that is in use."""

    what: str
    """The use in words."""
    use: float
    """Sum over the workers that report: so many workers would be full."""
    num_reporting: int
    num_missing: int
    """Workers that run and do not report."""
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
    num_drained: int = 0
    """Workers beside those that report, which shall not work: every size is that much larger."""

    @property
    def mean(self) -> float:
        return self.use / self.num_reporting

    @property
    def shown(self) -> str:
        beside = f" beside {self.num_drained} drained" if self.num_drained else ""
        return f"{self.what} {self.mean:.2f} of {self.num_reporting} workers{beside}"


@dataclass(frozen=True)
class Wish:
    """What the load of one moment asks for: at least `grow_to`, and `shrink_to` would do.

    Sizes of `_wish` and below are without drained workers.
    """

    grow_to: int
    shrink_to: int
    cause: Cause
    reason: str


def settle(
    load: Load, state: PoolState, now_s: float, settings: Scaling, memory: Memory
) -> Decision:
    """From the wish of this moment to a target: bounds first, then delays and steps."""
    target, (lowest, highest) = state.target, _bounds(settings, memory)
    memory = _note(memory, load, state, now_s)
    if memory.coverage > highest or not lowest <= target <= highest:
        return hold(state, settings, memory, "coverage", _out_of_room(settings, memory))
    drained = load.num_drained
    wish = _wish(load, target - drained, memory)
    wish = replace(wish, grow_to=wish.grow_to + drained, shrink_to=wish.shrink_to + drained)
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
    crowded = Crowded(target - drained, load.throughput)
    return Decision(new, wish.cause, wish.reason, replace(memory, crowded=crowded))


def _wait(memory: Memory, wish: Wish, direction: Literal["up", "down"], now_s: float) -> Memory:
    """Count the time of this wish, and the most that it asked for meanwhile."""
    if direction != memory.direction or now_s < memory.direction_since_s:
        memory = replace(memory, direction=direction, direction_since_s=now_s, busiest=0)
    return replace(memory, busiest=max(memory.busiest, wish.shrink_to))


def _note(memory: Memory, load: Load, state: PoolState, now_s: float) -> Memory:
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


def _wish(load: Load, target: int, memory: Memory) -> Wish:
    if load.stalled:
        return _stay(target, "stalled", load.stalled)
    grow_to = round_up(load.use / load.high)
    if grow_to > target:
        reason = f"{load.shown} would need {grow_to} to stay at {load.high:g}"
        return Wish(grow_to, grow_to, "load", reason)
    num_running = memory.pool[1] - load.num_drained if memory.pool else 0
    if load.pressure and load.ready and num_running >= target and not load.num_missing:
        return Wish(target + 1, target + 1, "pressure", f"{load.pressure} at {load.shown}")
    if load.hottest > load.high:
        hottest = f"{load.shown}, the hottest {load.hottest:.2f}"
        return _stay(target, "skew", f"{hottest}: skew, not size, is the problem; {load.remedy}")
    return _shrink(load, target, num_running, memory)


def _shrink(load: Load, target: int, num_running: int, memory: Memory) -> Wish:
    """The smallest pool that would do, if it is smaller and nothing speaks against it."""
    shrink_to = max(1, round_up((load.use + load.num_missing) / load.low))
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
    return Wish(target, shrink_to, "spare", f"{load.shown}: {shrink_to} would do")


def _stay(target: int, cause: Cause, reason: str) -> Wish:
    return Wish(target, target, cause, reason)


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


def hold(
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


def round_up(workers: float) -> int:
    return math.ceil(workers - ROUNDING)
