import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.placement.eplb import balancedness, rebalance_experts
from experts.placement.space import PlacementError

PUBLISHED_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_published_example_comes_out_exactly() -> None:
    physical, logical, count = rebalance_experts(PUBLISHED_LOADS, 16, 4, 2, 8)
    assert physical.tolist() == PUBLISHED_MAP
    assert count[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert logical[0, 5].tolist() == [0, 2] or logical[0, 5].tolist() == [2, 0]
    assert logical[0, 7].tolist() == [3, -1]


def test_nodes_that_do_not_divide_groups_select_the_global_policy() -> None:
    by_nodes = rebalance_experts(PUBLISHED_LOADS, 16, 3, 2, 8)
    flat = rebalance_experts(PUBLISHED_LOADS, 16, 1, 1, 8)
    for ours, expected in zip(by_nodes, flat, strict=True):
        assert ours.tolist() == expected.tolist()


def test_the_hottest_expert_gets_the_spare_replica() -> None:
    physical, logical, count = rebalance_experts([[10, 1, 1]], 4, 1, 1, 2)
    assert count.tolist() == [[2, 1, 1]]
    assert sorted(physical[0].tolist()) == [0, 0, 1, 2]
    # loads per replica 5, 5, 1, 1: one hot and one cold replica on each GPU
    assert [set(physical[0, gpu * 2 : gpu * 2 + 2].tolist()) & {0} for gpu in (0, 1)] == [{0}, {0}]
    assert logical.shape == (1, 3, 2)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_maps_agree_and_groups_stay_on_their_node(data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, 3))
    groups = nodes * data.draw(st.integers(1, 3))
    experts = groups * data.draw(st.integers(1, 4))
    gpus = nodes * data.draw(st.integers(1, 3))
    per_gpu = -(-experts // gpus) + data.draw(st.integers(0, 2))
    load = data.draw(
        st.lists(
            st.lists(st.integers(0, 1000), min_size=experts, max_size=experts),
            min_size=1,
            max_size=3,
        )
    )
    physical, logical, count = rebalance_experts(load, per_gpu * gpus, groups, nodes, gpus)
    assert physical.shape == (len(load), per_gpu * gpus)
    for layer in range(len(load)):
        assert set(physical[layer].tolist()) == set(range(experts))
        nodes_of_group: dict[int, set[int]] = {}
        for expert in range(experts):
            slots = [slot for slot in logical[layer, expert].tolist() if slot >= 0]
            assert len(slots) == count[layer, expert]
            assert (physical[layer, slots] == expert).all()
            nodes_of_group.setdefault(expert // (experts // groups), set()).update(
                slot // (per_gpu * gpus // nodes) for slot in slots
            )
        assert all(len(found) == 1 for found in nodes_of_group.values())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (([[1, 2, 3]], 3, 2, 1, 1), "3 experts cannot be split evenly over 2 groups"),
        (([[1, 2, 3]], 5, 1, 1, 2), "5 replicas cannot be split evenly over 2 GPUs"),
        (([[1, 2, 3]], 2, 1, 1, 2), "2 replicas cannot hold 3 experts"),
        (([[1, -2, 3]], 4, 1, 1, 2), "not negative"),
    ],
)
def test_impossible_numbers_are_named(args: tuple, words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        rebalance_experts(*args)


def test_balancedness_is_mean_over_max() -> None:
    assert balancedness([2, 4, 6, 4]) == pytest.approx(4 / 6)
    assert balancedness([3, 3]) == 1.0
    assert balancedness(np.zeros(4)) == 1.0
