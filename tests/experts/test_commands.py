"""Commands on a roster, and rebalancing steps: pins, scale, what is refused and why."""

from __future__ import annotations

import pytest

from experts.directory.commands import carry_out
from experts.messages import CommandRefused, Scale
from experts.placement.rebalance import RebalanceRules, rebalance
from experts.placement.space import ExpertSpace
from tests.experts.pool import Pool, pool, register

FOUR = ExpertSpace(moe_layers=(1,), num_experts=4)
GROUPED = ExpertSpace(moe_layers=(1,), num_experts=8, num_groups=4)


# ---------------------------------------------------------------- pins


def test_a_pinned_expert_gets_its_replicas_at_once() -> None:
    cluster = pool(FOUR, "abc", 2)
    assert cluster.pin(1, 3, 3) == "expert 3 of layer 1: at least 3 replicas from now on"
    cluster.run()
    assert cluster.held_by() == ["a", "b", "c", "a+b+c"]


def test_a_pin_takes_slots_of_other_replicas_but_no_coverage() -> None:
    cluster = pool(FOUR, "abc", 2, redundancy=2)
    assert cluster.held_by() == ["a+c", "b", "b+c", "a"]
    cluster.pin(1, 3, 3)
    cluster.run()
    assert cluster.held_by()[3] == "a+b+c"
    assert cluster.num_held() == dict.fromkeys("abc", 2) and all(cluster.held_by())


def test_a_pin_survives_deaths_and_is_met_again_by_a_joiner() -> None:
    cluster = pool(FOUR, "abc", 4)
    cluster.pin(1, 0, 3)
    cluster.run()
    cluster.die("b")
    cluster.run()
    assert cluster.held_by()[0] == "a+c"  # as many as there are workers
    cluster.loads = {1: [0, 9, 9, 9]}
    cluster.join("d", 1)
    cluster.run()
    assert cluster.held_by()[0] == "a+c+d"


def test_lost_experts_go_to_unpinned_replicas_and_spare_slots_before_pinned_ones() -> None:
    cluster = pool(FOUR, "abcd", 2, spare=1)
    cluster.pin(1, 0, 3)
    cluster.run()
    cluster.die("d")
    cluster.run()
    assert cluster.held_by()[0] == "a+b+c" and all(cluster.held_by())


def test_a_pin_that_is_lifted_frees_its_slots() -> None:
    cluster = pool(FOUR, "ab", 3)
    cluster.pin(1, 0, 2)
    cluster.run()
    assert cluster.pin(1, 0, 1) == "expert 0 of layer 1 is no longer pinned"
    assert cluster.roster.pins == {}
    cluster.pin(1, 1, 2)
    cluster.pin(1, 2, 2)
    cluster.run()
    assert cluster.held_by()[1:3] == ["a+b", "a+b"]


def test_group_limited_models_pin_whole_groups() -> None:
    cluster = pool(GROUPED, "ab", 6)
    assert (
        cluster.pin(1, 5, 2) == "the group of expert 5 of layer 1: at least 2 replicas from now on"
    )
    cluster.run()
    assert cluster.held_by()[4:6] == ["a+b", "a+b"]


@pytest.mark.parametrize(
    ("layer", "expert", "replicas", "words"),
    [
        (2, 0, 2, "no expert 0 in layer 2: the model has experts 0 to 3 in layers 1 to 1"),
        (1, 4, 2, "no expert 4 in layer 1"),
        (1, 0, 3, "3 replicas need as many expert workers, have 2: add workers"),
        (1, 1, 2, "all pinned replicas need 6 slots, have 5 on 2 workers: add workers"),
    ],
)
def test_replicate_is_refused_with_numbers(
    layer: int, expert: int, replicas: int, words: str
) -> None:
    cluster = Pool(FOUR)
    cluster.join("a", 3)
    cluster.join("b", 2, spare=5)
    cluster.run()
    cluster.pin(1, 0, 2)
    with pytest.raises(CommandRefused, match=words):
        cluster.pin(layer, expert, replicas)


def test_rebalancing_does_not_take_a_pinned_replica() -> None:
    slots, loads = {"a": 2, "b": 2, "c": 2}, {1: [60, 6, 6, 2]}
    table = {"a": [(1, 0), (1, 1)], "b": [(1, 2), (1, 3)], "c": [(1, 1), (1, 3)]}
    limits = RebalanceRules().limits(100, 1)
    assert rebalance(FOUR, slots, table, loads, limits).moves[0].loses == (1, 3)
    assert rebalance(FOUR, slots, table, loads, limits, {(1, 3): 2}).moves[0].loses == (1, 1)
    pins = {(1, 3): 2, (1, 1): 2}
    assert rebalance(FOUR, slots, table, loads, limits, pins).moves == ()


# ---------------------------------------------------------------- rebalancing steps


def uneven() -> Pool:
    """b holds the hot 1 and 3, a has a free slot."""
    cluster = Pool(FOUR)
    cluster.join("a", 3)
    cluster.join("b", 2)
    cluster.run()
    assert cluster.held_by() == ["a", "b", "a", "b"]
    cluster.loads = {1: [1, 10, 1, 10]}
    return cluster


def test_a_step_says_what_it_moved_and_what_that_is_predicted_to_bring() -> None:
    cluster = uneven()
    assert cluster.rebalance() == "moved 1 expert, busiest worker 82 % -> 36 % above the mean"
    assert cluster.held_by() == ["a", "b", "a", "b"]  # published when it is there
    cluster.run()
    assert cluster.held_by() == ["a", "a+b", "a", "b"]
    assert (cluster.roster.counters.steps, cluster.roster.counters.moves) == (1, 1)


