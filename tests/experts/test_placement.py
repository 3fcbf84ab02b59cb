from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.placement.replan import Aims, check_slots, initial_table, replan, slots_needed
from experts.placement.space import ExpertSpace, PlacementError
from experts.placement.unit_board import Pool

EIGHT = ExpertSpace(moe_layers=(1, 2), num_experts=4)
GROUPED = ExpertSpace(moe_layers=(1,), num_experts=8, num_groups=4)


def plan(space: ExpertSpace, slots: dict, table: dict, **aims: object) -> dict:
    """All that is wished is there, nobody has spare slots."""
    return replan(space, Pool(slots, table), Aims(**aims))  # type: ignore[arg-type]


def all_keys(space: ExpertSpace) -> set[tuple[int, int]]:
    return {(layer, e) for layer in space.moe_layers for e in range(space.num_experts)}


def check_shape(space: ExpertSpace, slots: dict[str, int], table: dict) -> None:
    """Slots never exceeded, groups whole, nothing twice on a worker."""
    assert set(table) == set(slots)
    for worker, keys in table.items():
        assert len(keys) == len(set(keys)) <= slots[worker]
        assert set(keys) <= all_keys(space)
        parts = Counter(space.unit_of(key) for key in keys)
        assert set(parts.values()) <= {space.unit_size}


