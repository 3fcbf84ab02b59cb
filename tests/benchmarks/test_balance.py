import numpy as np
import pytest
from balance.cost import median_interval
from balance.imbalance import Imbalance, eplb_imbalance, imbalance, run_steps, worker_rows
from balance.traces import V2_LITE, V3_32, Pool, zipf_windows

from experts.placement.rebalance import Limits
from experts.placement.space import ExpertSpace

TWO_LAYERS = ExpertSpace(moe_layers=(3, 4), num_experts=2)
TABLE = {"a": [(3, 0), (4, 0)], "b": [(3, 0), (3, 1), (4, 1)]}
ROWS = np.array([[60.0, 10.0], [30.0, 10.0]])


def test_replicas_share_the_rows_of_their_expert() -> None:
    assert worker_rows(TWO_LAYERS, TABLE, ROWS).tolist() == [[30, 40], [30, 10]]


def test_imbalance_is_what_the_busiest_worker_has_above_the_mean() -> None:
    found = imbalance(TWO_LAYERS, TABLE, ROWS)
    assert found.worst_layer == pytest.approx(0.5)  # 30 of a mean of 20
    assert found.mean_layer == pytest.approx((5 / 35 + 0.5) / 2)
    assert found.total == pytest.approx(60 / 55 - 1)


def test_an_idle_layer_is_even() -> None:
    assert imbalance(TWO_LAYERS, TABLE, np.zeros((2, 2))) == Imbalance(0.0, 0.0, 0.0)


def test_a_step_is_judged_on_rows_that_it_has_not_seen() -> None:
    space = ExpertSpace(moe_layers=(0,), num_experts=2)
    table = {"a": [(0, 0)], "b": [(0, 1)]}
    hot_0, hot_1 = np.array([[90.0, 10.0]]), np.array([[10.0, 90.0]])
    slots = {"a": 2, "b": 2}
    steps, last = run_steps(space, slots, table, [hot_0, hot_1], Limits(1))
    assert last == {"a": [(0, 0)], "b": [(0, 0), (0, 1)]}  # planned for expert 0
    assert [step.num_loads for step in steps] == [0, 1]
    assert [step.imbalance.total for step in steps] == pytest.approx([0.8, 0.9])  # 95 of 50


def test_eplb_is_judged_on_rows_that_it_has_not_seen_either() -> None:
    seen, next_one = np.array([[60.0, 30.0, 30.0]]), np.array([[100.0, 30.0, 10.0]])
    assert eplb_imbalance(seen, seen, num_slots=4, num_workers=2).total == pytest.approx(0.0)
    found = eplb_imbalance(seen, next_one, num_slots=4, num_workers=2)
    assert found.total == pytest.approx(80 / 70 - 1)  # 50 + 30 and 50 + 10


@pytest.mark.parametrize(("pool", "each"), [(V3_32, 522), (V2_LITE, 234)])
def test_pools_have_an_eighth_more_slots_than_experts(pool: Pool, each: int) -> None:
    assert set(pool.slots.values()) == {each}
    assert pool.redundant_share == pytest.approx(0.125)


def test_whole_groups_round_the_redundancy_up() -> None:
    pool = Pool("groups", ExpertSpace((1, 2, 3), 32, num_groups=4), 4, 4)
    assert set(pool.slots.values()) == {32}  # 12 groups and 1.5 more on 4 workers: 4 each
    assert pool.redundant_share == pytest.approx(1 / 3)


def test_skewed_windows_have_their_rows_and_their_skew() -> None:
    first, second = zipf_windows(V2_LITE, 1.0, tokens=10_000, seed=7, number=2)
    assert first.shape == (26, 64)
    assert first.sum(axis=1).tolist() == [60_000] * 26  # 6 experts a token
    hottest = first.max(axis=1) / 60_000
    assert hottest == pytest.approx(np.full(26, 1 / sum(1 / n for n in range(1, 65))), rel=0.05)
    assert (first.argmax(axis=1) == second.argmax(axis=1)).all()  # the same traffic
    assert (first != second).any()  # another draw
    assert len(set(first.argmax(axis=1).tolist())) > 10  # each layer has its own hot expert


def test_windows_depend_on_the_seed_only() -> None:
    one, same, other = (next(zipf_windows(V2_LITE, 1.0, 100, seed, 1)) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()


def test_the_interval_of_the_median_narrows_with_the_pairs() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([float(value) for value in range(100)]) == (40.0, 59.0)
