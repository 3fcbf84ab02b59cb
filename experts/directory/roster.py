"""Who is a member, who holds what, who shall load what: the directory's state machine. No I/O.

    GATHERING --(expected workers there, or grace over; and the slots suffice;
                 or what they bring along covers every expert)--> PLACED

GATHERING  Nothing is assigned. What workers bring along already counts, so that a restarted
           directory is ready, and heals, as soon as the old holders are back.
PLACED     Every change of the members is followed by a small new plan (`placement.replan`), and
           by another one when all hold what they shall: it gives back spare slots and does what
           had to wait for a holder. There is no way back: short of slots, it keeps what there is
           and says so.

Of an expert worker two sets are kept: `holds` (see member.py) and `wish` (what it shall hold).
Their overlap is published: an expert that is to be dropped vanishes at once, one that is to be
loaded appears when it is there. `epoch` grows when the published holders change, `version` when
anything published does; both go on above the newest that any member has seen.

A worker that leaves or is drained has no slots for the plans, but stays a holder until each of its
experts has a published holder that stays. One that leaves is released at once if nobody stays,
unless others may still be on their way back to a restarted directory. Drained workers are used
again when the others' slots, spare ones included, cannot hold every expert.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import get_args

from experts.directory.journal import Journal
from experts.directory.member import Exit, Member
from experts.directory.publication import Seen, holders_of, num_held
from experts.messages import Assign, Register, Released, Role, Snapshot, Tier
from experts.placement.rebalance import RebalanceRules
from experts.placement.replan import Aims, check_slots, replan
from experts.placement.space import ExpertKey, ExpertSpace, PlacementError, Table, Unit
from experts.placement.unit_board import Pool

Order = Assign | Released


@dataclass(frozen=True)
class RosterRules:
    """What the cluster must have before it is ready, and how it is kept even.

    Placement waits for `expected_experts` workers; once `grace_s` have passed since the first one,
    for as many as can hold everything. `redundancy`: slots of the pool that take replicas. What a
    worker has not loaded after `load_limit_s` without progress goes to another one. `max_workers`:
    most that a command may ask for, by tier; absent: any number. `fixed_sizes`: workers that
    a tier shall have while no command says otherwise, for those who watch; absent: its policy says.
    """

    space: ExpertSpace
    expected_experts: int
    redundancy: int = 0
    needs_router: bool = True  # False: routers live inside the attention workers
    grace_s: float = 30.0
    load_limit_s: float = 60.0
    rebalance: RebalanceRules = field(default_factory=RebalanceRules)
    max_workers: Mapping[Tier, int] = field(default_factory=dict)
    fixed_sizes: Mapping[Role, int] = field(default_factory=dict)


@dataclass(slots=True)
class PoolCounters:
    """Since the start; but for `deaths` of expert workers only.

    `deaths`: gone without being released, by role. `replans`: plans that changed what anybody shall
    hold. `steps`, `moves`: of rebalancing; slots that changed.
    """

    released: int = 0
    deaths: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(get_args(Role), 0))
    replans: int = 0
    steps: int = 0
    moves: int = 0


class Roster:
    """Apply events; then `settle` decides and refreshes `snapshot`.

    `loads()`: load by unit, {} while unknown. `generation` changes with all that a plan rests on.
    """

    def __init__(
        self, rules: RosterRules, loads: Callable[[], Mapping[Unit, float]] = dict
    ) -> None:
        self.rules = rules
        self.counters = PoolCounters()
        self.generation = 0
        self.pins: dict[Unit, int] = {}
        self.sizes = dict(rules.fixed_sizes)
        """Workers that a tier shall have but for commands, as far as it is known."""
        self._loads = loads
        self._members: dict[str, Member] = {}
        self._first_worker_s: float | None = None
        self._placed = False
        self._joiners: set[str] = set()
        self._must_replan = False
        self._must_adjust = False  # pins or failed loads, without adding replicas
        self._moving = False  # something has changed since all held what they shall
        self._stale = False
        self._follows = False  # another directory: its members are on their way back
        self._recalled = 0  # workers that were drained and are not, since all was covered
        self._num_held = 0
        self._journal = Journal()
        self._assign_epoch = -1
        self._seen = Seen()
        self.snapshot = Snapshot(version=0, epoch=0, ready=False, stage=self._blocker(0))

    # --- events ---

    def join(self, register: Register, now_s: float) -> None:
        """A worker is there; one of the same id is replaced."""
        self._touch()
        holds = self._known(register.holds)
        exit_: Exit | None = "drain" if register.drained else None
        member = Member(register.info, holds, set(holds), exit=exit_)
        self._members[register.worker_id] = member
        self._journal.joined(member)
        self._follows |= register.seen_version > self.snapshot.version
        self._seen.take(register.seen_epoch, register.seen_version, register.seen_scale)
        if register.role == "experts":
            if member.exit is None:
                self._joiners.add(register.worker_id)
            if self._first_worker_s is None:
                self._first_worker_s = now_s

    def remove(self, worker_id: str, how: str = "its connection ended") -> None:
        """The worker is gone, and with it all it held."""
        self._touch()
        member = self._members.pop(worker_id)
        self._journal.gone(member, how)
        self._joiners.discard(worker_id)
        self.counters.deaths[member.info.role] += not (member.released and member.exit == "leave")
        self._must_replan |= member.info.role == "experts"

    def hold(self, worker_id: str, experts: Iterable[ExpertKey], epoch: int) -> None:
        """The worker can compute these and no others, after the Assign of this epoch."""
        self._touch()
        member = self._members[worker_id]
        if member.released and member.exit == "leave":
            return
        member.report(self._known(experts), epoch)
        if not self._placed and member.exit is None:
            member.wish = set(member.holds)
        self._moving |= not member.rests

    def hand_over(self, worker_id: str, reason: Exit) -> None:
        """The expert worker shall not be needed any more; one of another role need not wait."""
        member = self._members[worker_id]
        if member.exit in (reason, "leave"):
            return
        if member.info.role != "experts":
            member.begin_exit(reason)
            member.release()
            return
        self._touch()
        member.begin_exit(reason)
        member.num_to_move = len(member.published - self._covered())
        self._journal.hands_over(member)
        self._joiners.discard(worker_id)
        self._must_replan = True

    def pin(self, unit: Unit, replicas: int) -> None:
        """At least so many holders from now on, as far as there are workers and slots."""
        self._touch()
        self.pins.pop(unit, None)
        if replicas > 1:
            self.pins[unit] = replicas
        self._must_adjust = True

    def set_scale(self, role: Tier, workers: int | None) -> None:
        """Target of a tier; None: its policy decides."""
        self._stale = True
        others = {name: number for name, number in self._seen.scale.items() if name != role}
        self._seen.set_scale(others if workers is None else {**others, role: workers})

    def adopt(self, table: Table) -> None:
        """A plan made elsewhere from `table()` of this generation, but for what failed before."""
        unit_of, kept = self.rules.space.unit_of, {}
        for worker, experts in table.items():
            member = self._members[worker]
            barred = {unit_of(key) for key in member.failed - member.wish}
            kept[worker] = {key for key in experts if unit_of(key) not in barred}
        self._wish(kept)

    # --- views ---

    def experts(self) -> dict[str, Member]:
        """Expert workers by worker_id, sorted: nothing may depend on the order of arrival."""
        members = sorted(self._members.items())
        return {worker: member for worker, member in members if member.info.role == "experts"}

    def staying(self) -> dict[str, Member]:
        """Expert workers that neither leave nor are drained."""
        return {worker: member for worker, member in self.experts().items() if not member.exit}

    def slots(self) -> dict[str, int]:
        """Normal slots of those that stay."""
        return {worker: member.info.num_slots for worker, member in self.staying().items()}

    def all_slots(self) -> dict[str, int]:
        """The same with the spare ones."""
        staying = self.staying().items()
        return {worker: m.info.num_slots + m.info.spare_slots for worker, m in staying}

    def table(self) -> dict[str, set[ExpertKey]]:
        """What those that stay shall hold."""
        return {worker: member.wish for worker, member in self.staying().items()}

    def unrest(self) -> str:
        """Why this is no moment to move anything for the sake of balance; '' if it is."""
        if not self._placed:
            return "the experts have not been placed yet"
        if any(member.hands_over for member in self.experts().values()):
            return "a worker hands over its experts"
        if self._moving or self._must_replan or self._joiners or not self._all_rest():
            return "experts are still being loaded"
        return ""

    # --- deciding ---

    def settle(self, now_s: float) -> dict[str, Order]:
        """Plan if it is time to, refresh the snapshot; returns what workers are to be told."""
        if not self._placed:
            self._try_to_place(now_s)
        if self._placed:
            if not self._others_may_come(now_s) or not self._all_held():
                self._recall_drained()
            self._note_failed(now_s)
            self._plan()
        released = self._release(now_s)
        if self._stale:
            self._refresh()
            if self._placed:
                self._journal.covered(self._num_held, self.rules.space.num_total, now_s)
        return {**self._assigns(), **released}

    def _touch(self) -> None:
        self._stale = True
        self.generation += 1

    def _known(self, experts: Iterable[ExpertKey]) -> set[ExpertKey]:
        space = self.rules.space
        return {key for key in experts if key in space}

    def _shortage(self) -> str:
        """Why the slots do not suffice, or ''. Spare ones heal; nothing is begun with them."""
        try:
            check_slots(self.rules.space, self.all_slots() if self._placed else self.slots())
        except PlacementError as error:
            return str(error)
        return ""

    def _grace_is_over(self, now_s: float) -> bool:
        first_s = self._first_worker_s
        return first_s is not None and now_s - first_s >= self.rules.grace_s

    def _others_may_come(self, now_s: float) -> bool:
        """Workers of the directory before this one, or the first ones."""
        return (self._follows or not self._placed) and not self._grace_is_over(now_s)

    def _all_held(self) -> bool:
        """By whoever, also by those that hand over."""
        held = set[ExpertKey]().union(*(m.published for m in self.experts().values()))
        return len(held) == self.rules.space.num_total

    def _all_are_there(self) -> bool:
        return len(self.staying()) >= self.rules.expected_experts

    def _try_to_place(self, now_s: float) -> None:
        """The first plan spreads over all, nobody is filled up. While some may still be on their
        way back with their replicas, none are added."""
        all_brought = self._all_held()
        if not all_brought:
            if not self._all_are_there() and not self._grace_is_over(now_s):
                return
            self._recall_drained()
            if self._shortage():
                return
        self._placed = self._moving = True
        self._must_replan |= not all_brought or self._all_are_there()
        self._joiners.clear()

    def _recall_drained(self) -> None:
        drained = [m for m in self.experts().values() if m.exit == "drain"]
        for member in sorted(drained, key=lambda m: -m.info.num_slots - m.info.spare_slots):
            shortage = self._shortage()
            if not shortage:
                return
            member.recall()
            self._touch()
            self._joiners.add(member.info.worker_id)
            self._recalled += 1
            self._journal.recalled(member, shortage)

    def _note_failed(self, now_s: float) -> None:
        """What was not loaded in time is not waited for any longer."""
        limit_s = self.rules.load_limit_s
        for member in self._members.values():
            number = member.give_up(now_s, limit_s) if self._moving and not member.exit else 0
            if number:
                self._journal.cannot_load(member, number, limit_s)
            if number or (member.failed and member.forgive(now_s, limit_s)):
                self._must_adjust = True
                self._touch()

    def _all_rest(self) -> bool:
        return all(member.rests for member in self.experts().values())

    def _plan(self) -> None:
        """After a change of the members; and again, adding nothing new, when all is loaded."""
        due = self._must_replan or bool(self._joiners)
        if not due and not self._must_adjust and not (self._moving and self._all_rest()):
            return
        self._moving &= due or self._must_adjust
        redundancy = self.rules.redundancy if due else 0
        aims = Aims(redundancy, sorted(self._joiners), self.pins, self._loads())
        holders = {w: member for w, member in self.experts().items() if not member.released}
        pool = Pool(
            slots=self.slots(),
            wish=self.table(),
            held={worker: member.published for worker, member in holders.items()},
            spare_slots={worker: m.info.spare_slots for worker, m in self.staying().items()},
            failed={worker: m.failed for worker, m in self.staying().items() if m.failed},
        )
        self._joiners.clear()
        self._must_replan = self._must_adjust = False
        self.counters.replans += self._wish(replan(self.rules.space, pool, aims))

    def _wish(self, table: Table) -> bool:
        """Take over a plan; whether it changes anything."""
        changed = False
        for worker, experts in table.items():
            member, wish = self._members[worker], set(experts)
            if member.wish != wish:
                member.wish, changed = wish, True
        if changed:
            self._moving = True
            self._touch()
        return changed

    def _covered(self) -> set[ExpertKey]:
        """Published by workers that stay."""
        return set[ExpertKey]().union(*(m.published for m in self.staying().values()))

    def _release(self, now_s: float) -> dict[str, Order]:
        """Let go whom nobody needs any more."""
        leavers = {w: member for w, member in self.experts().items() if member.hands_over}
        if not leavers:
            return {}
        nobody_stays = not self.staying() and not self._others_may_come(now_s)
        covered = self._covered()
        released: dict[str, Order] = {}
        for worker, member in leavers.items():
            for_nobody = nobody_stays and member.exit == "leave"
            if for_nobody or member.published <= covered:
                self._journal.handed_over(member, nobody_stays=for_nobody)
                member.release()
                self._touch()
                if member.exit == "leave":
                    self.counters.released += 1
                    released[worker] = Released()
        return released

    def _assigns(self) -> dict[str, Order]:
        if not self._placed:
            return {}
        changed = {w: member for w, member in self.experts().items() if member.told != member.wish}
        if changed:
            self._assign_epoch = max(self.snapshot.epoch, self._assign_epoch + 1)
        return {worker: member.assign(self._assign_epoch) for worker, member in changed.items()}

    def _refresh(self) -> None:
        """Next snapshot, if anything in it changed (30 ms for 15,000 experts)."""
        self._stale = False
        holders = holders_of(self.rules.space, self.experts())
        self._num_held = num_held(holders)
        blocker = self._blocker(self._num_held)
        if self._num_held == self.rules.space.num_total:
            self._recalled = 0
        total, workers = self.rules.space.num_total, len(self.slots())
        new = Snapshot(
            version=0,
            epoch=0,
            ready=not blocker,
            stage=blocker or f"ready: {total} experts on {workers} workers",
            workers=tuple(member.info for _, member in sorted(self._members.items())),
            holders=holders,
            scale=self._seen.scale,
            drained=tuple(w for w, member in self.experts().items() if member.exit == "drain"),
        )
        self.snapshot = self._seen.next(self.snapshot, new)

    def _blocker(self, held: int) -> str:
        """What is still missing, in words and numbers; '' when the cluster is ready."""
        workers, total = len(self.staying()), self.rules.space.num_total
        if held < total:
            if not self._placed and workers < self.rules.expected_experts:
                return f"waiting for expert workers {workers}/{self.rules.expected_experts}"
            progress = f"loading experts {held}/{total} on {workers} workers"
            if self._recalled:
                progress += f" ({self._recalled} drained before and used again)"
            shortage = self._shortage()
            return f"{progress}: {shortage}" if shortage else progress
        roles = {member.info.role for member in self._members.values()}
        if "attention" not in roles:
            return "waiting for an attention worker"
        if self.rules.needs_router and "router" not in roles:
            return "waiting for a router"
        return ""
