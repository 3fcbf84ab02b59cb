"""How many workers a tier should have. Pure: reports, time and memory come in, a target comes out.

Each worker reports the fraction of itself in use; their sum is the load, in workers. The pool
grows to the smallest size that keeps the mean at or below the target, and shrinks to the smallest
that keeps it at or below a lower mark: after a change the same load wants neither direction, so a
constant load moves the target one way only. In doubt nothing changes:

- a worker without a fresh, sane report counts as idle when growing and as full when shrinking,
  and the target is held when too few report;
- what a worker's averages say soon after the pool changed is the past: both delays start later;
- a size that somebody asked for by command is kept, whatever the load, within the bounds;
- a queue that is too long although the workers look idle adds one worker;
- a pool that was too small comes back only when there is less to do, however idle its successor
  looks: that a queue is gone does not say that it would stay away;
- the hottest worker counts against shrinking: if the mean is fine, placement has to move work, and
  the reason says so; one that is all but full adds a worker, which takes copies of what is hot;
- a drained expert worker is neither capacity nor load: the others are sized without it, and it is
  one more. Serve may stop any of them; placement uses it again if one that works is stopped.

Nothing here raises: whatever goes wrong inside, the target is held and the reason tells what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from cluster.autoscaling.pool import Decision, Memory, PoolState
from cluster.autoscaling.settings import AttentionScaling, ExpertScaling, Scaling
from cluster.autoscaling.sizing import ROUNDING, Load, hold, round_up, settle
from cluster.autoscaling.stats import AnyStats, AttentionStats, ExpertStats, read_stats

AnyScaling = TypeVar("AnyScaling", bound=Scaling)


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

    Serve chooses who stops, so the ones with the fewest slots may stay, the drained first. Workers
    to come are taken for average ones of those that work.
    """
    known = list(stats)
    missing = max((one.num_experts for one in known), default=0.0)
    slots = sorted(0.0 if one.is_drained else one.num_slots for one in known)
    for number, held in enumerate(slots, start=1):
        missing -= held
        if missing <= ROUNDING:
            return number
    working = [number for number in slots if number]
    more = round_up(missing / (sum(working) / len(working))) if working else 0
    return max(1, len(slots) + more)


def _decide_experts(
    state: PoolState, now_s: float, settings: ExpertScaling, memory: Memory
) -> Decision:
    stats = _fresh(ExpertStats, state, settings)
    if stats:
        memory = replace(memory, coverage=coverage(stats))
    if set_by_hand := _by_command(state, settings, memory):
        return set_by_hand
    if held := _blind(len(stats), state, now_s, settings, memory):
        return held
    num_drained = sum(one.is_drained for one in stats)
    num_missing = max(0, state.num_running - len(stats))
    stats = [one for one in stats if not one.is_drained]
    if not stats:
        return hold(state, settings, memory, "unknown", "all workers that report are drained")
    queue_ms = sum(one.queue_p95_ms for one in stats) / len(stats)
    hottest = max(one.busy_fraction for one in stats)
    num_experts = max(one.num_experts for one in stats)
    load = Load(
        what="busy",
        use=sum(one.busy_fraction for one in stats),
        num_reporting=len(stats),
        num_missing=num_missing,
        num_drained=num_drained,
        hottest=hottest,
        high=settings.target_busy,
        low=settings.downscale_busy,
        throughput=sum(one.rows_per_s for one in stats),
        remedy="placement has to move work",
        pressure=_expert_pressure(queue_ms, hottest, settings),
        ready=all(one.num_held >= 0.5 for one in stats),
        complete=sum(one.num_held for one in stats) >= num_experts - 0.5,
    )
    return settle(load, state, now_s, settings, memory)


def _expert_pressure(queue_ms: float, hottest: float, settings: ExpertScaling) -> str:
    if queue_ms > settings.max_queue_p95_ms:
        return f"queue p95 {queue_ms:.1f} ms exceeds {settings.max_queue_p95_ms:g} ms"
    if hottest > settings.max_hottest_busy:
        return f"the hottest worker, which all wait for, is busy {hottest:.2f}"
    return ""


def _decide_attention(
    state: PoolState, now_s: float, settings: AttentionScaling, memory: Memory
) -> Decision:
    stats = _fresh(AttentionStats, state, settings)
    if set_by_hand := _by_command(state, settings, memory):
        return set_by_hand
    if held := _blind(len(stats), state, now_s, settings, memory):
        return held
    capacity_tokens = sum(one.kv_capacity_tokens for one in stats) / len(stats)
    waiting_tokens = sum(one.waiting_tokens for one in stats)
    waiting_each = waiting_tokens / len(stats)
    throughput = sum(one.tokens_per_s for one in stats)
    running = sum(one.running_requests for one in stats)
    load = Load(
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
    return settle(load, state, now_s, settings, memory)


def _fresh(kind: type[AnyStats], state: PoolState, settings: Scaling) -> list[AnyStats]:
    """The reports that count. A time in the future is as wrong as one long past."""
    young = (one for one in state.reports.values() if abs(one.age_s) <= settings.max_age_s)
    found = (read_stats(kind, one.values) for one in young)
    return [stats for stats in found if stats is not None]


def _by_command(state: PoolState, settings: Scaling, memory: Memory) -> Decision | None:
    """The size that was asked for, or the present one if only commands change it."""
    if state.commanded > 0 and state.num_running > 0:
        wanted = replace(state, target=state.commanded)
        memory = replace(memory, pool=None, direction=None)
        decision = hold(wanted, settings, memory, "command", "")
        if decision.cause == "command":
            return replace(decision, reason=f"{decision.target} were asked for (`shoal scale`)")
        return decision
    if not settings.follows_load:
        return Decision(state.target, "fixed", "the size changes by command only", memory)
    return None


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
    return hold(state, settings, replace(memory, pool=None, direction=None), "unknown", reason)


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
        return hold(state, settings, memory, "error", " ".join(reason.split()))
