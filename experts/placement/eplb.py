"""EPLB: known loads and a fixed grid of GPUs -> how many replicas, on which GPU. Pure.

The published greedy of github.com/deepseek-ai/EPLB, written anew, for tests and benchmarks to
compare with. `replan.py` and `rebalance.py` serve workers that come and go.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from experts.placement.space import PlacementError


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Replicate the hot experts, pack the replicas evenly on GPUs.

    weight [L, E] is the load per layer and logical expert. If `num_nodes` divides `num_groups`,
    groups are packed on nodes first and an expert is replicated inside its node only
    (hierarchical); else nodes and groups are ignored (global).

    Returns int64 physical_to_logical_map [L, R], logical_to_physical_map [L, E, max replicas] with
    -1 where there is none, logical_replica_count [L, E]. Slot p lies on GPU p // (R / num_gpus).
    Raises PlacementError.
    """
    load = np.asarray(weight, dtype=np.float64)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check_grid(load, num_replicas, num_groups, num_nodes, num_gpus)
    plans = [_plan_layer(row, num_replicas, num_groups, num_nodes, num_gpus) for row in load]

    physical_to_logical = np.array([[expert for expert, _ in plan] for plan in plans])
    replica_count = np.zeros(load.shape, dtype=np.int64)
    for layer, plan in enumerate(plans):
        np.add.at(replica_count[layer], [expert for expert, _ in plan], 1)
    logical_to_physical = np.full((*load.shape, replica_count.max()), -1)
    for layer, plan in enumerate(plans):
        for slot, (expert, rank) in enumerate(plan):
            logical_to_physical[layer, expert, rank] = slot
    return physical_to_logical, logical_to_physical, replica_count


def _check_grid(
    load: NDArray[np.float64], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> None:
    if load.ndim != 2 or not load.size or not np.isfinite(load).all() or (load < 0).any():
        raise PlacementError(f"loads {load.shape} must be [layers, experts], finite, not negative")
    num_experts = load.shape[1]
    for whole, name, parts, of in (
        (num_experts, "experts", num_groups, "groups"),
        (num_replicas, "replicas", num_gpus, "GPUs"),
        (num_gpus, "GPUs", num_nodes, "nodes"),
    ):
        if parts < 1 or whole % parts:
            raise PlacementError(f"{whole} {name} cannot be split evenly over {parts} {of}")
    if num_replicas < num_experts:
        raise PlacementError(f"{num_replicas} replicas cannot hold {num_experts} experts")


def _plan_layer(
    load: NDArray[np.float64], num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> list[tuple[int, int]]:
    """(expert, replica rank) of every slot of one layer; load is [E]."""
    group_size = len(load) // num_groups
    plan: list[tuple[int, int]] = []
    for groups in _pack(load.reshape(num_groups, group_size).sum(axis=1), num_nodes):
        experts = [group * group_size + i for group in groups for i in range(group_size)]
        replicas, share = _replicate(load[experts], num_replicas // num_nodes)
        for gpu in _pack(share, num_gpus // num_nodes):
            plan += [(experts[replicas[item][0]], replicas[item][1]) for item in gpu]
    return plan


def _replicate(
    load: NDArray[np.float64], num_replicas: int
) -> tuple[list[tuple[int, int]], NDArray[np.float64]]:
    """Every expert once, then each spare replica to the expert with the largest load per replica.

    Returns (expert, rank) [num_replicas] and the load that each replica will see.
    """
    count = np.ones(len(load), dtype=np.int64)
    replicas = [(expert, 0) for expert in range(len(load))]
    while len(replicas) < num_replicas:
        hottest = int(np.argmax(load / count))
        replicas.append((hottest, int(count[hottest])))
        count[hottest] += 1
    return replicas, np.array([load[expert] / count[expert] for expert, _ in replicas])


def _pack(load: NDArray[np.float64], num_packs: int) -> list[list[int]]:
    """Items into packs of equal length: heaviest first, each to the lightest pack that has room."""
    room = len(load) // num_packs
    if room == 1:
        return [[item] for item in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    total = [0.0] * num_packs
    for item in np.argsort(-load, kind="stable").tolist():
        open_packs = (pack for pack in range(num_packs) if len(packs[pack]) < room)
        lightest = min(open_packs, key=total.__getitem__)
        packs[lightest].append(item)
        total[lightest] += float(load[item])
    return packs


def balancedness(load: ArrayLike) -> float:
    """Mean / max of the loads of GPUs or workers: 1.0 is even; an idle system counts as even."""
    values = np.asarray(load, dtype=np.float64)
    peak = float(values.max(initial=0.0))
    return float(values.mean()) / peak if peak > 0 else 1.0
