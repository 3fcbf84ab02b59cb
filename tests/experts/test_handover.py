"""Leaving, draining, spare slots, joining: what a roster tells its workers."""

from __future__ import annotations

import logging

import pytest

from experts.messages import CommandRefused
from experts.placement.space import ExpertSpace
from tests.experts.pool import Pool, Worker, pool, register

FOUR = ExpertSpace(moe_layers=(1,), num_experts=4)
EIGHT = ExpertSpace(moe_layers=(1, 2), num_experts=4)
GROUPED = ExpertSpace(moe_layers=(1,), num_experts=8, num_groups=4)


# ---------------------------------------------------------------- leaving


def test_who_leaves_stays_a_holder_until_another_one_has_it_all() -> None:
    cluster = pool(FOUR, "abc", 2)
    assert cluster.held_by() == ["a", "b", "c", "a"]
    cluster.leave("a")
    assert cluster.held_by() == ["a", "b", "c", "a"]
    assert cluster.workers["b"].told and cluster.workers["b"].told.experts == ((1, 0), (1, 1))
    cluster.workers["b"].work(9)
    cluster.deliver("b")
    assert cluster.held_by() == ["a+b", "b", "c", "a"]
    assert not cluster.workers["a"].released
    before = cluster.roster.snapshot
    cluster.workers["c"].work(9)
    cluster.deliver("c")
    assert cluster.workers["a"].released
    assert cluster.held_by() == ["b", "b", "c", "c"]
    assert cluster.roster.snapshot.epoch == before.epoch + 1
    assert cluster.workers["a"].told and cluster.workers["a"].told.experts == ((1, 0), (1, 3))


def test_what_others_hold_too_holds_nobody_back() -> None:
    cluster = pool(FOUR, "ab", 4, redundancy=4)
    cluster.leave("a")
    assert cluster.workers["a"].released
    assert cluster.held_by() == ["b"] * 4
    assert cluster.roster.counters.released == 1


def test_a_leaver_takes_replicas_and_spare_slots_of_the_others() -> None:
    cluster = pool(FOUR, "ab", 3, spare=1, redundancy=2)
    assert sorted(cluster.held_by()) == ["a", "a+b", "a+b", "b"]
    cluster.leave("a")
    cluster.run()
    assert cluster.workers["a"].released
    assert cluster.num_held() == {"b": 4}


def test_a_leaver_that_cannot_be_replaced_stays_a_holder_and_goes_when_another_joins() -> None:
    cluster = pool(FOUR, "ab", 2)
    cluster.leave("a")
    cluster.run()
    assert not cluster.workers["a"].released
    assert cluster.held_by() == ["a", "b", "a", "b"]
    cluster.join("c")
    cluster.run()
    assert cluster.workers["a"].released
    assert cluster.held_by() == ["c", "b", "c", "b"]


def test_when_all_leave_nobody_waits_for_anybody() -> None:
    cluster = pool(FOUR, "abc", 2)
    cluster.leave("a")
    cluster.leave("b")
    assert not cluster.workers["a"].released and not cluster.workers["b"].released
    cluster.leave("c")
    assert all(worker.released for worker in cluster.workers.values())


def test_a_leaver_that_is_killed_dies_like_any_other() -> None:
    cluster = pool(FOUR, "abc", 2)
    cluster.leave("a")
    cluster.die("a")
    cluster.run()
    assert cluster.num_held() == {"b": 2, "c": 2}
    assert (cluster.roster.counters.deaths["experts"], cluster.roster.counters.released) == (1, 0)
    cluster = pool(FOUR, "ab", 4)
    cluster.leave("a")
    cluster.run()
    cluster.die("a")
    assert (cluster.roster.counters.deaths["experts"], cluster.roster.counters.released) == (0, 1)


def test_what_nobody_holds_is_healed_before_what_a_leaver_holds() -> None:
    cluster = pool(FOUR, "abcd", 1)
    cluster.leave("a")
    cluster.die("b")
    cluster.join("e", 1)
    cluster.run()
    assert cluster.held_by() == ["a", "e", "c", "d"]


