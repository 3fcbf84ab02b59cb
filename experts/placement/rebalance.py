"""Move replicas to where the load is, a few at a time: measured loads -> the next table. Pure.

What is optimised: the sum over the layers of the busiest worker's load. A layer is a
synchronisation point, a token's step waits there for the busiest worker; workers that are even in
every layer are even in total, not the other way round. The load of a unit is split evenly over its
replicas.

How: EPLB's greedy, from where the table stands. In the layer with the most to gain, a unit of the
busiest worker, so that the peak falls furthest, gets a further replica on the lightest worker that
has a slot, or has a replica moved there or given up. Slots come from the coldest replicas.
`placement.replan` heals and fills; this module only improves a table that is in place.

Safe when all drops come before the loads, as the roster publishes them: at every moment each unit
has a holder that held it before the step and holds it after. So a unit that one worker alone holds
moves in two steps, a copy and then a drop. Slots that end up empty stay so until a step, or
`replan`, fills them.

A step at V3 size (58 layers of 256 experts, 64 workers) took 0.3-0.7 s of a loaded core.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from experts.placement.eplb import balancedness
from experts.placement.relief import room_for_relief, search
from experts.placement.slot_board import Action, SlotBoard
from experts.placement.space import ExpertKey, ExpertSpace, Loads, Table, Unit

_REAL = 1e-9  # relative; below it a gain is a rounding error


@dataclass(frozen=True)
class Limits:
    """How much a step may change, and what it must be good for.

    `max_moves`: slots loaded in a step, at most. `min_gain`: share of the busiest worker's load
    that each change must take off it, and all changes to a layer off the layer's peak.
    """

    max_moves: int
    min_gain: float = 0.02


@dataclass(frozen=True)
class RebalanceRules:
    """How often a step is made, and its limits.

    `max_moves` None: an eighth of the pool's slots, one unit at least. `enabled` False: only by
    command.
    """

    every_s: float = 10.0
    max_moves: int | None = None
    min_gain: float = 0.02
    enabled: bool = True

    def limits(self, num_slots: int, unit_size: int) -> Limits:
        """Of a step in a pool of so many slots."""
        if self.max_moves is not None:
            return Limits(self.max_moves, self.min_gain)
        return Limits(max(unit_size, num_slots // 8), self.min_gain)


@dataclass(frozen=True)
class Move:
    """One slot of a worker: the unit it loads (None: left empty), the one it drops first."""

    worker: str
    gains: Unit | None
    loses: Unit | None


@dataclass(frozen=True)
class Balance:
    """Balancedness (mean / max of the workers' loads) by layer."""

    by_layer: Mapping[int, float]
    objective: float  # sum over the layers of the busiest worker's load
    even: float  # the least that it could be: the load of all layers over the number of workers

    @property
    def excess(self) -> float:
        """How far the busiest workers are above the mean, relative to it; layers count by load."""
        return self.objective / self.even - 1 if self.even > 0 else 0.0

    @property
    def balancedness(self) -> float:
        """Mean / max over all layers, by their load: 1.0 is even."""
        return 1 / (1 + self.excess)


@dataclass(frozen=True)
class Plan:
    """What every worker shall hold, how that differs from now, what it is predicted to bring."""

    table: dict[str, list[ExpertKey]]
    moves: tuple[Move, ...]
    before: Balance
    after: Balance


def rebalance(
    space: ExpertSpace,
    slots: Mapping[str, int],
    table: Table,
    loads: Loads,
    limits: Limits,
    pins: Mapping[Unit, int] | None = None,
) -> Plan:
    """One step towards even load; no moves if there is nothing worth one.

    `table`: what is loaded; a replica that is only wished for does not keep its unit covered.
    `slots`: worker_id -> number. `loads`: layer -> rows of each logical expert [E], as
    `LoadCounter.totals`. `pins`: least number of holders of a unit; those it has are kept. Workers
    count as equally fast. Repeated under unchanged loads it comes to rest: every step lowers the
    objective, or (one load, no slot to be had where it is needed) makes room for a step that does.
    Units without a holder are left to `replan`. Raises PlacementError.
    """
    before = SlotBoard.of_table(space, slots, table, loads, pins or {})
    actions: list[Action] = []
    if limits.max_moves >= space.unit_size:
        actions = _improve(before, limits) or _make_room(before, limits)
    after = _apply(before, actions)
    return Plan(after.table(), tuple(_moves(before, after)), _balance(before), _balance(after))


def _apply(board: SlotBoard, actions: Collection[Action]) -> SlotBoard:
    after = board.next_step()
    for action in actions:
        after.apply(action)
    return after.next_step()


def _moves(before: SlotBoard, after: SlotBoard) -> Iterator[Move]:
    gained: list[list[Unit]] = [[] for _ in before.workers]
    lost: list[list[Unit]] = [[] for _ in before.workers]
    for unit, holders in before.holders.items():
        for worker in set(after.holders[unit]).difference(holders):
            gained[worker].append(unit)
        for worker in set(holders).difference(after.holders[unit]):
            lost[worker].append(unit)
    for name, gains, loses in zip(before.workers, gained, lost, strict=True):
        yield from (Move(name, *pair) for pair in zip_longest(gains, loses))


def _balance(board: SlotBoard) -> Balance:
    by_layer = {layer: balancedness(row) for layer, row in board.rows.items()}
    even = float(np.sum(list(board.rows.values()))) / max(1, len(board.workers))
    return Balance(by_layer, board.objective, even)


def _improve(start: SlotBoard, limits: Limits) -> list[Action]:
    """Actions within the budget, [] if they would gain nothing.

    Searched without the budget, so that a layer that has little to gain in all, which is left
    alone, is told from one that is only begun.
    """
    layers = set(start.space.moe_layers)
    while True:
        board = start.next_step()
        found = search(board, layers, limits.min_gain)
        touched = {layer for layer, _ in found}
        poor = {
            layer
            for layer in touched
            if start.peak[layer] - board.peak[layer] < limits.min_gain * start.peak[layer]
        }
        if not poor:
            break
        layers = touched - poor
    chosen = _within(limits.max_moves // start.space.unit_size, [action for _, action in found])
    gains = _apply(start, chosen).objective < start.objective * (1 - _REAL)
    return chosen if gains else []


def _within(budget: int, actions: list[Action]) -> list[Action]:
    """The first actions that load no more than `budget` units."""
    loads = 0
    for index, action in enumerate(actions):
        loads += sum(change.gains is not None for change in action)
        if loads > budget:
            return actions[:index]
    return actions


def _make_room(start: SlotBoard, limits: Limits) -> list[Action]:
    """Where only full workers could take load: copy a cold unit of one to a slot elsewhere.

    The next step drops it there. Accepted only if that step would gain, and no peak rises now.
    """
    for layer in sorted(start.rows, key=start.excess, reverse=True):
        if start.excess(layer) <= limits.min_gain * start.peak[layer]:
            break
        copy = room_for_relief(start, layer, limits.min_gain)
        if copy:
            return [copy] if _improve(_apply(start, [copy]), limits) else []
    return []
