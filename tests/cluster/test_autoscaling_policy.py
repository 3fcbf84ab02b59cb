"""The sizes of the tiers, with numbers to check by hand, a simulated pool and a fake clock."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import timeit
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaling.policy import coverage, decide_attention, decide_experts
from cluster.autoscaling.pool import Crowded, Decision, Memory, PoolState, Report
from cluster.autoscaling.settings import AttentionScaling, ExpertScaling
from cluster.autoscaling.stats import ExpertStats

CALM = settings(deadline=None, max_examples=60)
PROMPT = ExpertScaling(
    max_workers=20, upscale_delay_s=0, downscale_delay_s=0, settle_s=0, max_step_up=20
)
"""Decides at once: target_busy 0.6, downscale_busy 0.45, queue 20 ms."""
PATIENT = ExpertScaling(
    max_workers=20, upscale_delay_s=2, downscale_delay_s=60, settle_s=5, max_step_up=20
)
PROMPT_ATTENTION = AttentionScaling(
    max_workers=20, upscale_delay_s=0, downscale_delay_s=0, settle_s=0, max_step_up=20
)
"""target_kv_use 0.7, downscale_kv_use 0.5, 4096 waiting tokens."""


def worker(busy: float = 0.5, **changes: float) -> Report:
    """An expert worker with 8 of the model's 16 experts; age_s is that of its report."""
    age_s = changes.pop("age_s", 0.0)
    values = dict(busy_fraction=busy, queue_p95_ms=1.0, rows_per_s=1000 * busy)
    values |= dict(num_held=8.0, num_slots=8.0, num_experts=16.0)
    return Report(values | changes, age_s)


def front(kv_use: float = 0.5, **changes: float) -> Report:
    """An attention worker with a cache of 8000 tokens."""
    values = dict(kv_use_fraction=kv_use, kv_capacity_tokens=8000.0, waiting_tokens=0.0)
    values |= dict(waiting_requests=0.0, running_requests=4.0, tokens_per_s=1000.0)
    return Report(values | changes)


def pool(*reports: Report, target: int = 0, num_running: int = 0) -> PoolState:
    """Without more, as many as report are running and wanted."""
    running = num_running or len(reports)
    return PoolState(
        target or running, running, {f"w{i}": report for i, report in enumerate(reports)}
    )


def decide(state: PoolState, scaling: ExpertScaling = PROMPT, now_s: float = 0.0) -> Decision:
    return decide_experts(state, now_s, scaling, Memory())


def decide_front(state: PoolState) -> Decision:
    return decide_attention(state, 0.0, PROMPT_ATTENTION, Memory())


# --- the size ---


def test_grows_to_the_smallest_pool_below_the_target() -> None:
    # 4 x 0.9 = 3.6 workers of load; 3.6 / 0.6 = 6
    decision = decide(pool(*[worker(0.9)] * 4))
    assert (decision.target, decision.cause) == (6, "load")
    assert decision.reason == "busy 0.90 of 4 workers would need 6 to stay at 0.6"


def test_shrinks_to_the_smallest_pool_below_the_lower_mark() -> None:
    # 8 x 0.2 = 1.6; 1.6 / 0.45 = 3.6, so 4; one at a time unless told otherwise
    state = pool(*[worker(0.2)] * 8)
    assert decide(state).target == 7
    decision = decide(state, PROMPT.model_copy(update={"max_step_down": 20}))
    assert (decision.target, decision.cause) == (4, "spare")


@pytest.mark.parametrize("busy", [0.46, 0.5, 0.6])
def test_stays_between_the_marks(busy: float) -> None:
    # 10 x 0.46 = 4.6, which 11 would hold at 0.45 and 8 at 0.6
    assert decide(pool(*[worker(busy)] * 10)).target == 10


def test_a_step_up_is_bounded() -> None:
    scaling = PROMPT.model_copy(update={"max_step_up": 3})
    assert decide(pool(*[worker(1.0)] * 6), scaling).target == 9  # 10 would be needed


def test_what_is_starting_is_not_asked_for_again() -> None:
    # 2 of 4 run, full: 2 / 0.6 = 4 are needed and 4 are coming
    assert decide(pool(worker(1.0), worker(1.0), target=4)).target == 4