def test_a_leaver_loads_nothing_more() -> None:
    cluster = Pool(FOUR)
    cluster.join("a", 4)
    cluster.join("b", 4)
    cluster.workers["a"].work(1)
    cluster.deliver("a")
    cluster.leave("a")
    assert cluster.workers["a"].told and cluster.workers["a"].told.experts == ((1, 0),)
    cluster.run()
    assert cluster.held_by() == ["b"] * 4 and cluster.workers["a"].released


def test_leaving_before_anything_is_placed() -> None:
    cluster = Pool(FOUR, expected=3)
    cluster.join("a", 4)
    cluster.join("b", 4, holds=[(1, 0)])
    cluster.leave("b")
    assert not cluster.workers["b"].released  # it alone holds an expert
    cluster.join("c", 4)
    assert cluster.roster.snapshot.stage == "waiting for expert workers 2/3"
    cluster.leave("c")
    assert cluster.workers["c"].released


# ---------------------------------------------------------------- draining


def test_a_drained_worker_stays_a_member_without_experts() -> None:
    cluster = pool(FOUR, "abc", 2)
    assert cluster.drain("a") == "a hands over its 2 experts"
    assert cluster.drain("a") == "a hands over already"
    cluster.run()
    assert cluster.held_by() == ["b", "b", "c", "c"]
    assert cluster.workers["a"].loaded == set() and not cluster.workers["a"].released
    assert cluster.drain("a") == "a is drained"
    assert [worker.worker_id for worker in cluster.roster.snapshot.workers_of("experts")] == [
        *"abc"
    ]
    assert cluster.roster.snapshot.drained == ("a",)
    cluster.leave("a")
    assert cluster.workers["a"].released