def check_coverage(space: ExpertSpace, slots: dict[str, int], table: dict) -> None:
    """Where the slots suffice every expert has a holder."""
    usable = sum(n // space.unit_size for n in slots.values()) * space.unit_size
    if usable >= space.num_total:
        assert {key for keys in table.values() for key in keys} == all_keys(space)


def check_invariants(space: ExpertSpace, slots: dict[str, int], table: dict) -> None:
    check_shape(space, slots, table)
    check_coverage(space, slots, table)


spaces = st.builds(
    lambda layers, groups, size, limited: ExpertSpace(
        tuple(range(1, 1 + layers)), groups * size, groups if limited else 1
    ),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)
slot_maps = st.dictionaries(st.sampled_from([f"w{i}" for i in range(6)]), st.integers(0, 30))


@st.composite
def replans(draw: st.DrawFn) -> tuple[ExpertSpace, dict, dict, int, str | None]:
    """A space, workers, what they hold (also nonsense and too much), redundancy, a joiner."""
    space = draw(spaces)
    slots = draw(slot_maps)
    keys = st.tuples(st.integers(0, 4), st.integers(0, 12))
    held = {worker: draw(st.sets(keys, max_size=20)) for worker in [*slots, "dead"]}
    joiner = draw(st.sampled_from([None, *sorted(slots)]))
    return space, slots, held, draw(st.integers(0, 10)), joiner


@settings(max_examples=100)
@given(replans())
def test_any_plan_keeps_the_invariants(case: tuple) -> None:
    space, slots, held, redundancy, joiner = case
    aims = {"redundancy": redundancy, "joiners": [joiner] if joiner else []}
    table = plan(space, slots, held, **aims)
    check_shape(space, slots, table)
    # worker order, and the order of what they hold, do not matter
    shuffled = {w: sorted(held[w], reverse=True) for w in reversed(list(held))}
    slots_reversed = dict(reversed(list(slots.items())))
    assert plan(space, slots_reversed, shuffled, **aims) == table
    # A group that two workers hold in part is completed by both before one may give it up.
    if any_part_held(space, slots, held):
        held = table
        table = plan(space, slots, held, **aims)
    check_coverage(space, slots, table)
    # a plan that is in place is kept
    assert plan(space, slots, table) == table


def any_part_held(space: ExpertSpace, slots: dict, held: dict) -> bool:
    """Whether some worker has a part of a group."""
    parts = [Counter(map(space.unit_of, held[w] & all_keys(space))) for w in slots]
    return any(set(part.values()) - {space.unit_size} for part in parts)


@st.composite
def pools(draw: st.DrawFn) -> tuple[ExpertSpace, Pool, Aims]:
    """Workers in the middle of loading, some of them leaving, spare slots, pins and loads."""
    space = draw(spaces)
    slots = draw(slot_maps)
    spare = {worker: draw(st.integers(0, 6)) for worker in slots}
    units = st.sampled_from(sorted(space.units()))
    wish: dict[str, set] = {}
    held: dict[str, set] = {}
    for worker in [*slots, "leaver"]:
        limit = (slots.get(worker, 9) + spare.get(worker, 0)) // space.unit_size
        wished = draw(st.sets(units, max_size=limit)) if limit else set()
        wish[worker] = {key for unit in wished for key in space.experts_of(unit)}
        held[worker] = {key for key in wish[worker] if draw(st.booleans())}
    pins = draw(st.dictionaries(units, st.integers(2, 4), max_size=3))
    loads = draw(st.dictionaries(units, st.floats(0, 100)))
    joiners = draw(st.sampled_from([(), *[(worker,) for worker in slots]]))
    aims = Aims(draw(st.integers(0, 6)), joiners, pins, loads)
    del wish["leaver"]
    return space, Pool(slots, wish, held, spare), aims


def holders_by_unit(space: ExpertSpace, table: dict) -> dict:
    """Workers that have a unit whole."""
    return {
        unit: {w for w, keys in table.items() if set(space.experts_of(unit)) <= set(keys)}
        for unit in space.units()
    }


@settings(max_examples=300, deadline=None)
@given(pools())
def test_any_plan_keeps_a_holder_that_is_there_and_uses_spare_slots_last(case: tuple) -> None:
    space, pool, aims = case
    table = replan(space, pool, aims)
    limits = {w: pool.slots[w] + pool.spare_slots[w] for w in pool.slots}
    for worker, keys in table.items():
        assert len(keys) == len(set(keys)) <= limits[worker]
        assert set(Counter(map(space.unit_of, keys)).values()) <= {space.unit_size}
    staying = {worker: pool.held[worker] & pool.wish[worker] for worker in pool.slots}
    certain, after = holders_by_unit(space, staying), holders_by_unit(space, table)
    for unit in certain:
        assert not certain[unit] or certain[unit] & after[unit]
    # at rest all is covered if the slots allow it, and spare slots only hold what has no other room
    before = None
    while table != before:
        before = table
        table = replan(space, Pool(pool.slots, table, None, pool.spare_slots), Aims(pins=aims.pins))
    after = holders_by_unit(space, table)
    whole = sum(number // space.unit_size for number in limits.values())
    if whole * space.unit_size >= space.num_total:
        assert all(after.values())
    for worker, keys in table.items():
        for unit in {space.unit_of(key) for key in keys}:
            if len(keys) > pool.slots[worker]:  # in spare slots, so nothing here is a mere replica
                assert len(after[unit]) == 1 or unit in aims.pins


@settings(max_examples=100, deadline=None)
@given(spaces, st.integers(1, 5), st.integers(0, 12))
def test_slots_needed_suffice_and_the_table_is_even(
    space: ExpertSpace, num_workers: int, redundancy: int
) -> None:
    number = slots_needed(space.num_total, num_workers, redundancy, space.unit_size)
    slots = {f"w{i}": number for i in range(num_workers)}
    table = initial_table(space, slots, redundancy)
    check_invariants(space, slots, table)
    held = sorted(len(keys) for keys in table.values())
    assert held[-1] - held[0] <= space.unit_size
    if num_workers > 1 and redundancy <= space.num_total:
        wanted = space.num_total + redundancy // space.unit_size * space.unit_size
        assert sum(held) == wanted


def test_first_table_is_even_in_every_layer() -> None:
    table = initial_table(EIGHT, {"b": 4, "a": 4})
    assert table == {
        "a": [(1, 0), (1, 2), (2, 0), (2, 2)],
        "b": [(1, 1), (1, 3), (2, 1), (2, 3)],
    }


def test_unequal_workers_share_in_proportion_to_their_slots() -> None:
    table = initial_table(ExpertSpace((1, 2, 3), 6), {"big": 12, "small": 6})
    for layer in (1, 2, 3):
        assert sum(key[0] == layer for key in table["big"]) == 4


def test_redundancy_takes_spare_slots_over_all_layers() -> None:
    table = initial_table(EIGHT, {"a": 6, "b": 6}, redundancy=2)
    count = Counter(key for keys in table.values() for key in keys)
    assert sorted(key[0] for key, n in count.items() if n == 2) == [1, 2]
    assert sum(map(len, table.values())) == 10


def test_groups_stay_whole() -> None:
    table = initial_table(GROUPED, {"a": 5, "b": 5})
    assert table == {"a": [(1, 0), (1, 1), (1, 4), (1, 5)], "b": [(1, 2), (1, 3), (1, 6), (1, 7)]}


@pytest.mark.parametrize(
    ("space", "slots", "words"),
    [
        (EIGHT, {"a": 4, "b": 3}, "needs 8 expert slots, have 7 on 2 workers: add workers"),
        (GROUPED, {"a": 3, "b": 5}, "needs 8 expert slots, have 6 usable in whole groups of 2"),
        (EIGHT, {}, "have 0 on 0 workers"),
    ],
)
def test_too_few_slots_are_told_with_numbers(
    space: ExpertSpace, slots: dict[str, int], words: str
) -> None:
    with pytest.raises(PlacementError, match=words):
        check_slots(space, slots)
    with pytest.raises(PlacementError, match=words):
        initial_table(space, slots)


def test_joiner_takes_the_orphans_first() -> None:
    held = initial_table(EIGHT, {"a": 4, "b": 4})
    table = plan(EIGHT, {"a": 4, "c": 4}, {"a": held["a"]}, joiners=["c"])
    assert table == {"a": held["a"], "c": held["b"]}


def test_joiner_without_orphans_relieves_every_layer_and_worker() -> None:
    held = initial_table(EIGHT, {"a": 4, "b": 4})
    table = plan(EIGHT, {"a": 4, "b": 4, "c": 4}, held, joiners=["c"])
    assert [table["a"], table["b"]] == [held["a"], held["b"]]
    assert {key[0] for key in table["c"]} == {1, 2}
    for worker in "ab":
        assert len(set(table["c"]) & set(held[worker])) == 2


def test_orphans_go_to_free_slots_of_survivors() -> None:
    held = initial_table(EIGHT, {"a": 8, "b": 8, "c": 8})
    table = plan(EIGHT, {"a": 8, "b": 8}, {w: held[w] for w in "ab"})
    check_invariants(EIGHT, {"a": 8, "b": 8}, table)
    assert all(set(held[w]) <= set(table[w]) for w in "ab")
    assert [len(table["a"]), len(table["b"])] == [4, 4]


def test_orphans_replace_replicas_where_no_slot_is_free() -> None:
    held = {"a": [(1, 0), (1, 1)], "b": [(1, 0), (1, 1)], "dead": [(1, 2), (1, 3)]}
    table = plan(ExpertSpace((1,), 4), {"a": 2, "b": 2}, held)
    check_invariants(ExpertSpace((1,), 4), {"a": 2, "b": 2}, table)
    assert [len(table["a"]), len(table["b"])] == [2, 2]


def test_lost_coverage_leaves_the_rest_in_place() -> None:
    held = initial_table(EIGHT, {"a": 4, "b": 4})
    assert plan(EIGHT, {"a": 4}, {"a": held["a"]}) == {"a": held["a"]}


# ---------------------------------------------------------------- loads that failed

ONE = ExpertSpace((1,), 4)
WHOLE = {"a": [(1, 0), (1, 1)], "b": [(1, 2), (1, 3)]}
"""b has not loaded expert 3."""


def replaced(
    slots: dict[str, int], spare: dict[str, int], failed: dict, wish: dict | None = None
) -> dict:
    held = {**WHOLE, "b": [(1, 2)]}
    return replan(ONE, Pool(slots, wish or WHOLE, held, spare, failed))


def test_what_failed_is_copied_first_and_dropped_when_it_is_there() -> None:
    failed = {"b": [(1, 3)]}
    table = replaced({"a": 3, "b": 2}, {}, failed)
    assert table == {"a": [(1, 0), (1, 1), (1, 3)], "b": [(1, 2), (1, 3)]}
    table = replan(ONE, Pool({"a": 3, "b": 2}, table, {**table, "b": [(1, 2)]}, {}, failed))
    assert table == {"a": [(1, 0), (1, 1), (1, 3)], "b": [(1, 2)]}


def test_what_failed_goes_to_a_spare_slot_if_need_be_and_stays_without_room() -> None:
    failed = {"b": [(1, 3)]}
    assert (1, 3) in replaced({"a": 2, "b": 2}, {"a": 1}, failed)["a"]
    assert replaced({"a": 2, "b": 2}, {}, failed) == WHOLE


def test_an_orphan_goes_where_it_failed_only_if_nobody_else_has_room() -> None:
    failed = {"a": [(1, 3)]}
    wish = {**WHOLE, "b": [(1, 2)]}
    slots = {"a": 8, "b": 2}
    assert replaced(slots, {}, failed, wish)["b"] == [(1, 2), (1, 3)]
    slots["b"] = 1
    assert (1, 3) in replaced(slots, {}, failed, wish)["a"]


def test_a_group_that_failed_in_part_goes_as_a_whole() -> None:
    wish = initial_table(GROUPED, {"a": 4, "b": 4})
    held = {**wish, "b": wish["b"][1:]}
    failed = {"b": wish["b"][:1]}
    table = replan(GROUPED, Pool({"a": 6, "b": 4}, wish, held, {}, failed))
    assert set(table["a"]) == {*wish["a"], *wish["b"][:2]} and table["b"] == wish["b"]
    table = replan(GROUPED, Pool({"a": 6, "b": 4}, table, {**table, "b": held["b"]}, {}, failed))
    assert table["b"] == wish["b"][2:]