def test_full_workers_keep_those_that_are_starting() -> None:
    # 1 of 6 came back and is full: its 1.0 says nothing of the load there is
    state = pool(worker(1.0, num_held=16), target=6)
    assert decide(state).target == 6
    # at 0.2 it shows all the load there is
    assert decide(pool(worker(0.2, num_held=16), target=6)).target == 5


def test_a_new_worker_without_work_counts_with_the_others() -> None:
    # 3 x 0.9 / 0.6 = 4.5, so 5, of which 4 run
    assert decide(pool(*[worker(0.9)] * 3, worker(0.0, num_held=0), target=5)).target == 5


# --- by command ---


def test_a_command_is_obeyed_whatever_the_load_and_kept() -> None:
    state = replace(pool(*[worker(0.9)] * 4), commanded=3)
    decision = decide(state, PATIENT)
    assert (decision.target, decision.cause) == (3, "command")
    again = decide_experts(replace(state, target=3), 100.0, PATIENT, decision.memory)
    assert (again.target, again.cause) == (3, "command")


def test_a_command_stays_within_coverage_and_bounds() -> None:
    idle = worker(0.0, num_experts=20)
    assert decide(replace(pool(*[idle] * 4), commanded=1)).target == 3
    assert decide(replace(pool(*[idle] * 4), commanded=99)).target == PROMPT.max_workers


def test_a_command_needs_no_other_metrics() -> None:
    decision = decide(PoolState(2, 2, {}, commanded=4))
    assert decision.target == 4


def test_a_tier_of_fixed_size_ignores_the_load() -> None:
    fixed = PROMPT.model_copy(update={"follows_load": False})
    assert decide(pool(*[worker(1.0)] * 4), fixed).target == 4
    assert decide(pool(*[worker(0.0)] * 4), fixed).target == 4
    assert decide(replace(pool(*[worker(0.0)] * 4), commanded=6), fixed).target == 6


# --- bounds and coverage ---


def test_never_fewer_than_hold_every_expert() -> None:
    # 20 experts, 8 slots each: 3 workers, however idle
    idle = worker(0.0, num_experts=20)
    decision = decide(pool(*[idle] * 3))
    assert (decision.target, decision.cause) == (3, "bounds")
    assert decision.reason.endswith("3 are needed to hold every expert")


def test_too_small_a_pool_grows_to_coverage_at_once() -> None:
    decision = decide(pool(worker(0.1, num_experts=20)), PATIENT)
    assert (decision.target, decision.cause) == (3, "coverage")


def test_max_workers_is_stronger_than_coverage_and_the_reason_says_so() -> None:
    scaling = PROMPT.model_copy(update={"max_workers": 2})
    decision = decide(pool(*[worker(0.1, num_experts=20)] * 2), scaling)
    assert decision.target == 2
    assert "3 workers are needed to hold every expert, max_workers = 2" in decision.reason


def test_a_target_outside_the_bounds_comes_back_at_once() -> None:
    scaling = PATIENT.model_copy(update={"min_workers": 2, "max_workers": 4})
    assert decide(pool(*[worker(0.5)] * 6), scaling).target == 4
    assert decide(pool(worker(0.5, num_slots=16)), scaling).target == 2


def test_more_load_than_max_workers_is_told() -> None:
    decision = decide(
        pool(*[worker(1.0)] * 4), ExpertScaling(max_workers=4, settle_s=0, upscale_delay_s=0)
    )
    assert (decision.target, decision.cause) == (4, "bounds")
    assert decision.reason.endswith("would need 7 to stay at 0.6; max_workers = 4")


@pytest.mark.parametrize(
    ("slots", "experts", "workers"),
    [
        ([8, 8], 16, 2),
        ([8, 8], 17, 3),
        ([8], 64, 8),
        ([100, 10, 100, 100], 250, 4),  # 10 + 100 + 100 may be the ones that stay
        ([100, 10, 100, 100], 210, 3),
        ([10, 20], 60, 4),  # 30, and two more of 15
        ([8, 0, 8], 16, 3),  # the drained one may stay and one of the others go
        ([8, 0], 16, 3),  # one more of 8
        ([0, 0], 16, 2),
    ],
)
def test_coverage_whoever_stays(slots: list[int], experts: int, workers: int) -> None:
    reports = [worker(num_slots=number, num_experts=experts) for number in slots]
    assert coverage(ExpertStats.model_validate(one.values) for one in reports) == workers


