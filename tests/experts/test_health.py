"""Quarantine and hop times, on a clock of the test's own."""

from __future__ import annotations

import math

import pytest

from experts.health import TELL_EVERY_S, HopTimer, Quarantine, WorkerHealth


def admitted(quarantine: Quarantine, times: list[float]) -> list[float]:
    return [now_s for now_s in times if quarantine.admits("w", now_s)]


def test_a_worker_without_faults_is_admitted() -> None:
    quarantine = Quarantine()
    assert quarantine.admits("w", 0.0)
    assert quarantine.next_release_s(0.0) is None


def test_each_fault_doubles_the_wait_up_to_the_limit() -> None:
    quarantine = Quarantine(base_s=1.0, max_s=3.0)
    releases = []
    for _ in range(4):
        quarantine.punish("w", 100.0)
        releases.append(quarantine.next_release_s(0.0))
    assert releases == [101.0, 102.0, 103.0, 103.0]


def test_after_the_wait_one_caller_probes_and_the_others_still_wait() -> None:
    quarantine = Quarantine(base_s=1.0)
    quarantine.punish("w", 0.0)
    assert admitted(quarantine, [0.0, 0.9, 1.0, 1.1, 1.9, 2.0]) == [1.0, 2.0]


def test_an_answer_ends_it_and_forgets_the_strikes() -> None:
    quarantine = Quarantine(base_s=1.0)
    quarantine.punish("w", 0.0)
    quarantine.punish("w", 0.0)
    quarantine.absolve("w")
    assert quarantine.admits("w", 0.0)
    quarantine.punish("w", 10.0)
    assert quarantine.next_release_s(0.0) == 11.0


def test_workers_do_not_share_faults() -> None:
    quarantine = Quarantine(base_s=1.0)
    quarantine.punish("a", 0.0)
    assert quarantine.admits("b", 0.0)
    assert len(quarantine) == 1


def test_workers_that_left_are_forgotten() -> None:
    quarantine = Quarantine()
    quarantine.punish("a", 0.0)
    quarantine.punish("b", 0.0)
    quarantine.keep_only({"b"})
    assert quarantine.admits("a", 0.0)
    assert not quarantine.admits("b", 0.0)


def test_a_worker_that_hangs_is_out_for_all_until_it_answers() -> None:
    quarantine = Quarantine(base_s=1.0)
    assert quarantine.suspend("w", 0.0)
    assert not quarantine.suspend("w", 0.0)
    assert quarantine.is_suspended("w")
    assert admitted(quarantine, [0.0, 1e9]) == []
    assert quarantine.next_release_s(0.0) == math.inf
    assert quarantine.absolve("w")
    assert not quarantine.absolve("w")
    assert quarantine.admits("w", 0.0)


def test_a_worker_that_hung_and_is_gone_waits_as_after_two_faults() -> None:
    quarantine = Quarantine(base_s=1.0)
    quarantine.suspend("w", 0.0)
    quarantine.punish("w", 10.0)
    assert not quarantine.is_suspended("w")
    assert quarantine.next_release_s(0.0) == 12.0


def test_to_look_is_no_probe() -> None:
    quarantine = Quarantine(base_s=1.0)
    quarantine.punish("w", 0.0)
    assert [quarantine.is_out("w", now_s) for now_s in (0.9, 1.0, 1.0)] == [True, False, False]
    assert admitted(quarantine, [1.0, 1.0]) == [1.0]
    assert quarantine.is_out("w", 1.0)
    assert not quarantine.is_out("stranger", 0.0)


def test_a_time_that_is_over_is_no_next_release() -> None:
    """Whoever waits for one has looked at that worker already."""
    quarantine = Quarantine(base_s=1.0)
    quarantine.punish("a", 0.0)
    quarantine.punish("b", 5.0)
    times = [quarantine.next_release_s(after_s) for after_s in (0.0, 1.0, 6.0)]
    assert times == [1.0, 6.0, None]


def test_a_fault_with_a_reason_is_told_once_and_so_is_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quarantine = Quarantine()
    quarantine.punish("quiet", 0.0)
    quarantine.absolve("quiet")
    for now_s in range(5):
        quarantine.punish("w", float(now_s), "not finite")
    quarantine.suspend("w", 5.0, "it hangs")
    quarantine.absolve("w")
    quarantine.absolve("w")
    assert caplog.messages == [
        "expert worker w is left alone: not finite",
        "expert worker w answers again",
    ]


def test_a_worker_that_fails_and_answers_in_turns_is_told_of_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quarantine = Quarantine(kind="router")
    for i in range(21):
        quarantine.punish("w", i * TELL_EVERY_S / 10, "not finite")
        quarantine.absolve("w")
    assert caplog.messages.count("router w is left alone: not finite") == 3
    assert caplog.messages.count("router w answers again") == 3


def observe(timer: HopTimer, num_rows: int, hop_s: float, times: int = 32) -> None:
    for _ in range(times):
        timer.observe(num_rows, hop_s)


def test_the_time_given_to_a_worker_follows_the_slow_answers() -> None:
    timer = HopTimer(floor_s=0.25, factor=8.0, cold_s=2.0)
    observe(timer, 16, 0.01, times=31)
    assert timer.timeout_s(16) == 2.0
    observe(timer, 31, 0.01, times=1)  # 16..31 rows are one size
    assert timer.timeout_s(16) == 0.25
    observe(timer, 16, 0.05)
    assert timer.timeout_s(16) == pytest.approx(0.4)


def test_a_look_at_most_doubles_the_time() -> None:
    timer = HopTimer(floor_s=0.25, factor=8.0)
    observe(timer, 1, 0.01)
    observe(timer, 1, 60.0)
    assert timer.timeout_s(1) == 0.5
    observe(timer, 1, 60.0)
    assert timer.timeout_s(1) == 1.0


def test_a_few_late_answers_change_nothing() -> None:
    timer = HopTimer(floor_s=0.25, factor=8.0)
    observe(timer, 1, 0.01, times=256 - 2)
    observe(timer, 1, 60.0, times=2)
    assert timer.timeout_s(1) == 0.25


def test_a_size_that_is_not_known_has_the_time_of_the_next_larger() -> None:
    timer = HopTimer(floor_s=0.25, factor=8.0, cold_s=2.0)
    observe(timer, 4, 0.1)
    assert [timer.timeout_s(n) for n in (0, 1, 2, 4, 8)] == [0.8, 0.8, 0.8, 0.8, 2.0]
    observe(timer, 1, 0.01)
    assert [timer.timeout_s(n) for n in (0, 1, 2, 4)] == [0.25, 0.25, 0.8, 0.8]
    observe(timer, 8, 0.2)
    assert [timer.timeout_s(n) for n in (2, 4, 8)] == [0.8, 0.8, 1.6]


def test_outstanding_rows_are_counted_by_worker() -> None:
    health = WorkerHealth()
    health.add_rows("a", 5)
    health.add_rows("a", -2)
    health.add_rows("b", 1)
    assert (health.outstanding_rows("a"), health.outstanding_rows("b")) == (3, 1)
    health.add_rows("b", -1)
    health.keep_only(())
    assert (health.outstanding_rows("a"), health.outstanding_rows("b")) == (3, 0)
