"""The dispatch plan of the GPU, in Triton's interpreter, against its twin and the host's plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from router.dispatch import Pairs, plan_pairs
from router.kernels.gpu.dispatch import DispatchPlan, plan_dispatch, plan_dispatch_torch
from tests.gpu.poison import poisoned  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("poisoned")

PLAN = [plan_dispatch, plan_dispatch_torch]
SHAPES = [  # T, k, E, W, holders of an expert
    (3, 8, 32, 8, 3),
    (1, 6, 64, 16, 2),
    (4, 3, 9, 5, 1),
    (3, 1, 4, 1, 1),
    (1, 17, 40, 20, 2),
]


def table(
    num_experts: int, num_workers: int, num_holders: int, seed: int, missing: float = 0.1
) -> Tensor:
    """holders [E, R]: different workers, some of them padding."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(num_workers)[:num_holders] for _ in range(num_experts)]
    holders = np.stack(rows).astype(np.int32)
    holders[rng.random(holders.shape) < missing] = -1
    return torch.from_numpy(holders)


def chosen(num_rows: int, top_k: int, num_experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """topk_ids [T, k] ascending, topk_weights [T, k]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_rows, num_experts, generator=generator).argsort(1)
    ids = order[:, :top_k].sort(1).values.int().contiguous()
    return ids, torch.rand(num_rows, top_k, generator=generator)


def loads(num_workers: int, seed: int) -> Tensor:
    return torch.randint(0, 5, (num_workers,), generator=torch.Generator().manual_seed(seed)).int()


def host_workers(ids: Tensor, holders: Tensor, load: Tensor) -> np.ndarray:
    """[T, k] as router.dispatch plans it, row after row."""
    num_rows, top_k = ids.shape
    flat = ids.flatten().numpy().astype(np.int64)
    pairs = Pairs(np.repeat(np.arange(num_rows), top_k), flat, np.ones(flat.shape, np.float32))
    usable = np.ones(len(load), np.bool_)
    plan = plan_pairs(pairs, holders.numpy(), usable, load.numpy().astype(np.int64))
    workers = np.full(num_rows * top_k, -1)
    for share in plan.shares:
        workers[share.pair_index] = share.worker
    return workers.reshape(num_rows, top_k)


def num_visits(workers: np.ndarray) -> np.ndarray:
    """[T]: workers that each row goes to."""
    return np.array([len(set(row) - {-1}) for row in workers.tolist()])


def assert_same(plan: DispatchPlan, expected: DispatchPlan) -> None:
    for name, ours, theirs in zip(plan._fields, plan, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_twin_plan_the_same(shape: tuple[int, ...]) -> None:
    num_rows, top_k, num_experts, num_workers, num_holders = shape
    ids, weights = chosen(num_rows, top_k, num_experts, seed=1)
    ids[num_rows // 2, 0] = -1
    case = (ids, weights, table(num_experts, num_workers, num_holders, seed=2))
    load = loads(num_workers, seed=3) // 4  # mostly 0: the rows' own noise decides
    assert_same(
        plan_dispatch(*case, load, num_workers), plan_dispatch_torch(*case, load, num_workers)
    )


def test_places_run_on_over_blocks_of_rows() -> None:
    """More rows than a program groups (1024), by the grouping kernel alone: placing each row takes
    the interpreter minutes."""
    from router.kernels.gpu import dispatch, place

    ids, weights = chosen(2500, 2, 6, seed=1)
    holders, load = table(6, 3, 2, seed=2), loads(3, seed=3)
    expected = plan_dispatch_torch(ids, weights, holders, load, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "place_rows", place.place_rows_torch)
        assert_same(plan_dispatch(ids, weights, holders, load, 3), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plan_rows", PLAN)
def test_every_pair_is_planned_once_by_a_holder(plan_rows, shape: tuple[int, ...]) -> None:
    num_rows, top_k, num_experts, num_workers, num_holders = shape
    ids, weights = chosen(num_rows, top_k, num_experts, seed=4)
    holders = table(num_experts, num_workers, num_holders, seed=5, missing=0.4)
    plan = plan_rows(ids, weights, holders, loads(num_workers, seed=6), num_workers)
    rows, pairs = plan.row_starts.tolist(), plan.pair_starts.tolist()
    seen = []
    for w in range(num_workers):
        sent = plan.row_index[rows[w] : rows[w + 1]].tolist()
        assert sent == sorted(set(sent)), "a row travels once a worker"
        assert plan.answer_index[sent, w].tolist() == list(range(rows[w], rows[w + 1]))
        for at in range(pairs[w], pairs[w + 1]):
            row, j = divmod(int(plan.pair_index[at]), top_k)
            assert sent[int(plan.row_ids[at])] == row
            assert plan.expert_ids[at] == ids[row, j] and plan.weights[at] == weights[row, j]
            assert w in holders[int(ids[row, j])].tolist() and plan.workers[row, j] == w
            seen.append(row * top_k + j)
    held = (holders[ids.long()] >= 0).any(2).flatten()  # pairs that somebody holds
    assert sorted(seen) == held.nonzero().flatten().tolist()
    assert (plan.workers.flatten() < 0).tolist() == (~held).tolist()
    assert (plan.answer_index >= 0).sum() == rows[-1]
    padding = [plan.row_index[rows[-1] :], plan.pair_index[pairs[-1] :], plan.row_ids[pairs[-1] :]]
    assert all((p == -1).all() for p in [*padding, plan.expert_ids[pairs[-1] :]])
    assert not plan.weights[pairs[-1] :].any()


@pytest.mark.parametrize("plan_rows", PLAN)
def test_cover_then_load_then_index(plan_rows) -> None:
    """Expert 0 is on 2 only; 1 on 1 and 2; 2 on 0 and 1; 3 on 0 and 3; 4 nowhere."""
    holders = torch.tensor([[2, -1], [1, 2], [0, 1], [0, 3], [-1, -1]], dtype=torch.int32)

    def workers(ids: list[int], load: list[int]) -> list[int]:
        topk = torch.tensor([ids], dtype=torch.int32)
        case = (topk, torch.ones(topk.shape), holders, torch.tensor(load, dtype=torch.int32), 4)
        return plan_rows(*case).workers[0].tolist()

    assert workers([0, 1, 2, 3], [0, 0, 0, 0]) == [2, 2, 0, 0]  # 1 goes where 0 must; 0 takes two
    assert workers([1, 2], [0, 9, 0, 0]) == [1, 1]  # one visit, whatever the load
    assert workers([3], [5, 0, 0, 4]) == [3]  # the lower load
    assert workers([3], [4, 0, 0, 4]) == [0]  # the lower index
    assert workers([1, 4], [0, 0, 0, 0]) == [1, -1]
    assert workers([-1, 5], [0, 0, 0, 0]) == [-1, -1]  # ids of no expert


def test_first_holders_are_taken_where_greedy_visits_more() -> None:
    """Six pairs on 1 and 2 by halves; 0 holds two of each half, so greedy begins there."""
    holders = torch.tensor([[1, 0], [1, 0], [1, 3], [2, 0], [2, 0], [2, 4]], dtype=torch.int32)
    ids, weights = torch.arange(6, dtype=torch.int32).view(1, 6), torch.ones(1, 6)
    for plan_rows in PLAN:
        plan = plan_rows(ids, weights, holders, torch.zeros(5, dtype=torch.int32), 5)
        assert plan.workers[0].tolist() == [1, 1, 1, 2, 2, 2]


def test_one_row_is_planned_as_on_the_host_or_visits_fewer() -> None:
    num_better = 0
    for seed in range(200):
        ids, weights = chosen(1, 8, 32, seed)
        holders, load = table(32, 9, 3, seed), loads(9, seed)
        ours = plan_dispatch_torch(ids, weights, holders, load, 9).workers.numpy()
        host = host_workers(ids, holders, load)
        is_better = num_visits(ours)[0] < num_visits(host)[0]
        assert is_better or ours.tolist() == host.tolist()
        num_better += is_better
    assert num_better < 20


def test_rows_visit_no_more_workers_than_on_the_host() -> None:
    """20 tables of 200 rows: fewer visits in all, table by table."""
    for seed in range(20):
        ids, weights = chosen(200, 8, 64, seed)
        holders, load = table(64, 12, 3, seed), loads(12, seed)
        ours = plan_dispatch_torch(ids, weights, holders, load, 12).workers.numpy()
        assert num_visits(ours).sum() <= num_visits(host_workers(ids, holders, load)).sum()


def test_equal_replicas_share_the_rows_and_a_late_one_gets_none() -> None:
    """1000 rows of one expert on workers 0 and 1 of 4: half each; the one 1000 behind takes all."""
    ids, weights = torch.zeros(1000, 1, dtype=torch.int32), torch.ones(1000, 1)
    holders = torch.tensor([[0, 1]], dtype=torch.int32)

    def first_share(load: list[int]) -> float:
        loads = torch.tensor(load, dtype=torch.int32)
        plan = plan_dispatch_torch(ids, weights, holders, loads, 4)
        return (plan.workers == 0).float().mean().item()

    assert 0.4 < first_share([7, 7, 0, 0]) < 0.6
    assert 0.05 < first_share([500, 0, 0, 0]) < 0.25  # of uniform noise: 1/8
    assert first_share([1000, 0, 0, 0]) == 0.0


@pytest.mark.parametrize("plan_rows", PLAN)
def test_no_rows_to_plan(plan_rows) -> None:
    ids, weights = torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 4)
    plan = plan_rows(ids, weights, table(8, 3, 1, 0), loads(3, 0), 3)
    assert plan.row_starts.tolist() == plan.pair_starts.tolist() == [0, 0, 0, 0]
    assert plan.answer_index.shape == (0, 3)


def test_a_plan_that_cannot_be_is_refused() -> None:
    ids, weights = chosen(2, 3, 8, 0)
    holders, load = table(8, 3, 1, 0), loads(3, 0)
    with pytest.raises(ValueError, match="load"):
        plan_dispatch(ids, weights, holders, load, 4)
    with pytest.raises(ValueError, match="int32"):
        plan_dispatch(ids.long(), weights, holders, load, 3)
    with pytest.raises(ValueError, match="1 to 31 experts"):
        plan_dispatch(ids.new_zeros(1, 32), torch.zeros(1, 32), holders, load, 3)
    with pytest.raises(ValueError, match="topk_weights"):
        plan_dispatch(ids, weights[:1], holders, load, 3)