def test_coverage_is_remembered_while_nobody_reports() -> None:
    known = decide(pool(*[worker(0.3, num_experts=20)] * 3)).memory
    decision = decide_experts(PoolState(2, 2), 1.0, PROMPT, known)
    assert (decision.target, decision.cause) == (3, "coverage")


# --- drained workers ---

DRAINED = worker(0.0, num_slots=0, num_held=0)


def test_a_drained_worker_is_no_coverage() -> None:
    """8 slots each and 16 experts: Serve might stop one of the two that work."""
    idle = worker(0.0)
    decision = decide(pool(DRAINED, idle, idle))
    assert (decision.target, decision.cause) == (3, "bounds")
    assert decision.reason.endswith(
        "beside 1 drained: 1 would do; 3 are needed to hold every expert"
    )


def test_a_drained_worker_is_no_capacity() -> None:
    # 2 x 0.9 / 0.6 = 3 that work; 3 are there, of which 2 do
    decision = decide(pool(DRAINED, worker(0.9), worker(0.9)))
    assert (decision.target, decision.cause) == (4, "load")
    assert decision.reason == (
        "busy 0.90 of 2 workers beside 1 drained would need 3 to stay at 0.6"
    )
    # 6 x 0.2 / 0.45: 3 of them would do, the drained one is a fourth
    scaling = PROMPT.model_copy(update={"max_step_down": 20})
    assert decide(pool(DRAINED, *[worker(0.2)] * 6), scaling).target == 4
    # between the marks nothing changes: 2 x 0.5 = 1.0, not 1.0 of 3
    assert decide(pool(DRAINED, worker(0.5), worker(0.5))).target == 3


def test_a_drained_worker_is_not_one_that_starts() -> None:
    queue = worker(0.3, queue_p95_ms=30)
    decision = decide(pool(DRAINED, queue, queue))
    assert (decision.target, decision.cause) == (4, "pressure")
    assert decision.reason.startswith("queue p95 30.0 ms exceeds")
    assert decision.memory.crowded == Crowded(num_workers=2, throughput=600)
    same = decide_experts(pool(DRAINED, *[worker(0.2)] * 3), 1, PROMPT, decision.memory)
    assert same.target == 4 and same.reason.endswith("2 were too few for as much work")


def test_drained_workers_alone_hold_the_target() -> None:
    decision = decide(pool(DRAINED, DRAINED))
    assert (decision.target, decision.cause) == (2, "unknown")
    assert decision.reason == "held at 2: all workers that report are drained"


# --- metrics that are missing, old or absurd ---


def test_no_running_worker_holds_the_target() -> None:
    """Serve's controller sees none while it recovers; a lower answer would stop healthy ones."""
    decision = decide(PoolState(target=3, num_running=0))
    assert (decision.target, decision.cause) == (3, "unknown")
    assert decision.reason == "held at 3: no worker runs"


ABSURD = [
    {},
    {"busy_fraction": 0.1},
    {**worker().values, "busy_fraction": math.nan},
    {**worker().values, "busy_fraction": -0.5},
    {**worker().values, "busy_fraction": 37.0},
    {**worker().values, "rows_per_s": math.inf},
    {**worker().values, "queue_p95_ms": None},
    {**worker().values, "num_slots": -1},
    {**worker().values, "num_experts": "many"},
]


@pytest.mark.parametrize("values", ABSURD)
def test_an_absurd_report_is_no_report(values: dict[str, Any]) -> None:
    bad = Report(values)
    held = decide(pool(bad, bad, bad))
    assert (held.target, held.cause) == (3, "unknown")
    # 3 good ones of 4 are enough: 2.7 / 0.6 = 4.5
    assert decide(pool(*[worker(0.9)] * 3, bad)).target == 5


@pytest.mark.parametrize("age_s", [11.0, -11.0, math.nan, math.inf])
def test_old_reports_do_not_count(age_s: float) -> None:
    decision = decide(pool(*[worker(1.0, age_s=age_s)] * 3))
    assert decision.reason == "held at 3: 0 of 3 workers have fresh, sane metrics"


