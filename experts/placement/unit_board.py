"""Units on workers while a plan is made: where there is room, what may go. Pure.

Room and load are counted in units. A worker's *wish* is what it holds or loads; what it *holds* for
certain is less while it loads. A replica may go if another worker holds the unit for certain and
keeps it: so each unit keeps one of its holders through every plan, however the loads end.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from experts.placement.replica_order import least_replicated_first, most_wanted_first
from experts.placement.space import ExpertKey, ExpertSpace, Table, Unit

_Level = Callable[[str, int], tuple[float, float]]  # (worker, layer) -> how full; least is best


@dataclass(frozen=True)
class Pool:
    """The expert workers as a plan finds them; all by worker_id.

    `held`: what is loaded, None if that is all of `wish`. Who is only in `held` leaves: what it
    holds is wanted elsewhere, but less urgently than what nobody holds. `failed`: what a worker
    could not load: it gets none of it if anybody else can take it.
    """

    slots: Mapping[str, int]
    wish: Table
    held: Table | None = None
    spare_slots: Mapping[str, int] = field(default_factory=dict)
    failed: Table = field(default_factory=dict)


class UnitBoard:
    """The table as sets. Every method but `table` changes it, and leaves alone what is well."""

    def __init__(
        self,
        space: ExpertSpace,
        pool: Pool,
        pins: Mapping[Unit, int],
        loads: Mapping[Unit, float],
    ) -> None:
        self._space, self._pins, self._loads = space, pins, loads
        size, spare = space.unit_size, pool.spare_slots
        self._normal = {worker: pool.slots[worker] // size for worker in sorted(pool.slots)}
        self._limit = {w: (pool.slots[w] + spare.get(w, 0)) // size for w in self._normal}
        self._holders: dict[Unit, set[str]] = {unit: set() for unit in space.units()}
        self._units = {w: self._fitting(pool.wish.get(w, ()), w) for w in self._normal}
        for worker, units in self._units.items():
            for unit in units:
                self._holders[unit].add(worker)
        self._used = {worker: len(units) for worker, units in self._units.items()}
        self._used_in_layer = {
            worker: Counter([layer for layer, _ in units]) for worker, units in self._units.items()
        }
        held = pool.wish if pool.held is None else pool.held
        self._held = {worker: _whole_units(space, keys) for worker, keys in held.items()}
        self._held_in_part = {worker: set(_parts(space, keys)) for worker, keys in held.items()}
        self._held_by_leavers = set[Unit]().union(
            *(units for worker, units in self._held.items() if worker not in self._normal)
        )
        for worker in self._normal:
            self._held.setdefault(worker, set())
        self._failed: dict[Unit, set[str]] = {}  # workers that could not load it
        for worker, keys in pool.failed.items():
            for unit in _parts(space, keys):
                self._failed.setdefault(unit, set()).add(worker)
        self._replicas: dict[bool, list[tuple[int, float, Unit]]] = {}  # heaps, see _evict

    # --- what a plan does, in its order ---

    def place_orphans(self) -> None:
        orphans = [unit for unit, holders in self._holders.items() if not holders]
        for of_leavers in (False, True):
            rest = [unit for unit in orphans if (unit in self._held_by_leavers) == of_leavers]
            rest = [u for u in rest if u not in self._failed or not self._place_elsewhere(u)]
            rest = self._place(rest, self._normal, self._fill_level)
            rest = self._place_on_replicas(rest, pinned=False)
            rest = self._place(rest, self._limit, self._spare_level)
            self._place_on_replicas(rest, pinned=True)

    def replace_failed(self) -> None:
        """A unit that a worker could not load goes to another one, and then from the first."""
        for unit, workers in sorted(self._failed.items()):
            for worker in sorted(workers & self._holders[unit]):
                if self._held_elsewhere(unit, worker):
                    self._drop(unit, worker)
                elif self._holders[unit] <= workers:
                    self._place_elsewhere(unit)

    def ensure_pins(self) -> None:
        num_workers = sum(room > 0 for room in self._normal.values())
        for unit, replicas in sorted(self._pins.items()):
            while len(self._holders[unit]) < min(replicas, num_workers):
                if not self._add_replica(unit):
                    break

    def give_back(self) -> None:
        """Workers in spare slots drop replicas; what they alone hold is copied, as far as it goes.

        What loads elsewhere already needs no further copy: a later plan drops it here.
        """
        excess = {w: used - self._normal[w] for w, used in self._used.items()}
        for worker in sorted(excess, key=lambda w: (-excess[w], w)):
            if excess[worker] > 0:
                self._drop_replicas(worker)
                self._copy_elsewhere(worker)

    def fill(self, worker: str) -> None:
        room = self._normal[worker]
        for unit in most_wanted_first(self._holders, self._loads, list(self._normal)):
            if self._used[worker] >= room:
                return
            if self._may_take(unit, worker):
                self._put(unit, worker)

    def add_replicas(self, num_redundant: int) -> None:
        goal = len(self._holders) + num_redundant
        progress = True
        while progress and sum(self._used.values()) < goal and self._open_workers():
            progress = False
            waiting = least_replicated_first(self._holders, list(self._normal))
            while sum(self._used.values()) < goal and (pick := self._next_replica(waiting)):
                index, worker = pick
                self._put(waiting.pop(index), worker)
                progress = True

    def table(self) -> dict[str, list[ExpertKey]]:
        if self._space.unit_size == 1:
            return {worker: sorted(units) for worker, units in self._units.items()}
        experts_of = self._space.experts_of
        return {
            worker: [key for unit in sorted(units) for key in experts_of(unit)]
            for worker, units in self._units.items()
        }

    # --- slots ---

    def _fitting(self, keys: Iterable[ExpertKey], worker: str) -> set[Unit]:
        """Units held in part count as held and will be completed; beyond the slots is dropped."""
        parts = _parts(self._space, keys)
        units = {unit for unit in parts if unit in self._holders}
        if len(units) <= self._limit[worker]:
            return units
        return set(sorted(units, key=lambda unit: (-parts[unit], unit))[: self._limit[worker]])

    def _put(self, unit: Unit, worker: str) -> None:
        self._holders[unit].add(worker)
        self._units[worker].add(unit)
        self._used[worker] += 1
        self._used_in_layer[worker][unit[0]] += 1

    def _drop(self, unit: Unit, worker: str) -> None:
        self._holders[unit].remove(worker)
        self._units[worker].remove(unit)
        self._used[worker] -= 1
        self._used_in_layer[worker][unit[0]] -= 1

    def _may_take(self, unit: Unit, worker: str) -> bool:
        return worker not in self._holders[unit] and worker not in self._failed.get(unit, ())

    def _open_workers(self) -> list[str]:
        """With a free normal slot."""
        return [worker for worker, room in self._normal.items() if self._used[worker] < room]

    def _fill_level(self, worker: str, layer: int) -> tuple[float, float]:
        """Relative to the worker's slots: in this layer, then in all."""
        room = self._normal[worker]
        return (self._used_in_layer[worker][layer] + 1) / room, self._used[worker] / room

    def _spare_level(self, worker: str, layer: int) -> tuple[float, float]:
        """Spare slots in use relative to what there are, then units of this layer."""
        normal = self._normal[worker]
        spare = self._limit[worker] - normal
        return (self._used[worker] - normal) / spare, self._used_in_layer[worker][layer]

    def _place(self, units: list[Unit], limit: Mapping[str, int], level: _Level) -> list[Unit]:
        """Orphans, each to the least filled worker below its limit; returns those without room."""
        rest: list[Unit] = []
        for layer, orphans in groupby(units, key=lambda unit: unit[0]):
            heap = [(level(w, layer), w) for w, room in limit.items() if self._used[w] < room]
            heapq.heapify(heap)
            for unit in orphans:
                if not heap:
                    rest.append(unit)
                    continue
                worker = heap[0][1]
                self._put(unit, worker)
                if self._used[worker] < limit[worker]:
                    heapq.heapreplace(heap, (level(worker, layer), worker))
                else:
                    heapq.heappop(heap)
        return rest

    def _place_on_replicas(self, units: list[Unit], *, pinned: bool) -> list[Unit]:
        """Orphans in place of replicas; returns those for which there is none."""
        for index, unit in enumerate(units):
            worker = self._evict(unit, pinned=pinned)
            if worker is None:
                return units[index:]
            self._put(unit, worker)
        return []

    def _place_elsewhere(self, unit: Unit) -> bool:
        """Where it has not failed: in a slot, in place of a replica, in a spare slot."""
        worker = (
            self._least_filled(unit, self._normal, self._fill_level)
            or self._evict(unit, pinned=False)
            or self._least_filled(unit, self._limit, self._spare_level)
        )
        if worker is not None:
            self._put(unit, worker)
        return worker is not None

    def _least_filled(self, unit: Unit, limit: Mapping[str, int], level: _Level) -> str | None:
        """Of the workers below their limit that may take the unit."""
        open_workers = (w for w, room in limit.items() if self._used[w] < room)
        workers = [w for w in open_workers if self._may_take(unit, w)]
        return min(workers, key=lambda w: (level(w, unit[0]), w), default=None)

    def _add_replica(self, unit: Unit) -> bool:
        """In a free normal slot, else in place of a replica that nobody pinned."""
        best = self._least_filled(unit, self._normal, self._fill_level)
        worker = best or self._evict(unit, pinned=False, only_normal=True)
        if worker is not None:
            self._put(unit, worker)
        return worker is not None

    # --- replicas that may go ---

    def _least_holders(self, unit: Unit, pinned: bool = False) -> int:
        """That it must keep; `pinned`: pinned replicas may go as well."""
        return 1 if pinned else max(1, self._pins.get(unit, 1))

    def _held_elsewhere(self, unit: Unit, worker: str) -> bool:
        """Another worker holds it for certain."""
        return any(unit in self._held[w] for w in self._holders[unit] if w != worker)

    def _may_drop(self, unit: Unit, worker: str) -> bool:
        in_part = unit in self._held_in_part.get(worker, ())
        return not in_part or self._held_elsewhere(unit, worker)

    def _evict(self, unit: Unit, *, pinned: bool, only_normal: bool = False) -> str | None:
        """Free a slot on a worker that lacks the unit by dropping a replica; returns the worker.

        Of the most replicated unit, the coldest of those; on the worker with least of the layer.
        """
        if pinned not in self._replicas:
            heap = [self._rank(u) for u, holders in self._holders.items() if len(holders) > 1]
            heapq.heapify(heap)
            self._replicas[pinned] = heap
        heap, unusable = self._replicas[pinned], []
        found: str | None = None
        while heap and found is None:
            rank = heapq.heappop(heap)
            victim = rank[-1]
            if len(self._holders[victim]) <= self._least_holders(victim, pinned):
                continue
            workers = [w for w in self._holders[victim] if self._may_drop(victim, w)]
            usable = [
                w
                for w in workers
                if self._may_take(unit, w) and not (only_normal and self._used[w] > self._normal[w])
            ]
            if usable:
                found = min(usable, key=lambda w: (self._used_in_layer[w][unit[0]], w))
                self._drop(victim, found)
                unusable.append(self._rank(victim))
            elif workers:
                unusable.append(rank)
        for rank in unusable:
            heapq.heappush(heap, rank)
        return found

    def _rank(self, unit: Unit) -> tuple[int, float, Unit]:
        """Those whose replicas hurt least come first."""
        return -len(self._holders[unit]), self._loads.get(unit, 0.0), unit

    def _drop_replicas(self, worker: str) -> None:
        for unit in sorted(self._units[worker], key=self._rank):
            if self._used[worker] <= self._normal[worker]:
                return
            enough = len(self._holders[unit]) > self._least_holders(unit)
            if enough and self._held_elsewhere(unit, worker):
                self._drop(unit, worker)

    def _copy_elsewhere(self, worker: str) -> None:
        """The coldest of what it alone holds."""
        units = self._units[worker]
        needed = [u for u in units if len(self._holders[u]) <= self._least_holders(u)]
        copies = self._used[worker] - self._normal[worker] - (len(units) - len(needed))
        order = sorted(needed, key=lambda u: (len(self._holders[u]), self._loads.get(u, 0.0), u))
        for unit in order[: max(0, copies)]:
            if not self._add_replica(unit):
                return

    # --- replicas to add ---

    def _next_replica(self, waiting: list[Unit]) -> tuple[int, str] | None:
        """Index of the first waiting unit that the emptiest possible worker lacks; the worker."""
        by_level = sorted(self._open_workers(), key=lambda w: (self._used[w] / self._normal[w], w))
        for worker in by_level:
            for index, unit in enumerate(waiting):
                if self._may_take(unit, worker):
                    return index, worker
        return None


def _parts(space: ExpertSpace, keys: Iterable[ExpertKey]) -> Mapping[Unit, int]:
    """How many experts of each unit are named."""
    if space.unit_size == 1:
        return dict.fromkeys(keys, 1)
    return Counter([space.unit_of(key) for key in keys])


def _whole_units(space: ExpertSpace, keys: Iterable[ExpertKey]) -> set[Unit]:
    if space.unit_size == 1:
        return set(keys)
    return {unit for unit, number in _parts(space, keys).items() if number == space.unit_size}
