"""Quarantine and hop times, on a clock of the test's own."""

from __future__ import annotations

from experts.health import HopTimer, Quarantine, WorkerHealth


def admitted(quarantine: Quarantine, times: list[float]) -> list[float]:
    return [now_s for now_s in times if quarantine.admits("w", now_s)]


def test_a_worker_without_faults_is_admitted() -> None:
    quarantine = Quarantine()
    assert quarantine.admits("w", 0.0)
    assert quarantine.next_release_s() is None


def test_each_fault_doubles_the_wait_up_to_the_limit() -> None:
    quarantine = Quarantine(base_s=1.0, max_s=3.0)
    releases = []
    for _ in range(4):
        quarantine.punish("w", 100.0)
        releases.append(quarantine.next_release_s())
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
    assert quarantine.next_release_s() == 11.0


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


def test_the_time_given_to_a_worker_follows_the_slow_answers() -> None:
    timer = HopTimer(floor_s=1.0, factor=8.0)
    for _ in range(64):
        timer.observe(0.01)
    assert timer.timeout_s == 1.0
    for _ in range(64):
        timer.observe(0.5)
    assert timer.timeout_s == 4.0


def test_outstanding_rows_are_counted_by_worker() -> None:
    health = WorkerHealth()
    health.add_rows("a", 5)
    health.add_rows("a", -2)
    health.add_rows("b", 1)
    assert (health.outstanding_rows("a"), health.outstanding_rows("b")) == (3, 1)
    health.add_rows("b", -1)
    health.keep_only(())
    assert (health.outstanding_rows("a"), health.outstanding_rows("b")) == (3, 0)