def test_a_drained_worker_is_used_again_when_there_is_no_other_room(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = pool(FOUR, "abc", 2)
    cluster.drain("a")
    cluster.run()
    cluster.die("b")
    assert cluster.roster.snapshot.stage == (
        "loading experts 2/4 on 2 workers (1 drained before and used again)"
    )
    assert cluster.roster.snapshot.drained == ()
    cluster.run()
    assert cluster.held_by() == ["a", "a", "c", "c"] and cluster.roster.snapshot.ready
    told = [r.message for r in caplog.records if "used again" in r.message]
    assert told == [
        "experts worker a, drained, is used again: the pool needs 4 expert slots, "
        "have 2 on 1 workers: add workers or slots"
    ]
    assert "again" not in cluster.roster.snapshot.stage


def test_a_leaver_is_let_go_by_a_drained_worker() -> None:
    """As when Serve stops one that works instead of the drained one."""
    cluster = pool(FOUR, "abc", 2)
    cluster.drain("a")
    cluster.run()
    cluster.leave("b")
    cluster.run()
    assert cluster.workers["b"].released
    assert cluster.num_held() == {"a": 2, "c": 2}


def test_a_worker_is_used_again_before_it_is_drained() -> None:
    cluster = pool(FOUR, "abc", 2)
    cluster.drain("a")
    assert cluster.roster.snapshot.drained == ("a",)
    cluster.die("b")  # which was to load what a holds
    cluster.run()
    assert cluster.num_held() == {"a": 2, "c": 2} and cluster.roster.snapshot.drained == ()


def test_a_drained_worker_rests_while_spare_slots_suffice() -> None:
    cluster = pool(FOUR, "abc", 2, spare=2)
    cluster.drain("a")
    cluster.die("b")
    cluster.run()
    assert cluster.num_held() == {"c": 4} and cluster.roster.snapshot.drained == ("a",)


@pytest.mark.parametrize("drained", [True, False])
def test_a_worker_that_registers_as_drained_stays_so_and_a_new_process_does_not(
    drained: bool,
) -> None:
    cluster = pool(FOUR, "abc", 2)
    cluster.drain("a")
    cluster.run()
    cluster.join("a", drained=drained)
    cluster.run()
    assert len(cluster.workers["a"].loaded) == (0 if drained else 2)
    assert cluster.roster.snapshot.drained == (("a",) if drained else ())


def test_a_restarted_directory_leaves_a_drained_worker_drained() -> None:
    cluster = Pool(FOUR, 3)
    cluster.join("a", holds=[], seen_version=9, drained=True)
    assert cluster.roster.snapshot.drained == ("a",)  # short of slots, but others are to come
    cluster.join("b", holds=[(1, 0), (1, 1)], seen_version=9)
    cluster.join("c", holds=[(1, 2), (1, 3)], seen_version=9)
    cluster.run()
    assert cluster.held_by() == ["b", "b", "c", "c"]
    assert cluster.roster.snapshot.drained == ("a",)


def test_a_drain_goes_on_with_a_new_directory() -> None:
    """a, which is drained, and b are back and hold everything; c, with room, is on its way."""
    cluster = Pool(FOUR, 3)
    cluster.join("a", holds=[(1, 0), (1, 1)], seen_version=9, drained=True)
    cluster.join("b", holds=[(1, 2), (1, 3)], seen_version=9)
    assert cluster.roster.snapshot.drained == ("a",) and cluster.roster.snapshot.ready
    cluster.join("c", seen_version=9)
    cluster.run()
    assert cluster.num_held() == {"b": 2, "c": 2} and cluster.roster.snapshot.drained == ("a",)


def test_a_restarted_directory_uses_it_again_if_nobody_else_comes_back() -> None:
    cluster = Pool(FOUR, 3, grace_s=30.0)
    cluster.join("a", seen_version=9, drained=True)
    cluster.join("b", holds=[(1, 0), (1, 1)], seen_version=9)
    cluster.wait(29.0)
    assert cluster.roster.snapshot.drained == ("a",)
    cluster.wait(1.0)
    cluster.run()
    assert cluster.held_by() == ["b", "b", "a", "a"]


# ---------------------------------------------------------------- a directory that was restarted


def test_a_restarted_directory_heals_as_soon_as_the_holders_are_back() -> None:
    """Two workers of a pool that was started with four, and scaled down."""
    cluster = Pool(FOUR, 4, grace_s=30.0)
    cluster.join("a", 2, spare=2, holds=[(1, 0), (1, 1)], seen_version=9)
    assert cluster.roster.snapshot.stage == "waiting for expert workers 1/4"
    cluster.join("b", 2, spare=2, holds=[(1, 2), (1, 3)], seen_version=9)
    assert cluster.roster.snapshot.ready
    cluster.die("b")
    cluster.run()
    assert cluster.held_by() == ["a"] * 4


def test_it_adds_no_replicas_while_others_are_on_their_way_back() -> None:
    cluster = Pool(FOUR, 3, redundancy=4)
    held = ([(1, 0), (1, 1)], [(1, 2), (1, 3)])
    for name, holds in zip("ab", held, strict=True):
        cluster.join(name, 4, holds=holds, seen_version=9)
    cluster.run()
    assert cluster.num_held() == {"a": 2, "b": 2}


def test_a_leaver_that_is_back_first_waits_for_the_others() -> None:
    for leaves_at_once in (True, False):
        cluster = Pool(FOUR, 2, grace_s=30.0)
        holds = [(1, e) for e in range(4)]
        if leaves_at_once:
            cluster.workers["a"] = Worker(loaded=set(holds))
            cluster.roster.join(register("a", slots=4, holds=tuple(holds), seen_version=9), 0.0)
            cluster.roster.hand_over("a", "leave")
            cluster.settle()
        else:
            cluster.join("a", 4, holds=holds, seen_version=9)
            cluster.leave("a")
        assert not cluster.workers["a"].released
        cluster.wait(1.0)
        cluster.join("b", 4, seen_version=9)
        assert not cluster.workers["a"].released
        cluster.run()
        assert cluster.workers["a"].released and cluster.held_by() == ["b"] * 4


def test_a_leaver_waits_for_nobody_when_the_grace_is_over() -> None:
    cluster = Pool(FOUR, 2, grace_s=30.0)
    cluster.join("a", 4, holds=[(1, e) for e in range(4)], seen_version=9)
    cluster.leave("a")
    cluster.wait(29.9)
    assert not cluster.workers["a"].released
    cluster.wait(0.1)
    assert cluster.workers["a"].released


# ---------------------------------------------------------------- loads that fail


def test_what_a_worker_cannot_load_goes_to_another_after_the_limit() -> None:
    """b cannot read expert 1; c has room for it."""
    cluster = pool(FOUR, "abc", 2, spare=2, redundancy=0)
    assert cluster.held_by() == ["a", "b", "c", "a"]
    cluster.die("a")
    assert cluster.roster.table() == {"b": {(1, 0), (1, 1)}, "c": {(1, 2), (1, 3)}}
    cluster.workers["b"].bad = {(1, 0)}
    cluster.run()
    assert cluster.held_by() == ["", "b", "c", "c"]
    cluster.wait(59.0)
    assert cluster.roster.unrest() == "experts are still being loaded"
    cluster.wait(1.0)
    cluster.run()
    assert cluster.held_by() == ["c", "b", "c", "c"] and cluster.roster.snapshot.ready
    assert cluster.roster.unrest() == ""
    cluster.join("d", 2)  # takes what c holds in a spare slot, not b
    cluster.run()
    assert "b" not in cluster.held_by()[0].split("+")


def test_progress_starts_the_limit_anew() -> None:
    cluster = Pool(FOUR, 1)
    cluster.join("a", 4)
    for _ in range(3):
        cluster.wait(59.0)
        cluster.workers["a"].work(1)
        cluster.deliver("a")
    cluster.wait(59.0)
    assert not cluster.roster.experts()["a"].failed
    cluster.wait(1.0)
    assert cluster.roster.experts()["a"].failed == {(1, 3)}


def test_what_nobody_else_has_room_for_stays_and_is_not_waited_for() -> None:
    cluster = pool(FOUR, "abc", 2)
    cluster.die("a")
    cluster.workers["b"].bad = {(1, 0)}
    cluster.run()
    cluster.wait(0.0)
    cluster.wait(60.0)
    cluster.run()
    cluster.wait(0.5)
    assert cluster.held_by()[0] == "" and cluster.roster.unrest() == ""
    assert (1, 0) in cluster.roster.table()["b"]  # it goes on trying
    cluster.workers["b"].bad = set()
    cluster.run()
    assert cluster.held_by()[0] == "b" and not cluster.roster.experts()["b"].failed


def test_a_hand_over_does_not_wait_for_a_worker_that_cannot_load() -> None:
    cluster = pool(FOUR, "abc", 2, spare=2)
    cluster.leave("a")
    for name in "bc":  # whoever is to take expert 0
        if (1, 0) in cluster.roster.table()[name]:
            cluster.workers[name].bad = {(1, 0)}
    cluster.run()
    assert not cluster.workers["a"].released
    cluster.wait(0.0)
    cluster.wait(60.0)
    cluster.run()
    assert cluster.workers["a"].released and all(cluster.held_by())


def test_a_failed_replica_is_given_up_and_not_put_there_again_for_a_while() -> None:
    cluster = pool(FOUR, "ab", 2)
    cluster.join("c", 1)
    (key,) = cluster.roster.table()["c"]
    cluster.workers["c"].bad = {key}
    cluster.run()
    cluster.wait(0.0)
    cluster.wait(60.0)
    cluster.run()
    assert cluster.roster.table()["c"] == set() and cluster.roster.unrest() == ""
    table = {name: set(keys) for name, keys in cluster.roster.table().items()}
    cluster.roster.adopt({**table, "c": {key}})  # what a rebalancing step might wish
    assert cluster.roster.table()["c"] == set()
    cluster.wait(600.0)
    cluster.roster.adopt({**table, "c": {key}})
    assert cluster.roster.table()["c"] == {key}


# ---------------------------------------------------------------- what is logged


def test_joins_hand_overs_and_orphans_are_logged_once_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "experts.directory.journal")

    def lines() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == "experts.directory.journal"]
        caplog.clear()
        return found

    cluster = pool(FOUR, "abc", 2, spare=2)
    assert lines() == [
        "attention worker att joined",
        *(f"experts worker {w} joined: 2 slots, 2 spare, holds 0 experts" for w in "abc"),
    ]
    cluster.drain("a")
    cluster.run()
    assert lines() == [
        "experts worker a is drained: hands over 2 experts, alone holds 2",
        "experts worker a is not needed any more: 2 experts moved",
    ]
    cluster.leave("a")
    cluster.die("a")
    assert lines() == [
        "experts worker a asked to leave: hands over 0 experts, alone holds 0",
        "experts worker a is not needed any more: 0 experts moved",
        "experts worker a left: released",
    ]
    cluster.now_s = 10.0
    cluster.die("b")
    assert lines() == [
        "experts worker b left: its connection ended; it held 2 experts",
        "2 experts have no holder",
    ]
    cluster.now_s = 10.25
    cluster.run()
    assert lines() == ["every expert has a holder again after 0.25 s"]
    cluster.leave("c")
    assert lines() == [
        "experts worker c asked to leave: hands over 4 experts, alone holds 4",
        "experts worker c is not needed any more: nobody stays",
        "4 experts have no holder",
    ]


