"""Any history of an expert pool: joins, deaths, leaving, pins, rebalancing, late reports."""

from __future__ import annotations

import contextlib
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from experts.messages import CommandRefused
from experts.placement.replan import check_slots
from experts.placement.space import ExpertSpace, PlacementError
from tests.experts.pool import Pool

SPACES = (
    ExpertSpace(moe_layers=(1, 2), num_experts=4),
    ExpertSpace(moe_layers=(1,), num_experts=8, num_groups=4),
)
NAMES = "abcde"

names = st.sampled_from(NAMES)
few = st.integers(0, 3)
events = st.one_of(
    st.tuples(st.just("join"), names, st.integers(1, 6), few),
    st.tuples(st.just("die"), names),
    st.tuples(st.just("leave"), names),
    st.tuples(st.just("drain"), names),
    st.tuples(st.just("work"), names, few),
    st.tuples(st.just("work"), names, few),
    st.tuples(st.just("deliver"), names),
    st.tuples(st.just("deliver"), names),
    st.tuples(st.just("run")),
    st.tuples(st.just("bad"), names, st.integers(0, 3)),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 59.0, 61.0])),
    st.tuples(st.just("again"), names),
    st.tuples(st.just("rebalance")),
    st.tuples(st.just("pin"), st.integers(0, 3), st.integers(1, 3)),
    st.tuples(st.just("loads"), st.lists(st.integers(0, 50), min_size=8, max_size=8)),
)


def apply(pool: Pool, event: tuple) -> None:
    kind, *args = event
    there = bool(args) and str(args[0]) in pool.workers
    if kind == "join" and not there:
        pool.join(*args)
    elif kind == "deliver" and there and pool.workers[args[0]].reports:
        pool.deliver(*args)
    elif kind == "bad" and there:
        pool.workers[args[0]].bad = {(1, args[1])} - pool.workers[args[0]].loaded
    elif kind == "wait":
        pool.wait(*args)
    elif kind == "again" and there:
        register_again(pool, *args)
    elif kind == "work" and there:
        pool.workers[args[0]].work(args[1])
    elif kind in ("die", "leave") and there:
        getattr(pool, kind)(*args)
    elif kind in ("run", "rebalance"):
        getattr(pool, kind)()
    elif kind == "loads":
        size = pool.space.num_experts
        pool.loads = {n: args[0][:size] for n in pool.space.moe_layers}
    elif kind in ("drain", "pin"):
        with contextlib.suppress(CommandRefused):
            pool.drain(*args) if kind == "drain" else pool.pin(1, *args)


def register_again(pool: Pool, name: str) -> None:
    """The line broke; the worker itself goes on."""
    worker, member = pool.workers[name], pool.roster.experts()[name]
    drained = name in pool.roster.snapshot.drained
    kept = set(worker.told.experts) if worker.told else worker.loaded
    leaves, info = member.exit == "leave", member.info
    pool.join(
        name,
        info.num_slots,
        info.spare_slots,
        sorted(worker.loaded & kept),
        drained=drained,
        seen_version=pool.roster.snapshot.version,
    )
    if leaves:
        pool.leave(name)


def check_now(pool: Pool) -> None:
    """What holds at every moment."""
    published, members = pool.published(), pool.roster.experts()
    for key, holders in published.items():
        assert len(set(holders)) == len(holders)
        for name in holders:  # what is published is there
            assert key in pool.workers[name].loaded, (key, name)
    for name, worker in pool.workers.items():
        info = members[name].info
        assert len(worker.loaded) <= info.num_slots + info.spare_slots
        if worker.told is not None:
            keys = worker.told.experts
            assert len(keys) == len(set(keys)) <= info.num_slots + info.spare_slots
            if members[name].exit is None:
                parts = Counter(pool.space.unit_of(key) for key in keys)
                assert set(parts.values()) <= {pool.space.unit_size}


def check_at_rest(pool: Pool) -> None:
    """When all was loaded: coverage, nobody left to leave, spare slots given back."""
    roster, size = pool.roster, pool.space.unit_size
    try:
        check_slots(pool.space, roster.all_slots())
        enough = bool(pool.roster._placed)
    except PlacementError:
        enough = False
    if enough:
        assert all(pool.published().values())
        assert not any(member.hands_over for member in roster.experts().values())
    room = sum(slots // size for slots in roster.slots().values()) * size
    if roster._placed and room >= pool.space.num_total and not roster.pins:
        for name, experts in roster.table().items():
            assert len(experts) <= roster.slots()[name]


@settings(max_examples=60)
@given(st.sampled_from(SPACES), st.integers(0, 3), st.lists(events, min_size=25, max_size=80))
def test_any_history_is_safe_and_comes_to_rest(
    space: ExpertSpace, redundancy: int, history: list[tuple]
) -> None:
    pool = Pool(space, redundancy=redundancy)
    for event in [("join", "a", 4, 2), ("join", "b", 4, 2), *history, ("run",)]:
        before, held = pool.roster.snapshot, pool.published()
        apply(pool, event)
        check_now(pool)
        after = pool.roster.snapshot
        assert after.version >= before.version and after.epoch >= before.epoch
        assert (after.version == before.version) == (after == before)
        assert after.epoch > before.epoch or after.holders == before.holders
        if event[0] not in ("die", "again") and pool.roster.staying():
            for key, holders in pool.published().items():
                assert holders or not held[key], (event, key)  # no expert lost its last holder
    for worker in pool.workers.values():
        worker.bad = set()
    pool.run()
    pool.wait(1000.0)  # what failed may be tried again
    pool.run()
    check_at_rest(pool)

    pool.loads = {
        layer: [7 * i % 5 for i in range(space.num_experts)] for layer in space.moe_layers
    }
    for _ in range(100):  # under constant load it comes to rest
        if not pool.rebalance().startswith(("moved", "dropped")):
            break
        pool.run()
        check_now(pool)
    assert pool.rebalance().startswith("nothing moved")
    check_at_rest(pool)
