import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.directory.roster import Roster, RosterRules
from experts.messages import Register, Role
from experts.placement.space import ExpertSpace

SPACE = ExpertSpace(moe_layers=(1,), num_experts=4)
NOW = 1 << 40  # an epoch after every Assign


def make(expected: int = 2, **rules: object) -> Roster:
    return Roster(RosterRules(SPACE, expected, **rules))  # type: ignore[arg-type]


def worker(worker_id: str, role: Role = "experts", slots: int = 2, **fields: object) -> Register:
    return Register(
        worker_id=worker_id,
        role=role,
        endpoint=f"inproc:{worker_id}",
        pid=1,
        node="n",
        num_slots=slots if role == "experts" else 0,
        **fields,  # type: ignore[arg-type]
    )


def join(roster: Roster, *registers: Register, now_s: float = 0.0) -> dict:
    """Joins one by one; returns the newest assignment of every worker as sets."""
    told = {}
    for register in registers:
        roster.join(register, now_s)
        told.update({w: a.experts for w, a in roster.settle(now_s).items()})
    return told


def load(roster: Roster, told: dict) -> None:
    """The workers did as they were told."""
    for worker_id, experts in told.items():
        roster.hold(worker_id, experts, NOW)
    roster.settle(0.0)


def complete(slots: int = 2) -> Roster:
    """Ready: a holds 0 and 2, b holds 1 and 3."""
    roster = make()
    load(roster, join(roster, worker("a", slots=slots), worker("b", slots=slots)))
    join(roster, worker("att", "attention"), worker("r", "router"))
    assert roster.snapshot.ready
    return roster


def held_by(roster: Roster) -> list[str]:
    return ["+".join(holders) for holders in roster.snapshot.holders_of(1)]


def test_first_assignment_waits_for_all_and_does_not_depend_on_their_order() -> None:
    expected = {
        "a": ((1, 0), (1, 3)),
        "b": ((1, 1),),
        "c": ((1, 2),),
    }
    for order in itertools.permutations("abc"):
        roster = make(expected=3)
        told = join(roster, *(worker(name) for name in order[:2]))
        assert told == {}
        assert roster.snapshot.stage == "waiting for expert workers 2/3"
        assert join(roster, worker(order[2])) == expected


def test_grace_ends_the_wait_if_the_slots_suffice() -> None:
    roster = make(expected=3, grace_s=30.0)
    join(roster, worker("a", slots=3), now_s=100.0)
    assert roster.settle(130.0) == {}  # 3 slots for 4 experts: time does not help
    join(roster, worker("b", slots=3), now_s=131.0)
    assert roster.settle(131.0) == {}  # already assigned when b came
    assert roster.snapshot.stage == "loading experts 0/4 on 2 workers"

    roster = make(expected=3, grace_s=30.0)
    join(roster, worker("a", slots=3), worker("b", slots=3), now_s=100.0)
    assert roster.settle(129.9) == {}
    assert sorted(roster.settle(130.0)) == ["a", "b"]


def test_too_few_slots_are_told_with_numbers() -> None:
    roster = make()
    assert join(roster, worker("a", slots=1), worker("b", slots=2)) == {}
    assert "needs 4 expert slots, have 3 on 2 workers" in roster.snapshot.stage


def test_stages_from_nothing_to_ready() -> None:
    roster = make()
    assert roster.snapshot.stage == "waiting for expert workers 0/2"
    told = join(roster, worker("a"), worker("b"))
    assert roster.snapshot.stage == "loading experts 0/4 on 2 workers"
    load(roster, {"a": told["a"][:1]})
    assert roster.snapshot.stage == "loading experts 1/4 on 2 workers"
    load(roster, told)
    assert roster.snapshot.stage == "waiting for an attention worker"
    join(roster, worker("att", "attention"))
    assert roster.snapshot.stage == "waiting for a router"
    assert not roster.snapshot.ready
    join(roster, worker("r", "router"))
    assert roster.snapshot.stage == "ready: 4 experts on 2 workers"
    assert roster.snapshot.ready


def test_inline_routers_need_no_router() -> None:
    roster = make(needs_router=False)
    load(roster, join(roster, worker("a"), worker("b"), worker("att", "attention")))
    assert roster.snapshot.ready


def test_epoch_counts_changes_of_holders_and_version_all_changes() -> None:
    roster = complete()
    before = roster.snapshot
    roster.settle(1.0)
    assert roster.snapshot is before
    join(roster, worker("front", "ingress"))
    assert (roster.snapshot.version, roster.snapshot.epoch) == (before.version + 1, before.epoch)
    roster.remove("b")
    roster.settle(1.0)
    assert (roster.snapshot.version, roster.snapshot.epoch) == (
        before.version + 2,
        before.epoch + 1,
    )


