"""Expert workers that do as a roster tells them, as slowly as a test wants; no channel."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from experts.directory.commands import carry_out
from experts.directory.rebalancer import Rebalancer
from experts.directory.roster import Roster, RosterRules
from experts.messages import Assign, Drain, Register, Released, Replicate, Role
from experts.placement.space import ExpertKey, ExpertSpace, unit_loads


def register(
    worker_id: str, role: Role = "experts", slots: int = 2, spare: int = 0, **fields: object
) -> Register:
    is_expert = role == "experts"
    return Register(
        worker_id=worker_id,
        role=role,
        endpoint=f"inproc:{worker_id}",
        pid=1,
        node="n",
        num_slots=slots if is_expert else 0,
        spare_slots=spare if is_expert else 0,
        **fields,  # type: ignore[arg-type]
    )


@dataclass
class Worker:
    """`loaded` is the truth; its reports wait in `reports` until they are delivered. It cannot read
    what is in `bad`."""

    loaded: set[ExpertKey] = field(default_factory=set)
    told: Assign | None = None
    at: Assign | None = None
    released: bool = False
    reports: deque[tuple[int, set[ExpertKey]]] = field(default_factory=deque)
    bad: set[ExpertKey] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        if self.told is None:
            return not self.reports
        missing = set(self.told.experts) ^ self.loaded
        return self.at is self.told and missing <= self.bad and not self.reports

    def work(self, num_loads: int) -> None:
        """Drop what the newest Assign lacks, load a few of the others, write a report."""
        if self.told is None:
            return
        self.at = self.told
        wished = set(self.at.experts)
        self.loaded &= wished
        self.loaded |= set(sorted(wished - self.loaded - self.bad)[:num_loads])
        self.reports.append((self.at.epoch, set(self.loaded)))


class Pool:
    """A roster and its workers; `loads` is what the directory would have measured."""

    def __init__(self, space: ExpertSpace, expected: int = 2, **rules: object) -> None:
        self.space = space
        self.loads: dict[int, list[int]] = {}
        self.now_s = 0.0
        self.workers: dict[str, Worker] = {}
        rules = {"needs_router": False, **rules}
        self.roster = Roster(RosterRules(space, expected, **rules), self._unit_loads)  # type: ignore[arg-type]
        self.rebalancer = Rebalancer(self.roster, lambda: self.loads, 0.0)
        self.roster.join(register("att", "attention"), 0.0)
        self.settle()

    def _unit_loads(self) -> dict:
        return unit_loads(self.space, self.loads) if self.loads else {}

    def settle(self) -> None:
        for name, order in self.roster.settle(self.now_s).items():
            if isinstance(order, Released):
                self.workers[name].released = True
            else:
                self.workers[name].told = order

    def join(
        self,
        name: str,
        slots: int = 2,
        spare: int = 0,
        holds: Iterable[ExpertKey] = (),
        **fields: object,
    ) -> None:
        self.workers[name] = Worker(loaded=set(holds))
        message = register(name, slots=slots, spare=spare, holds=tuple(holds), **fields)
        self.roster.join(message, self.now_s)
        self.settle()

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.settle()

    def die(self, name: str) -> None:
        del self.workers[name]
        self.roster.remove(name)
        self.settle()

    def leave(self, name: str) -> None:
        self.roster.hand_over(name, "leave")
        self.settle()

    def drain(self, name: str) -> str:
        text = carry_out(self.roster, Drain(worker_id=name))
        self.settle()
        return text

    def pin(self, layer: int, expert: int, replicas: int) -> str:
        text = carry_out(self.roster, Replicate(layer=layer, expert=expert, replicas=replicas))
        self.settle()
        return text

    def rebalance(self) -> str:
        step = self.rebalancer.begin(0.0)
        if isinstance(step, str):
            return step
        text = self.rebalancer.finish(step, step.plan())
        self.settle()
        return text

    def deliver(self, name: str) -> None:
        """The oldest report of a worker reaches the roster."""
        epoch, experts = self.workers[name].reports.popleft()
        self.roster.hold(name, experts, epoch)
        self.settle()

    def run(self) -> None:
        """Until every worker has done all it was told; a plan that never ends fails."""
        for _ in range(200):
            busy = [name for name, worker in self.workers.items() if not worker.idle]
            if not busy:
                return
            for name in busy:
                self.workers[name].work(10**6)
                while self.workers[name].reports:
                    self.deliver(name)
        raise AssertionError("the pool does not come to rest")

    # --- what is there ---

    def held_by(self, layer: int = 1) -> list[str]:
        """By expert: its published holders."""
        return ["+".join(holders) for holders in self.roster.snapshot.holders_of(layer)]

    def published(self) -> dict[ExpertKey, tuple[str, ...]]:
        layers = self.space.moe_layers
        return {
            (layer, expert): holders
            for layer in layers
            for expert, holders in enumerate(self.roster.snapshot.holders_of(layer))
        }

    def num_held(self) -> dict[str, int]:
        """Published experts of each worker that has any."""
        return dict(sorted(Counter(w for held in self.published().values() for w in held).items()))


def pool(space: ExpertSpace, workers: str, slots: int, spare: int = 0, **rules: object) -> Pool:
    """Placed, loaded and at rest."""
    result = Pool(space, len(workers), **rules)
    for name in workers:
        result.join(name, slots, spare)
    result.run()
    assert result.roster.snapshot.ready, result.roster.snapshot.stage
    return result
