"""Units in slots while a rebalancing plan is made: who holds what, loads, slots to be had. Pure.

A worker has a slot for a further unit if one is *free*, or *spare*: it holds a replica whose unit
stays on another worker that held it when the step began, on as many as are pinned. Replicas that
the step itself adds do not count: whatever is changed, each unit keeps one of its first holders.
"""

from collections.abc import Mapping
from typing import NamedTuple

from experts.placement.space import (
    ExpertKey,
    ExpertSpace,
    Loads,
    PlacementError,
    Table,
    Unit,
    unit_loads,
)


class Change(NamedTuple):
    """What happens to one slot; None: the slot was empty before, or is empty after."""

    worker: int
    gains: Unit | None
    loses: Unit | None


Action = tuple[Change, ...]  # changes that are worth something only together


class SlotBoard:
    """The table as sets, kept up to date with `apply`. Workers are numbered in order of name."""

    def __init__(
        self,
        space: ExpertSpace,
        slots: Mapping[str, int],
        load: Mapping[Unit, float],
        pins: Mapping[Unit, int],
    ) -> None:
        """Nobody holds anything yet; `load` of every unit, `pins`: least number of holders."""
        self.space, self.slots, self.load, self.pins = space, slots, load, pins
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
        cls,
        space: ExpertSpace,
        slots: Mapping[str, int],
        table: Table,
        loads: Loads,
        pins: Mapping[Unit, int],
    ) -> "SlotBoard":
        """A unit held in part counts as held. Raises PlacementError."""
        board = cls(space, slots, unit_loads(space, loads), pins)
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
        board = SlotBoard(self.space, self.slots, self.load, self.pins)
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
                if len(holders) > self._least_holders(unit):
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
        if len(self.keepers[unit]) <= self._least_holders(unit):
            for keeper in self.keepers[unit]:
                self.spare[keeper].discard(unit)

    def _least_holders(self, unit: Unit) -> int:
        return max(1, self.pins.get(unit, 1))

    def _harm(self, worker: int, unit: Unit) -> tuple[float, float, Unit]:
        """How far the other holders rise above the layer's peak if this replica goes; how far."""
        others = len(self.holders[unit]) - 1
        rise = self.load[unit] / (others * (others + 1))
        row, peak = self.rows[unit[0]], self.peak[unit[0]]
        highest = max([row[other] for other in self.holders[unit] if other != worker])
        return max(0.0, highest + rise - peak), rise, unit


def _without(holders: tuple[int, ...], worker: int) -> tuple[int, ...]:
    return tuple([holder for holder in holders if holder != worker])