def test_too_few_reports_hold_the_target() -> None:
    assert decide(pool(worker(1.0), num_running=3)).target == 3
    assert decide(pool(worker(1.0), worker(1.0), num_running=3)).target == 4  # 2 / 0.6


def test_who_does_not_report_is_idle_for_growing_and_full_for_shrinking() -> None:
    # growing: 3 x 0.7 = 2.1, so 4 are enough; shrinking: (3 x 0.1 + 1) / 0.45 = 2.9, so 3
    assert decide(pool(*[worker(0.7)] * 3, num_running=4)).target == 4
    reports = [worker(0.1, num_held=16)] * 3
    assert decide(pool(*reports, num_running=4)).target == 3
    assert decide(pool(*reports, num_running=3)).target == 2
    assert decide(pool(*[worker(0.3, num_held=16)] * 3, num_running=4)).target == 4  # 1.9 / 0.45


def test_nothing_raises() -> None:
    state = pool(worker(0.9, num_held=16, num_slots=16))
    broken = replace(state, reports=None)  # type: ignore[arg-type]
    decision = decide(broken)
    assert (decision.target, decision.cause) == (1, "error")
    assert decision.reason.startswith("held at 1: AttributeError: ")
    assert decide(state, now_s=math.nan).reason == "held at 1: the clock says nan"


# --- time ---


def run(states: list[tuple[float, PoolState]], scaling: ExpertScaling = PATIENT) -> list[int]:
    """Targets decided at each time; the state's own target stays as given."""
    memory, targets = Memory(), []
    for now_s, state in states:
        decision = decide_experts(state, now_s, scaling, memory)
        memory = decision.memory
        targets.append(decision.target)
    return targets


def test_grows_after_the_pool_settled_and_the_delay() -> None:
    busy = pool(worker(0.9), worker(0.9))  # 1.8 / 0.6 = 3
    # settled 5 s after it was first seen, 2 s more
    assert run([(t, busy) for t in (0.0, 3.0, 6.9, 7.0)]) == [2, 2, 2, 3]


def test_a_break_starts_the_delay_anew() -> None:
    busy, calm = pool(worker(0.9), worker(0.9)), pool(worker(0.5), worker(0.5))
    states = [(0, calm), (10, busy), (11, calm), (12, busy), (13.9, busy), (14, busy)]
    assert run(states) == [2, 2, 2, 2, 2, 3]


def test_a_decision_is_repeated_until_it_is_adopted() -> None:
    """Serve may delay it, and starts counting anew when the policy changes its mind."""
    busy = pool(worker(0.9), worker(0.9))
    assert run([(t, busy) for t in (0, 7, 7.1, 20)]) == [2, 3, 3, 3]


def test_shrinks_to_what_the_busiest_moment_of_the_delay_needed() -> None:
    scaling = PATIENT.model_copy(update={"max_step_down": 20})
    calm, less_calm = pool(*[worker(0.1)] * 8), pool(*[worker(0.3)] * 8)
    # 0.8 / 0.45: 2; 2.4 / 0.45: 6
    assert run([(0, calm), (30, less_calm), (64, calm), (65, calm)], scaling) == [8, 8, 8, 6]


def test_a_clock_that_jumps_back_waits_again() -> None:
    busy = pool(worker(0.9), worker(0.9))
    assert run([(1000, busy), (1003, busy), (0, busy), (6.9, busy), (7, busy)]) == [2, 2, 2, 2, 3]


def test_missing_metrics_start_the_delays_anew() -> None:
    busy, blind = pool(worker(0.9), worker(0.9)), PoolState(2, 2)
    assert run([(0, busy), (6, busy), (6.5, blind), (7, busy), (14, busy)]) == [2, 2, 2, 2, 3]


# --- queues and skew ---


def test_a_queue_adds_a_worker_although_they_look_idle() -> None:
    decision = decide(pool(*[worker(0.3, queue_p95_ms=30)] * 2))
    assert (decision.target, decision.cause) == (3, "pressure")
    assert decision.reason == "queue p95 30.0 ms exceeds 20 ms at busy 0.30 of 2 workers"


def test_a_queue_waits_for_workers_that_start_or_hold_nothing_yet() -> None:
    queue = worker(0.5, queue_p95_ms=90)
    assert decide(pool(queue, queue, target=3)).target == 3
    assert decide(pool(queue, queue, worker(0.0, num_held=0))).target == 3


