"""Who is a member, who holds what, who shall load what: the directory's state machine. No I/O.

    GATHERING --(expected workers there, or grace over; and the slots suffice)--> PLACED

GATHERING  Nothing is assigned. What workers bring along already counts, so that a restarted
           directory is ready as soon as the old holders are back.
PLACED     Every join and leave is followed by a small new plan (`placement.replan`). There is no
           way back: short of slots, it keeps what there is and says so.

Of an expert worker two sets are kept: `holds` (its last report) and `wish` (what it shall hold).
Their overlap is published: an expert that is to be dropped vanishes at once, one that is to be
loaded appears when it is there. `epoch` grows when the published holders change, `version` when
anything published does; both go on above the newest that any member has seen.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from experts.messages import Assign, Register, Snapshot, WorkerInfo
from experts.placement import Aims, check_slots, replan
from experts.space import ExpertKey, ExpertSpace, PlacementError
from experts.unit_board import Pool


@dataclass(frozen=True)
class RosterRules:
    """What the cluster must have before it is ready.

    Placement waits for `expected_experts` workers; once `grace_s` have passed since the first one,
    for as many as can hold everything. `redundancy`: slots of the pool that take replicas.
    """

    space: ExpertSpace
    expected_experts: int
    redundancy: int = 0
    needs_router: bool = True  # False: routers live inside the attention workers
    grace_s: float = 30.0


@dataclass
class _Member:
    info: WorkerInfo
    holds: set[ExpertKey]
    wish: set[ExpertKey]
    told: set[ExpertKey] | None = None  # the last Assign; None: none yet


class Roster:
    """Apply events with `join`, `leave`, `hold`; then `settle` decides and refreshes `snapshot`."""

    def __init__(self, rules: RosterRules) -> None:
        self._rules = rules
        self._members: dict[str, _Member] = {}
        self._first_worker_s: float | None = None
        self._placed = False
        self._joiners: set[str] = set()
        self._must_replan = False
        self._stale = False
        self._seen_epoch = -1
        self._seen_version = -1
        self.snapshot = Snapshot(version=0, epoch=0, ready=False, stage=self._blocker(0))

    def join(self, register: Register, now_s: float) -> None:
        """A worker is there; one of the same id is replaced."""
        self._stale = True
        holds = self._known(register.holds)
        self._members[register.worker_id] = _Member(register.info, holds, set(holds))
        if register.seen_version:
            self._seen_epoch = max(self._seen_epoch, register.seen_epoch)
            self._seen_version = max(self._seen_version, register.seen_version)
        if register.role == "experts":
            self._joiners.add(register.worker_id)
            if self._first_worker_s is None:
                self._first_worker_s = now_s

    def leave(self, worker_id: str) -> None:
        """The worker is gone, and with it all it held."""
        self._stale = True
        member = self._members.pop(worker_id)
        self._joiners.discard(worker_id)
        self._must_replan |= member.info.role == "experts"

    def hold(self, worker_id: str, experts: Iterable[ExpertKey]) -> None:
        """The worker can compute these, and no others."""
        self._stale = True
        member = self._members[worker_id]
        member.holds = self._known(experts)
        if not self._placed:
            member.wish = set(member.holds)

    def settle(self, now_s: float) -> dict[str, Assign]:
        """Plan if it is time to, refresh the snapshot; returns the new assignments by worker_id."""
        if not self._placed and self._may_place(now_s):
            self._placed = self._must_replan = True
            self._joiners.clear()  # the first plan spreads over all, nobody is filled up
        if self._placed and (self._must_replan or self._joiners):
            self._replan()
        if self._stale:
            self._refresh()
        return self._new_assignments() if self._placed else {}

    def _known(self, experts: Iterable[ExpertKey]) -> set[ExpertKey]:
        return {key for key in experts if key in self._rules.space}

    def _expert_members(self) -> dict[str, _Member]:
        """By worker_id, sorted: nothing may depend on the order of arrival."""
        members = sorted(self._members.items())
        return {worker: member for worker, member in members if member.info.role == "experts"}

    def _slots(self) -> dict[str, int]:
        return {worker: m.info.num_slots for worker, m in self._expert_members().items()}

    def _shortage(self) -> str:
        """Why the slots do not suffice, or ''."""
        try:
            check_slots(self._rules.space, self._slots())
        except PlacementError as error:
            return str(error)
        return ""

    def _may_place(self, now_s: float) -> bool:
        if self._first_worker_s is None or self._shortage():
            return False
        waited_s = now_s - self._first_worker_s
        enough = len(self._expert_members()) >= self._rules.expected_experts
        return enough or waited_s >= self._rules.grace_s

    def _replan(self) -> None:
        members = self._expert_members()
        wishes = {worker: member.wish for worker, member in members.items()}
        aims = Aims(self._rules.redundancy, sorted(self._joiners))
        plan = replan(self._rules.space, Pool(self._slots(), wishes), aims)
        for worker, experts in plan.items():
            members[worker].wish = set(experts)
        self._joiners.clear()
        self._must_replan = False
        self._stale = True

    def _new_assignments(self) -> dict[str, Assign]:
        changed = {w: m for w, m in self._expert_members().items() if m.told != m.wish}
        for member in changed.values():
            member.told = member.wish
        epoch = self.snapshot.epoch
        return {w: Assign(epoch=epoch, experts=tuple(sorted(m.wish))) for w, m in changed.items()}

    def _refresh(self) -> None:
        """Next snapshot, if anything in it changed (30 ms for 15,000 experts)."""
        self._stale = False
        space, old = self._rules.space, self.snapshot
        lists: dict[int, list[list[str]]] = {
            layer: [[] for _ in range(space.num_experts)] for layer in space.moe_layers
        }
        for worker, member in self._expert_members().items():
            for layer, expert in member.holds & member.wish:
                lists[layer][expert].append(worker)
        num_held = sum(bool(holders) for layer in lists.values() for holders in layer)
        holders = {str(k): tuple(tuple(h) for h in layer) for k, layer in lists.items()}

        blocker = self._blocker(num_held)
        stage = blocker or f"ready: {space.num_total} experts on {len(self._slots())} workers"
        infos = tuple(member.info for _, member in sorted(self._members.items()))
        same = (stage, infos, holders) == (old.stage, old.workers, old.holders)
        epoch = old.epoch + (holders != old.holders)
        if self._seen_epoch >= old.epoch:
            epoch = self._seen_epoch + 1
        if same and epoch == old.epoch and self._seen_version < old.version:
            return
        self.snapshot = Snapshot(
            version=max(old.version, self._seen_version) + 1,
            epoch=epoch,
            ready=not blocker,
            stage=stage,
            workers=infos,
            holders=holders,
        )

    def _blocker(self, num_held: int) -> str:
        """What is still missing, in words and numbers; '' when the cluster is ready."""
        workers, total = len(self._slots()), self._rules.space.num_total
        if num_held < total:
            if not self._placed and workers < self._rules.expected_experts:
                return f"waiting for expert workers {workers}/{self._rules.expected_experts}"
            progress = f"loading experts {num_held}/{total} on {workers} workers"
            shortage = self._shortage()
            return f"{progress}: {shortage}" if shortage else progress
        roles = {member.info.role for member in self._members.values()}
        if "attention" not in roles:
            return "waiting for an attention worker"
        if self._rules.needs_router and "router" not in roles:
            return "waiting for a router"
        return ""