@pytest.mark.parametrize(
    ("worker", "words"),
    [
        ("nobody", "no expert worker nobody: one of a, b"),
        ("att", "no expert worker att: one of a, b"),
        ("a", "cannot drain a: without it the pool needs 4 expert slots, have 3 on 1 workers: add"),
    ],
)
def test_drain_is_refused_with_numbers(worker: str, words: str) -> None:
    cluster = pool(FOUR, "ab", 2, spare=1)
    with pytest.raises(CommandRefused, match=words):
        cluster.drain(worker)


def test_drain_counts_spare_slots() -> None:
    cluster = pool(FOUR, "ab", 2, spare=2)
    cluster.drain("a")
    cluster.run()
    assert cluster.num_held() == {"b": 4}


# ---------------------------------------------------------------- spare slots


def test_spare_slots_heal_a_death_evenly_and_are_given_back_to_the_next_worker() -> None:
    cluster = pool(EIGHT, "abcd", 2, spare=1)
    assert cluster.num_held() == dict.fromkeys("abcd", 2)
    cluster.die("d")
    cluster.run()
    assert sorted(cluster.num_held().values()) == [2, 3, 3]
    assert cluster.roster.snapshot.ready
    cluster.join("e", 2, 1)
    cluster.run()
    assert cluster.num_held() == dict.fromkeys("abce", 2)