def test_a_queue_that_growing_removed_does_not_come_back_by_shrinking() -> None:
    queue = [worker(0.3, queue_p95_ms=30)] * 2
    grown = decide(pool(*queue)).memory
    assert grown.crowded == Crowded(num_workers=2, throughput=600)
    # 3 x 0.2 = 0.6 workers, for which 2 would do by their use; as much to do as with the queue
    same = decide_experts(pool(*[worker(0.2)] * 3), 1, PROMPT, grown)
    assert same.target == 3
    assert same.reason.endswith("2 were too few for as much work")
    # 0.45 / 0.6 x 600 = 450 rows/s: below, the queue is forgotten
    assert decide_experts(pool(*[worker(0.14)] * 3), 2, PROMPT, same.memory).target == 2


def test_skew_is_told_and_does_not_change_the_size() -> None:
    # mean 0.4: 1.6 / 0.45 = 4
    decision = decide(pool(worker(0.85), *[worker(0.2)] * 3))
    assert (decision.target, decision.cause) == (4, "skew")
    assert decision.reason == (
        "busy 0.36 of 4 workers, the hottest 0.85: skew, not size, is the problem; "
        "placement has to move work"
    )
    # the mean queue is 25 / 4 ms
    assert decide(pool(worker(0.5, queue_p95_ms=25), *[worker(0.5)] * 3)).target == 4


def test_a_worker_that_is_all_but_full_gets_help() -> None:
    decision = decide(pool(worker(0.95), *[worker(0.2)] * 3))
    assert (decision.target, decision.cause) == (5, "pressure")
    assert decision.reason == (
        "the hottest worker, which all wait for, is busy 0.95 at busy 0.39 of 4 workers"
    )


def test_a_skewed_pool_does_not_shrink() -> None:
    assert decide(pool(worker(0.9), *[worker(0.0)] * 7)).target == 8


def test_a_pool_that_lacks_experts_does_not_shrink() -> None:
    """What waits for lost experts is no load, yet."""
    decision = decide(pool(*[worker(0.0, num_held=5)] * 3))  # 15 of 16
    assert decision.target == 3
    assert "experts are still being loaded" in decision.reason


# --- attention ---


def test_attention_grows_by_cache_and_by_what_waits_for_it() -> None:
    # 2 x 0.8 / 0.7 = 2.3
    assert decide_front(pool(front(0.8), front(0.8))).target == 3
    # 2 x 0.6 and 2 x 2400 of 8000 tokens: 1.8 / 0.7 = 2.6
    decision = decide_front(pool(*[front(0.6, waiting_tokens=2400)] * 2))
    assert (decision.target, decision.cause) == (3, "load")


def test_attention_shrinks_when_the_caches_are_empty() -> None:
    # 4 x 0.3 / 0.5 = 2.4; one at a time
    assert decide_front(pool(*[front(0.3)] * 4)).target == 3
    assert decide_front(pool(*[front(0.4)] * 4)).target == 4  # 1.6 / 0.5 = 3.2


def test_a_backlog_of_prompts_adds_a_worker_although_the_caches_are_empty() -> None:
    state = pool(*[front(0.1, waiting_tokens=5000, kv_capacity_tokens=1e6)] * 2)
    decision = decide_front(state)
    assert (decision.target, decision.cause) == (3, "pressure")
    assert decision.reason.startswith("5000 prompt tokens wait for each worker, more than 4096")
    # without the backlog, at the same tokens/s, the two are not enough
    calm = pool(*[front(0.1, tokens_per_s=700)] * 3)
    assert decide_attention(calm, 1, PROMPT_ATTENTION, decision.memory).target == 3


def test_attention_that_waits_for_experts_does_not_scale() -> None:
    stalled = pool(*[front(0.9, waiting_tokens=9000, tokens_per_s=0)] * 2)
    decision = decide_front(stalled)
    assert (decision.target, decision.cause) == (2, "stalled")


def test_attention_holds_without_metrics() -> None:
    assert decide_front(PoolState(3, 3)).target == 3
    assert decide_front(PoolState(3, 0)).target == 3


# --- properties ---

