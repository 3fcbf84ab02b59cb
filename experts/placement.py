"""Which worker holds which expert while workers come and go: pure decisions, no I/O.

`replan` starts from what workers hold now and changes as little as it can. It places *units*:
single experts, or whole routing groups where the model is group-limited, so that a token reaches at
most `topk_group` workers. (`eplb.py` has the planner for known loads on a fixed grid of GPUs.)

Invariants: no worker above its slots, no worker with two replicas of one expert, groups whole, full
coverage whenever the slots allow it, the same answer whatever the order of the arguments.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

ExpertKey = tuple[int, int]  # (layer, expert id)
Unit = tuple[int, int]  # (layer, index of the unit in the layer)
Table = Mapping[str, Collection[ExpertKey]]  # worker_id -> experts


class PlacementError(ValueError):
    """The numbers do not allow a placement; str() is one line with the numbers and the remedy."""


@dataclass(frozen=True)
class ExpertSpace:
    """All (layer, expert) pairs of a model and the unit they are placed in.

    `num_groups` is the model's n_group if its routing is group-limited, else 1.
    """

    moe_layers: tuple[int, ...]
    num_experts: int
    num_groups: int = 1

    def __post_init__(self) -> None:
        if not self.moe_layers or self.num_experts < 1:
            layers = len(self.moe_layers)
            raise PlacementError(f"nothing to place: {layers} layers of {self.num_experts} experts")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise PlacementError(f"{self.num_experts} experts, {self.num_groups} unequal groups")

    @property
    def unit_size(self) -> int:
        """Experts that are placed together."""
        return self.num_experts // self.num_groups if self.num_groups > 1 else 1

    @property
    def num_total(self) -> int:
        """Logical experts over all layers."""
        return len(self.moe_layers) * self.num_experts

    def units(self) -> Iterator[Unit]:
        return itertools.product(self.moe_layers, range(self.num_experts // self.unit_size))

    def unit_of(self, key: ExpertKey) -> Unit:
        return key[0], key[1] // self.unit_size

    def experts_of(self, unit: Unit) -> Iterator[ExpertKey]:
        layer, index = unit
        return ((layer, index * self.unit_size + i) for i in range(self.unit_size))

    def __contains__(self, key: ExpertKey) -> bool:
        return key[0] in self.moe_layers and 0 <= key[1] < self.num_experts


def slots_needed(
    num_experts_total: int, num_workers: int, redundancy: int, unit_size: int = 1
) -> int:
    """Slots a worker needs so that equal ones hold every expert and `redundancy` replicas."""
    num_units = -(-(num_experts_total + redundancy) // unit_size)
    return -(-num_units // num_workers) * unit_size


def check_slots(space: ExpertSpace, slots: Mapping[str, int]) -> None:
    """Raise PlacementError unless the slots (worker_id -> number) can hold every expert once."""
    usable = sum(number // space.unit_size for number in slots.values()) * space.unit_size
    if usable < space.num_total:
        whole = f" usable in whole groups of {space.unit_size}" if space.unit_size > 1 else ""
        raise PlacementError(
            f"needs {space.num_total} expert slots, have {usable}{whole} on {len(slots)} workers: "
            "add workers or slots"
        )


def initial_table(
    space: ExpertSpace, slots: Mapping[str, int], redundancy: int = 0
) -> dict[str, list[ExpertKey]]:
    """First assignment of all experts, even per layer and over workers; raises PlacementError.

    `slots`: worker_id -> number of slots. `redundancy` slots of the pool take replicas, as far as
    there is room.
    """
    check_slots(space, slots)
    return replan(space, slots, {}, redundancy)


def replan(
    space: ExpertSpace,
    slots: Mapping[str, int],
    table: Table,
    redundancy: int = 0,
    joiner: str | None = None,
) -> dict[str, list[ExpertKey]]:
    """What every live worker shall hold, given what it holds (or is loading) now.

    Orphans (no live holder) go to free slots, then to slots of experts that have another holder.
    Then the least replicated get replicas until `redundancy` slots beyond coverage are in use. A
    `joiner` is filled with replicas to its last slot: it came to take load. Experts stay uncovered
    only if the slots do not suffice.
    """
    board = _Board(space, slots, table)
    board.place_orphans()
    board.add_replicas(redundancy // space.unit_size)
    if joiner is not None:
        board.fill(joiner)
    return board.table()


class _Board:
    """Units on workers while a plan is made. Room and load are counted in units."""

    def __init__(self, space: ExpertSpace, slots: Mapping[str, int], table: Table) -> None:
        self._space = space
        self._capacity = {worker: slots[worker] // space.unit_size for worker in sorted(slots)}
        self._used = dict.fromkeys(self._capacity, 0)
        self._used_in_layer: Counter[tuple[str, int]] = Counter()
        self._holders: dict[Unit, set[str]] = {unit: set() for unit in space.units()}
        for worker in self._capacity:
            # A unit held in part counts as held and will be completed; beyond the slots is dropped.
            parts = Counter(space.unit_of(key) for key in table.get(worker, ()) if key in space)
            kept = sorted(parts, key=lambda unit: (-parts[unit], unit))[: self._capacity[worker]]
            for unit in kept:
                self._put(unit, worker)

    def place_orphans(self) -> None:
        orphans = [unit for unit, holders in self._holders.items() if not holders]
        spares = self._replicated_most_first()
        for unit in orphans:
            worker = self._best_worker(unit) or self._evict_one(spares, unit[0])
            if worker is None:
                return
            self._put(unit, worker)

    def add_replicas(self, num_redundant: int) -> None:
        goal = len(self._holders) + num_redundant
        progress = True
        while progress:
            progress = False
            waiting = self._least_replicated_first()
            while sum(self._used.values()) < goal and (pick := self._next_replica(waiting)):
                index, worker = pick
                self._put(waiting.pop(index), worker)
                progress = True

    def fill(self, worker: str) -> None:
        for unit in self._least_replicated_first():
            if self._used[worker] >= self._capacity[worker]:
                return
            if worker not in self._holders[unit]:
                self._put(unit, worker)

    def table(self) -> dict[str, list[ExpertKey]]:
        table: dict[str, list[ExpertKey]] = {worker: [] for worker in self._capacity}
        for unit in sorted(self._holders):
            for worker in self._holders[unit]:
                table[worker].extend(self._space.experts_of(unit))
        return table

    def _put(self, unit: Unit, worker: str) -> None:
        self._holders[unit].add(worker)
        self._used[worker] += 1
        self._used_in_layer[worker, unit[0]] += 1

    def _best_worker(self, unit: Unit) -> str | None:
        """Has room, lacks the unit, is relatively least filled: in this layer, then in all."""

        def fill_level(worker: str) -> tuple[float, float, str]:
            room = self._capacity[worker]
            in_layer = (self._used_in_layer[worker, unit[0]] + 1) / room
            return in_layer, self._used[worker] / room, worker

        holders = self._holders[unit]
        open_workers = (w for w, room in self._capacity.items() if self._used[w] < room)
        return min((w for w in open_workers if w not in holders), key=fill_level, default=None)

    def _next_replica(self, waiting: list[Unit]) -> tuple[int, str] | None:
        """Index of the first waiting unit that the emptiest possible worker lacks; the worker."""
        open_workers = [w for w, room in self._capacity.items() if self._used[w] < room]
        for worker in sorted(open_workers, key=lambda w: (self._used[w] / self._capacity[w], w)):
            for index, unit in enumerate(waiting):
                if worker not in self._holders[unit]:
                    return index, worker
        return None

    def _evict_one(self, spares: Iterator[Unit], layer: int) -> str | None:
        """Free a slot by dropping a replica; returns its worker, the one with least of `layer`."""
        for unit in spares:
            holders = self._holders[unit]
            if len(holders) > 1:
                worker = min(holders, key=lambda w: (self._used_in_layer[w, layer], w))
                holders.remove(worker)
                self._used[worker] -= 1
                self._used_in_layer[worker, unit[0]] -= 1
                return worker
        return None

    def _replicated_most_first(self) -> Iterator[Unit]:
        """Every replica that could go, as its unit, those of the most replicated units first."""
        count = {unit: len(holders) for unit, holders in self._holders.items()}
        for level in range(max(count.values()), 1, -1):
            yield from (unit for unit in self._holders if count[unit] >= level)

    def _least_replicated_first(self) -> list[Unit]:
        """Units with the fewest holders first; among equals alternating over layers, then holders.

        So that a few replicas relieve all layers and all workers instead of the first ones.
        """
        rank = {worker: i for i, worker in enumerate(self._capacity)}
        turn: Counter[tuple[int, int, int]] = Counter()  # of a holder in a lane
        lanes: dict[tuple[int, int], list[tuple[int, int, Unit]]] = {}  # by (holders, layer)
        for unit in sorted(self._holders):
            holders, layer = self._holders[unit], unit[0]
            holder = rank[min(holders)] if holders else 0
            bucket = (len(holders), layer, holder)
            first_holder = (holder + layer) % max(1, len(rank))  # another one in each layer
            lanes.setdefault(bucket[:2], []).append((turn[bucket], first_holder, unit))
            turn[bucket] += 1
        order = [
            (num_holders, position, unit)
            for (num_holders, _), lane in lanes.items()
            for position, (_, _, unit) in enumerate(sorted(lane))
        ]
        return [unit for _, _, unit in sorted(order)]