def test_giving_back_never_leaves_an_expert_without_a_holder() -> None:
    cluster = pool(FOUR, "ab", 2, spare=2)
    cluster.die("b")
    cluster.run()
    assert cluster.held_by() == ["a"] * 4
    cluster.join("c")
    assert cluster.held_by() == ["a"] * 4  # copied first
    cluster.workers["c"].work(1)
    cluster.deliver("c")
    assert sorted(cluster.held_by()) == ["a", "a", "a", "a+c"]
    cluster.run()
    assert cluster.num_held() == {"a": 2, "c": 2}


def test_without_room_the_excess_stays() -> None:
    cluster = pool(FOUR, "ab", 2, spare=2)
    cluster.die("b")
    cluster.run()
    replans = cluster.roster.counters.replans
    cluster.roster.hold("a", cluster.workers["a"].loaded, 1 << 40)
    cluster.settle()
    assert cluster.held_by() == ["a"] * 4
    assert cluster.roster.counters.replans == replans and not cluster.roster.unrest()


def test_the_first_placement_does_not_count_spare_slots() -> None:
    cluster = Pool(FOUR)
    cluster.join("a", 1, spare=2)
    cluster.join("b", 1, spare=2)
    assert "needs 4 expert slots, have 2 on 2 workers" in cluster.roster.snapshot.stage
    cluster.join("c", 2)
    cluster.run()
    assert cluster.roster.snapshot.ready
    cluster.die("c")
    cluster.run()
    assert cluster.roster.snapshot.ready and cluster.num_held() == {"a": 2, "b": 2}


