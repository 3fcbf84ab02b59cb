"""How uneven the workers are before and after each step of rebalancing. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experts.placement.eplb import rebalance_experts
from experts.placement.rebalance import Limits, rebalance
from experts.placement.space import ExpertSpace, Table

Rows = npt.NDArray[np.float64]
"""[L, E]: rows by MoE layer and logical expert."""


@dataclass(frozen=True)
class Imbalance:
    """(max - mean) / mean of the workers' rows: 0 is even."""

    worst_layer: float
    mean_layer: float
    """Mean over the layers: what TensorRT-LLM reports for its ranks."""
    total: float
    """Of the sums over all layers."""


@dataclass(frozen=True)
class Step:
    """After a step of `rebalance`; step 0 is the table that it began with."""

    imbalance: Imbalance
    num_loads: int
    """Slots that were loaded."""
    seconds: float
    """To make the plan."""


def run_steps(
    space: ExpertSpace,
    slots: dict[str, int],
    table: Table,
    windows: Sequence[Rows],
    limits: Limits,
) -> tuple[list[Step], Table]:
    """One step a window, but the last: planned with its rows, judged on those of the next one.

    Step 0 is judged as step 1 is. Also returns the last table.
    """
    steps = [Step(imbalance(space, table, windows[1]), 0, 0.0)]
    for seen, next_one in zip(windows, windows[1:], strict=False):
        loads = loads_of(space, seen)
        begin = time.perf_counter()
        plan = rebalance(space, slots, table, loads, limits)
        seconds = time.perf_counter() - begin
        num_units = sum(move.gains is not None for move in plan.moves)
        table = plan.table
        found = imbalance(space, table, next_one)
        steps.append(Step(found, num_units * space.unit_size, seconds))
    return steps, table


def loads_of(space: ExpertSpace, rows: Rows) -> dict[int, list[float]]:
    """As `rebalance` takes them."""
    return {layer: row.tolist() for layer, row in zip(space.moe_layers, rows, strict=True)}


def imbalance(space: ExpertSpace, table: Table, rows: Rows) -> Imbalance:
    """Of a table under these rows, each expert's split evenly over its replicas."""
    return _summary(worker_rows(space, table, rows))


def eplb_imbalance(seen: Rows, next_one: Rows, num_slots: int, num_workers: int) -> Imbalance:
    """Of DeepSeek's EPLB, all `num_slots` of a layer filled anew, on rows it has not seen."""
    logical, _, replicas = rebalance_experts(seen, num_slots, 1, 1, num_workers)
    share = np.take_along_axis(next_one / replicas, logical, axis=1)  # [L, num_slots]
    return _summary(share.reshape(len(share), num_workers, -1).sum(axis=2))


def _summary(by_worker: Rows) -> Imbalance:
    by_layer = [_excess(layer) for layer in by_worker]
    return Imbalance(max(by_layer), sum(by_layer) / len(by_layer), _excess(by_worker.sum(axis=0)))


def worker_rows(space: ExpertSpace, table: Table, rows: Rows) -> Rows:
    """[L, W]: rows of each layer and worker, workers in order of name."""
    holds = np.zeros((*rows.shape, len(table)))
    for worker, (layer, expert) in _entries(table):
        holds[space.moe_layers.index(layer), expert, worker] = 1.0
    share = rows / np.maximum(1.0, holds.sum(axis=2))  # [L, E]
    return np.einsum("le,lew->lw", share, holds)


def _entries(table: Table) -> Iterator[tuple[int, tuple[int, int]]]:
    for worker, name in enumerate(sorted(table)):
        for key in table[name]:
            yield worker, key


def _excess(rows: npt.NDArray[np.float64]) -> float:
    mean = float(rows.mean())
    return float(rows.max()) / mean - 1 if mean else 0.0
