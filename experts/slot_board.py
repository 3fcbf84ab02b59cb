"""Units in slots while a rebalancing plan is made: who holds what, loads, slots to be had. Pure.

A worker has a slot for a further unit if one is *free*, or *spare*: it holds a replica whose unit
stays on another worker that held it when the step began. Replicas that the step itself adds do not
count: whatever is changed, each unit keeps one of its first holders.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experts.placement import ExpertKey, ExpertSpace, PlacementError, Table, Unit

Loads = Mapping[int, Sequence[float]]  # layer -> load of each logical expert [E]


class Change(NamedTuple):
    """What happens to one slot; None: the slot was empty before, or is empty after."""

    worker: int
    gains: Unit | None
    loses: Unit | None


Action = tuple[Change, ...]  # changes that are worth something only together


class SlotBoard:
    """The table as sets, kept up to date with `apply`. Workers are numbered in order of name."""

    def __init__(
        self, space: ExpertSpace, slots: Mapping[str, int], load: Mapping[Unit, float]
    ) -> None:
        """Nobody holds anything yet; `load` of every unit."""
        self.space, self.slots, self.load = space, slots, load
        self.workers = sorted(slots)
        self.holders: dict[Unit, tuple[int, ...]] = dict.fromkeys(load, ())
        self.keepers: dict[Unit, tuple[int, ...]] = {}  # that held it when the step began
        self.free = [slots[name] // space.unit_size for name in self.workers]
        self.spare: list[set[Unit]] = [set() for _ in self.workers]
        self.held: dict[int, list[set[Unit]]] = {
            layer: [set() for _ in self.workers] for layer in space.moe_layers
        }
        self.rows = {layer: [0.0] * len(self.workers) for layer in space.moe_layers}  # load [W]
        self.peak = dict.fromkeys(space.moe_layers, 0.0)

    @classmethod
    def of_table(
        cls, space: ExpertSpace, slots: Mapping[str, int], table: Table, loads: Loads
    ) -> "SlotBoard":
        """A unit held in part counts as held. Raises PlacementError."""
        board = cls(space, slots, _unit_loads(space, loads))
        size = space.unit_size
        for worker, name in enumerate(board.workers):
            units = {(layer, expert // size) for layer, expert in table.get(name, ())}
            for unit in units & board.holders.keys():
                board.holders[unit] += (worker,)
        board._begin()
        for name, free in zip(board.workers, board.free, strict=True):
            if free < 0:
                raise PlacementError(
                    f"worker {name} holds {slots[name] // size * size - free * size} experts in "
                    f"{slots[name]} slots: replan first"
                )
        return board

    def next_step(self) -> "SlotBoard":
        """The same table when all is loaded: every holder counts, loads are summed afresh."""
        board = SlotBoard(self.space, self.slots, self.load)
        board.holders = {unit: tuple(sorted(held)) for unit, held in self.holders.items()}
        board._begin()
        return board

    def _begin(self) -> None:
        self.keepers = self.holders.copy()
        for unit, holders in self.holders.items():
            for worker in holders:
                self.free[worker] -= 1
                self.held[unit[0]][worker].add(unit)
                self.rows[unit[0]][worker] += self.load[unit] / len(holders)
                if len(holders) > 1:
                    self.spare[worker].add(unit)
        self.peak = {layer: max(row, default=0.0) for layer, row in self.rows.items()}

    @property
    def objective(self) -> float:
        """Sum over the layers of the busiest worker's load: what a token waits for."""
        return sum(self.peak.values())

    def excess(self, layer: int) -> float:
        """The busiest worker's load above the mean: what the layer can gain at most."""
        row = self.rows[layer]
        return self.peak[layer] - sum(row) / len(row) if row else 0.0

    def share(self, unit: Unit) -> float:
        """Load of the unit on each of its holders."""
        return self.load[unit] / len(self.holders[unit])

    def has_slot(self, worker: int) -> bool:
        return self.free[worker] > 0 or bool(self.spare[worker])

    def cheapest_slot(self, worker: int) -> Unit | None:
        """The replica whose loss hurts least; None: there is a free slot."""
        if self.free[worker]:
            return None
        return min(self.spare[worker], key=lambda unit: self._harm(worker, unit))

    def rows_after(self, action: Action) -> dict[int, list[float]]:
        """Load of every worker [W] in the layers that the action touches."""
        holders: dict[Unit, tuple[int, ...]] = {}
        for worker, gains, loses in action:
            if gains:
                holders[gains] = (*holders.get(gains, self.holders[gains]), worker)
            if loses:
                holders[loses] = _without(holders.get(loses, self.holders[loses]), worker)
        rows: dict[int, list[float]] = {}
        for unit, after in holders.items():
            row = rows.setdefault(unit[0], self.rows[unit[0]][:])
            for worker in self.holders[unit]:
                row[worker] -= self.share(unit)
            for worker in after:
                row[worker] += self.load[unit] / len(after)
        return rows

    def apply(self, action: Action) -> None:
        for layer, row in self.rows_after(action).items():
            self.rows[layer], self.peak[layer] = row, max(row)
        for worker, gains, loses in action:
            if loses:
                self._lose(worker, loses)
            if gains:
                self.free[worker] -= 1
                self.holders[gains] += (worker,)
                self.held[gains[0]][worker].add(gains)

    def table(self) -> dict[str, list[ExpertKey]]:
        table: dict[str, list[ExpertKey]] = {name: [] for name in self.workers}
        for unit, holders in self.holders.items():
            for worker in holders:
                table[self.workers[worker]].extend(self.space.experts_of(unit))
        return table

    def _lose(self, worker: int, unit: Unit) -> None:
        self.free[worker] += 1
        self.holders[unit] = _without(self.holders[unit], worker)
        self.held[unit[0]][worker].discard(unit)
        self.spare[worker].discard(unit)
        self.keepers[unit] = _without(self.keepers[unit], worker)
        if len(self.keepers[unit]) == 1:
            self.spare[self.keepers[unit][0]].discard(unit)

    def _harm(self, worker: int, unit: Unit) -> tuple[float, float, Unit]:
        """How far the other holders rise above the layer's peak if this replica goes; how far."""
        others = len(self.holders[unit]) - 1
        rise = self.load[unit] / (others * (others + 1))
        row, peak = self.rows[unit[0]], self.peak[unit[0]]
        highest = max([row[other] for other in self.holders[unit] if other != worker])
        return max(0.0, highest + rise - peak), rise, unit


def _without(holders: tuple[int, ...], worker: int) -> tuple[int, ...]:
    return tuple([holder for holder in holders if holder != worker])


def _unit_loads(space: ExpertSpace, loads: Loads) -> dict[Unit, float]:
    """Load of each unit; a layer that nobody measured has none."""
    total: dict[Unit, float] = {}
    idle = [0.0] * space.num_experts
    for layer in space.moe_layers:
        row = np.asarray(loads.get(layer, idle), dtype=np.float64)
        if row.shape != (space.num_experts,) or not np.isfinite(row).all() or (row < 0).any():
            raise PlacementError(
                f"loads of layer {layer}: needs {space.num_experts} finite numbers, none negative"
            )
        by_unit = row.reshape(-1, space.unit_size).sum(axis=1).tolist()
        total.update({(layer, index): load for index, load in enumerate(by_unit)})
    return total