def test_a_restarted_directory_heals_a_pool_that_lives_on_spare_slots() -> None:
    cluster = Pool(FOUR, grace_s=0.0)
    cluster.join("a", 1, spare=3, holds=[(1, 0), (1, 1)])
    cluster.join("b", 2, spare=3, holds=[(1, 2), (1, 3)])
    cluster.run()
    assert cluster.roster.snapshot.ready
    cluster.die("b")
    cluster.run()
    assert cluster.held_by() == ["a"] * 4


def test_groups_use_spare_slots_whole() -> None:
    cluster = pool(GROUPED, "ab", 4, spare=3)
    cluster.die("b")
    cluster.run()
    assert cluster.num_held() == {"a": 6}  # 7 slots are three groups of two
    stage = cluster.roster.snapshot.stage
    assert "needs 8 expert slots, have 6 usable in whole groups of 2" in stage


def test_a_replica_goes_before_a_spare_slot_is_used() -> None:
    cluster = pool(FOUR, "abc", 2, spare=1, redundancy=2)
    cluster.die("a")
    cluster.run()
    assert cluster.num_held() == {"b": 2, "c": 2}


# ---------------------------------------------------------------- only what is there counts


def test_an_expert_is_never_dropped_for_one_who_only_wishes_to_hold_it() -> None:
    """c, which has more of the layer than a, is to load replicas of 0, 1 and 2 when b dies."""
    cluster = pool(FOUR, "ab", 2)
    assert cluster.held_by() == ["a", "b", "a", "b"]
    cluster.join("c", 3)
    assert cluster.workers["c"].told and cluster.workers["c"].told.experts == (
        (1, 0),
        (1, 1),
        (1, 2),
    )
    cluster.die("b")  # 3 needs a slot
    assert cluster.held_by() == ["a", "", "a", ""]
    assert cluster.roster.table()["c"] == {(1, 1), (1, 2), (1, 3)}
    cluster.run()
    assert cluster.roster.snapshot.ready


def test_a_report_that_was_on_its_way_does_not_bring_back_what_is_being_dropped() -> None:
    cluster = pool(FOUR, "ab", 2)
    member = cluster.roster.experts()["a"]
    cluster.roster.adopt({"a": [(1, 0)], "b": [(1, 1), (1, 3)]})
    cluster.settle()
    cluster.roster.adopt({"a": [(1, 0), (1, 2)], "b": [(1, 1), (1, 3)]})
    cluster.settle()
    told = cluster.workers["a"].told
    assert told is not None
    cluster.roster.hold("a", [(1, 0), (1, 2)], told.epoch - 2)  # sent before either was known
    cluster.settle()
    assert member.published == {(1, 0)}
    cluster.run()
    assert member.published == {(1, 0), (1, 2)}


# ---------------------------------------------------------------- joining


def test_a_joiner_takes_the_hottest_experts_when_loads_are_known() -> None:
    cluster = pool(EIGHT, "ab", 4)
    cluster.loads = {1: [5, 90, 1, 1], 2: [1, 1, 80, 70]}
    cluster.join("c", 3)
    assert cluster.workers["c"].told
    assert cluster.workers["c"].told.experts == ((1, 1), (2, 2), (2, 3))
    cluster.run()
    cluster.join("d", 2)  # now it is 45 and 40 for each replica
    assert cluster.workers["d"].told and cluster.workers["d"].told.experts == ((1, 1), (2, 2))


def test_a_joiner_covers_what_is_lost_before_it_relieves() -> None:
    cluster = pool(FOUR, "ab", 2)
    cluster.loads = {1: [100, 1, 90, 2]}
    cluster.die("b")
    cluster.join("c", 3)
    assert cluster.workers["c"].told
    assert cluster.workers["c"].told.experts == ((1, 0), (1, 1), (1, 3))