def test_orphans_go_to_a_joiner() -> None:
    roster = complete()
    roster.remove("b")
    assert roster.settle(0.0) == {}  # a is full
    assert held_by(roster) == ["a", "", "a", ""]
    assert not roster.snapshot.ready
    assert "needs 4 expert slots, have 2" in roster.snapshot.stage
    told = join(roster, worker("c"))
    assert told == {"c": ((1, 1), (1, 3))}
    load(roster, told)
    assert held_by(roster) == ["a", "c", "a", "c"]
    assert roster.snapshot.ready


def test_orphans_go_to_free_slots() -> None:
    roster = complete(slots=4)
    roster.remove("b")
    told = {w: a.experts for w, a in roster.settle(0.0).items()}
    assert told == {"a": ((1, 0), (1, 1), (1, 2), (1, 3))}
    assert held_by(roster) == ["a", "", "a", ""]  # published when loaded, not when wished
    load(roster, told)
    assert roster.snapshot.ready


def test_what_shall_be_dropped_is_unpublished_at_once() -> None:
    roster = complete()
    load(roster, join(roster, worker("c")))  # a joiner takes replicas
    assert held_by(roster) == ["a+c", "b+c", "a", "b"]
    roster.remove("b")
    told = {w: a.experts for w, a in roster.settle(0.0).items()}
    assert told == {"a": ((1, 2), (1, 3))}  # 3 is lost, the replica of 0 makes room for it
    assert held_by(roster) == ["c", "c", "a", ""]


def test_restarted_directory_goes_on_above_what_members_have_seen() -> None:
    roster = make()
    told = join(
        roster,
        worker("a", holds=[(1, 0), (1, 2)], seen_epoch=7, seen_version=40),
        worker("att", "attention", seen_epoch=7, seen_version=41),
        worker("r", "router", seen_epoch=6, seen_version=39),
    )
    assert told == {}
    assert roster.snapshot.epoch > 7 and roster.snapshot.version > 41
    told = join(roster, worker("b", holds=[(1, 1), (1, 3)]))
    assert told == {"a": ((1, 0), (1, 2)), "b": ((1, 1), (1, 3))}  # as it was, nobody moves
    assert roster.snapshot.ready


def test_holders_of_before_count_while_others_are_awaited() -> None:
    roster = make(expected=3)
    join(roster, worker("a", holds=[(1, 0), (1, 2)]), worker("b", holds=[(1, 1)]))
    roster.hold("b", [(1, 1), (1, 3)], 0)  # goes on with the load of the old assignment
    roster.settle(0.0)
    assert held_by(roster) == ["a", "b", "a", "b"]


def test_same_worker_again_replaces_itself() -> None:
    roster = complete()
    told = join(roster, worker("b", holds=[(1, 1)]))
    assert told == {"b": ((1, 1), (1, 3))}
    assert held_by(roster) == ["a", "b", "a", ""]


@pytest.mark.parametrize("stranger", [(1, 4), (2, 0), (0, 0)])
def test_experts_that_the_model_lacks_are_not_published(stranger: tuple[int, int]) -> None:
    roster = complete()
    roster.hold("a", [(1, 0), (1, 2), stranger], NOW)
    roster.settle(0.0)
    assert held_by(roster) == ["a", "b", "a", "b"]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["come", "go", "load"]))))
def test_any_history_keeps_coverage_where_slots_allow_and_counters_grow(
    history: list[tuple[str, str]],
) -> None:
    roster = make(expected=2)
    wish: dict[str, tuple] = {}  # of those who live
    for name, event in history:
        before = roster.snapshot
        if event == "come":
            roster.join(worker(name), 0.0)
            wish[name] = ()
        elif name in wish and event == "go":
            roster.remove(name)
            del wish[name]
        elif name in wish:
            roster.hold(name, wish[name], NOW)
        wish.update({w: a.experts for w, a in roster.settle(0.0).items()})

        after = roster.snapshot
        assert after.version == before.version + (after != before)
        assert after.epoch == before.epoch + (after.holders != before.holders)
        assert all(len(experts) <= 2 for experts in wish.values())
        if any(wish.values()) and len(wish) >= 2:
            assert {key for experts in wish.values() for key in experts} >= {
                (1, expert) for expert in range(4)
            }