ANYTHING = st.one_of(
    st.floats(),
    st.floats(0, 1),
    st.floats(0, 1e5),
    st.integers(-3, 100),
    st.none(),
    st.text(max_size=3),
)
NAMES = list(ExpertStats.model_fields)
WILD = st.builds(
    Report, st.dictionaries(st.sampled_from(NAMES), ANYTHING), st.one_of(st.floats(), st.just(0.0))
)
SANE = st.builds(
    worker,
    st.floats(0, 1),
    queue_p95_ms=st.floats(0, 100),
    num_held=st.integers(0, 12),
    num_slots=st.integers(0, 12),
    num_experts=st.just(16),
    age_s=st.floats(0, 15),
)


@st.composite
def pools(draw: st.DrawFn) -> PoolState:
    reports = draw(st.lists(st.one_of(WILD, SANE), max_size=6))
    running = draw(st.integers(0, 8))
    return replace(pool(*reports), target=draw(st.integers(0, 30)), num_running=running)


SCALINGS = st.builds(
    lambda low, more, **rest: ExpertScaling(min_workers=low, max_workers=low + more, **rest),
    st.integers(1, 6),
    st.integers(0, 6),
    upscale_delay_s=st.sampled_from([0, 2]),
    downscale_delay_s=st.sampled_from([0, 5]),
    settle_s=st.sampled_from([0, 5]),
    max_step_up=st.integers(1, 8),
    max_step_down=st.integers(1, 8),
)


@CALM
@given(st.lists(pools(), min_size=1, max_size=6), SCALINGS)
def test_always_within_the_bounds_and_never_below_coverage(
    states: list[PoolState], scaling: ExpertScaling
) -> None:
    memory = Memory()
    for second, state in enumerate(states):
        decision = decide_experts(state, float(second), scaling, memory)
        memory = decision.memory
        lowest = min(max(scaling.min_workers, memory.coverage), scaling.max_workers)
        assert lowest <= decision.target <= scaling.max_workers
        assert decision.cause != "error", decision.reason
        assert decision.reason and "\n" not in decision.reason
        if lowest <= state.target <= scaling.max_workers:
            step = decision.target - state.target
            assert -scaling.max_step_down <= step <= scaling.max_step_up


@CALM
@given(st.integers(1, 20), st.integers(0, 20), st.lists(WILD, max_size=3))
def test_holds_when_less_than_half_report(target: int, running: int, wild: list[Report]) -> None:
    reports = [replace(one, age_s=math.inf) for one in wild]
    state = replace(pool(*reports), target=target, num_running=running)
    assert decide(state).target == target


@CALM
@given(st.floats(0, 12), st.integers(1, 20), st.integers(1, 5), st.integers(1, 5))
def test_a_constant_load_moves_the_target_one_way_only(
    load: float, target: int, up: int, down: int
) -> None:
    scaling = PROMPT.model_copy(update={"max_step_up": up, "max_step_down": down})
    memory, targets = Memory(), [target]
    for second in range(40):
        busy = min(1.0, load / target)
        state = pool(*[worker(busy, num_experts=1, num_held=1)] * target)
        decision = decide_experts(state, float(second), scaling, memory)
        memory, target = decision.memory, decision.target
        targets.append(target)
    steps = [after - before for before, after in zip(targets, targets[1:], strict=False)]
    assert not (min(steps) < 0 < max(steps)), targets
    assert target == 20 or load / target <= 0.6 + 1e-6  # and it gets there


@CALM
@given(st.integers(2, 20), st.lists(st.floats(0, 1), min_size=5, max_size=60))
def test_load_within_the_band_never_changes_the_target(target: int, swing: list[float]) -> None:
    low, high = 0.45 * (target - 1) + 1e-3, 0.6 * target
    memory = Memory()
    for second, share in enumerate(swing):
        busy = (low + share * (high - low)) / target
        state = pool(*[worker(busy, num_experts=1, num_held=1)] * target)
        decision = decide_experts(state, float(second), PROMPT, memory)
        memory = decision.memory
        assert decision.target == target