def test_a_step_waits_for_rest_and_for_load() -> None:
    cluster = uneven()
    cluster.loads = {}
    assert cluster.rebalance() == "nothing moved: no load has been reported yet"
    cluster.loads = {1: [1, 1, 1, 1]}
    assert "above the mean, no change gains 2 %" in cluster.rebalance()
    cluster.loads = {1: [1, 10, 1, 10]}
    cluster.rebalance()
    assert cluster.rebalance() == "nothing moved: experts are still being loaded"
    cluster.run()
    cluster.join("c", 4)
    cluster.run()
    cluster.leave("c")
    cluster.leave("b")
    assert cluster.rebalance() == "nothing moved: a worker hands over its experts"
    assert Pool(FOUR).rebalance() == "nothing moved: the experts have not been placed yet"


def test_a_plan_for_a_pool_that_has_changed_is_thrown_away() -> None:
    cluster = uneven()
    step = cluster.rebalancer.begin(0.0)
    assert not isinstance(step, str)
    plan = step.plan()
    assert plan.moves
    cluster.join("c", 1)
    before = cluster.roster.table()
    assert "has changed meanwhile" in cluster.rebalancer.finish(step, plan)
    assert cluster.roster.table() == before and cluster.roster.counters.steps == 0


def test_a_step_works_around_workers_that_use_spare_slots() -> None:
    cluster = pool(FOUR, "ab", 2, spare=2)
    cluster.die("b")
    cluster.run()
    cluster.loads = {1: [9, 1, 1, 1]}
    assert cluster.rebalance().startswith("nothing moved: busiest worker 0 %")


def test_steps_are_made_so_often_and_not_before() -> None:
    cluster = Pool(FOUR, rebalance=RebalanceRules(every_s=10.0))
    assert not cluster.rebalancer.is_due(9.9) and cluster.rebalancer.is_due(10.0)
    assert isinstance(cluster.rebalancer.begin(10.0), str)
    assert cluster.rebalancer.is_due(10.0)  # nothing was planned
    cluster = uneven()
    cluster.rebalancer.begin(10.0)
    assert not cluster.rebalancer.is_due(19.9) and cluster.rebalancer.is_due(20.0)
    cluster = Pool(FOUR, rebalance=RebalanceRules(enabled=False))
    assert not cluster.rebalancer.is_due(1e9)


def test_a_step_moves_an_eighth_of_the_slots_unless_told_otherwise() -> None:
    assert RebalanceRules().limits(800, 1).max_moves == 100
    assert RebalanceRules().limits(7, 1).max_moves == 1
    assert RebalanceRules().limits(7, 4).max_moves == 4
    assert RebalanceRules(max_moves=3, min_gain=0.1).limits(800, 4).max_moves == 3


# ---------------------------------------------------------------- scale


def test_scale_is_published_as_a_new_version_of_the_same_epoch() -> None:
    cluster = pool(FOUR, "ab", 2)
    before = cluster.roster.snapshot
    assert carry_out(cluster.roster, Scale(role="experts", workers=4)) == (
        "experts: 4 workers from now on"
    )
    carry_out(cluster.roster, Scale(role="attention", workers=2))
    cluster.settle()
    after = cluster.roster.snapshot
    assert after.scale == {"experts": 4, "attention": 2}
    assert (after.version, after.epoch) == (before.version + 1, before.epoch)
    carry_out(cluster.roster, Scale(role="experts", workers=None))
    cluster.settle()
    assert cluster.roster.snapshot.scale == {"attention": 2}


def test_scale_below_coverage_is_refused_with_numbers() -> None:
    cluster = pool(FOUR, "ab", 2)
    words = "1 expert workers of 2 slots cannot hold 4 experts: 2 at least"
    with pytest.raises(CommandRefused, match=words):
        carry_out(cluster.roster, Scale(role="experts", workers=1))
    carry_out(cluster.roster, Scale(role="attention", workers=1))


def test_scale_above_the_tier_s_bound_is_refused_with_the_setting() -> None:
    cluster = pool(FOUR, "ab", 2, max_workers={"experts": 8})
    words = r"9 experts workers are more than experts.scaling.max_workers = 8: raise it"
    with pytest.raises(CommandRefused, match=words):
        carry_out(cluster.roster, Scale(role="experts", workers=9))
    assert cluster.roster.snapshot.scale == {}
    carry_out(cluster.roster, Scale(role="experts", workers=8))
    carry_out(cluster.roster, Scale(role="attention", workers=9))  # no bound is known


def test_a_restarted_directory_goes_on_with_the_newest_scale_that_anybody_saw() -> None:
    cluster = Pool(FOUR)
    for name, version, workers in (("i", 7, 3), ("j", 9, 5), ("k", 8, 4), ("l", 0, 6)):
        seen = {"experts": workers}
        cluster.roster.join(
            register(name, "ingress", seen_version=version, seen_epoch=1, seen_scale=seen), 0.0
        )
        cluster.settle()
    assert cluster.roster.snapshot.scale == {"experts": 5}
    assert cluster.roster.snapshot.version > 9
    carry_out(cluster.roster, Scale(role="experts", workers=2))
    late = register("m", "ingress", seen_version=50, seen_epoch=1, seen_scale={"experts": 9})
    cluster.roster.join(late, 0.0)
    cluster.settle()
    assert cluster.roster.snapshot.scale == {"experts": 2}  # a command of its own counts more