@CALM
@given(st.floats(0.1, 3), st.integers(1, 6))
def test_a_queue_that_depends_on_the_size_makes_no_flapping(load: float, crowded: int) -> None:
    """Up to `crowded` workers have a queue, however idle they are."""
    memory, target, targets = Memory(), 1, []
    for second in range(40):
        queue_ms = 50 if target <= crowded else 1
        one = worker(min(1.0, load / target), queue_p95_ms=queue_ms, num_experts=1, num_held=1)
        one = replace(one, values={**one.values, "rows_per_s": 1000 * load / target})
        decision = decide_experts(pool(*[one] * target), float(second), PROMPT, memory)
        memory, target = decision.memory, decision.target
        targets.append(target)
    assert targets == sorted(targets)
    assert target == max(crowded + 1, math.ceil(load / 0.6 - 1e-6))


# --- a pool that takes time to start and averages over a window ---


@dataclass
class Simulation:
    """Seconds of a pool as Serve runs it: workers start late, reports are means of 5 s."""

    scaling: ExpertScaling
    target: int
    start_s: int = 4
    now_s: int = 0
    memory: Memory = field(default_factory=Memory)
    starting: list[int] = field(default_factory=list)  # when they will run
    running: list[deque[float]] = field(default_factory=list)  # busy of the last 5 s
    targets: list[int] = field(default_factory=list)
    worker_seconds: int = 0

    def __post_init__(self) -> None:
        self.running = [deque(maxlen=5) for _ in range(self.target)]

    def second(self, load: float) -> None:
        """One second with so many workers' worth of load."""
        self.now_s += 1
        while self.starting and self.starting[0] <= self.now_s:
            self.starting.pop(0)
            self.running.append(deque(maxlen=5))
        for window in self.running:
            window.append(min(1.0, load / len(self.running)))
        reports = [
            worker(sum(w) / len(w), num_experts=1, num_held=1, age_s=1.0) for w in self.running
        ]
        state = replace(pool(*reports), target=self.target)
        decision = decide_experts(state, float(self.now_s), self.scaling, self.memory)
        self.memory = decision.memory
        self._adopt(decision.target)
        self.worker_seconds += len(self.running) + len(self.starting)

    def _adopt(self, target: int) -> None:
        self.starting += [self.now_s + self.start_s] * max(0, target - self.target)
        for _ in range(max(0, self.target - target)):
            (self.starting or self.running).pop()
        self.target = target
        self.targets.append(target)


def test_a_step_of_load_makes_no_overshoot_despite_late_starts_and_averages() -> None:
    simulation = Simulation(PATIENT, target=2)
    for _ in range(20):
        simulation.second(load=1.0)
    for _ in range(120):
        simulation.second(load=4.0)  # 4 / 0.6 = 6.7
    assert simulation.targets == sorted(simulation.targets)
    assert simulation.target == 7


def test_a_day_follows_the_load_with_few_changes() -> None:
    """An hour for a day: 1 worker of load at night, 6 at noon; 10 workers would be the peak's."""
    simulation = Simulation(PATIENT, target=2)
    overloaded_s = 0
    for second in range(3600):
        load = 3.5 - 2.5 * math.cos(2 * math.pi * second / 3600)
        simulation.second(load)
        overloaded_s += load > 0.75 * len(simulation.running)
    targets = simulation.targets
    changes = [(a, b) for a, b in zip(targets, targets[1:], strict=False) if a != b]
    assert max(targets) == 10  # 6 / 0.6
    assert overloaded_s == 0
    assert len(changes) <= 20  # up by ones and down by ones
    noon = targets.index(10)
    assert targets[:noon] == sorted(targets[:noon])
    assert targets[noon:] == sorted(targets[noon:], reverse=True)
    assert simulation.worker_seconds < 0.75 * 10 * 3600


def test_a_killed_worker_changes_no_target() -> None:
    simulation = Simulation(PATIENT, target=4)
    for second in range(60):
        if second == 30:
            simulation.running.pop()
            simulation.starting.append(simulation.now_s + 3)  # Serve replaces it
        simulation.second(load=2.0)
    assert set(simulation.targets) == {4}


# --- the module itself ---


def test_a_decision_is_cheap() -> None:
    """Serve runs it in its control loop, where milliseconds count."""
    state = pool(*[worker(0.5)] * 16)
    spent_s = timeit.repeat(lambda: decide(state), time.process_time, number=20, repeat=5)
    assert min(spent_s) / 20 < 0.002


def test_the_policy_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys, cluster.autoscaling.policy, cluster.autoscaling.serve_policies;"
        "sys.exit(bool({'ray', 'torch', 'grpc', 'fastapi'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
